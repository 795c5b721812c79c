"""Variation of F0 and energy: worked numbers, targets, voice prompts, failures, and what does not count."""

import json
import math

import numpy as np
import pytest
from fake_rollouts import SAMPLE_RATE, call, ids, speech_scorer
from fake_vowel import vowel

from common.cli import InputError
from reward_models import load_config, needs_voice_prompt
from reward_models.variation import VariationReward, coefficient_of_variation, variation_reward, variations
from speech.pitch import pitch_track

FLAT = [20] * 80
LIVELY = [round(20 + 10 * math.sin(i / 6)) for i in range(80)]  # F0 of 140 Hz, a swing of 20 Hz


def swing(depth_hz: float, seconds: float = 2.0) -> np.ndarray:
    """A vowel whose F0 swings around 150 Hz, twice a second."""
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return vowel(150 + depth_hz * np.sin(2 * np.pi * 2 * times))


def test_variation_reward_by_hand():
    # |0.3 − 0.2| / 0.2 = 0.5 lost; targets below 0.05 count as 0.05: |0.02 − 0.01| / 0.05
    assert [variation_reward(cv, 0.2) for cv in (0.1, 0.3)] == pytest.approx([0.5, 0.5])
    assert variation_reward(0.2, 0.2) == 1 and variation_reward(0.4, 0.2) == variation_reward(9.0, 0.2) == 0
    assert variation_reward(0.02, 0.01) == pytest.approx(0.8)
    assert variation_reward(0.0, 0.0) == 1


def test_variations_of_known_contours():
    # A sine of depth d has standard deviation d / √2: 30 / √2 / 150 = 0.1414
    f0_cv, energy_cv = variations(pitch_track(swing(30)))
    assert f0_cv == pytest.approx(0.1414, abs=0.01)
    assert variations(pitch_track(swing(0)))[0] < 0.005
    wav = swing(0)
    half_as_loud = np.concatenate([wav, 0.5 * wav])  # RMS 1 and 0.5: 0.25 / 0.75 = 1 / 3
    assert variations(pitch_track(half_as_loud))[1] == pytest.approx(1 / 3, abs=0.03) and energy_cv < 0.1
    assert all(math.isnan(value) for value in variations(pitch_track(np.zeros(16_000, np.float32))))


def test_pauses_and_louder_recordings_are_no_variation():
    wav = swing(30)
    paused = np.concatenate([wav[:16_000], np.zeros(8_000, np.float32), wav[16_000:]])
    plain, with_pause, quiet = (variations(pitch_track(each)) for each in (wav, paused, 0.2 * wav))
    assert with_pause == pytest.approx(plain, abs=0.03)
    assert quiet == pytest.approx(plain, abs=0.01)


def test_targets_count_alone():
    f0_cv = 20 / math.sqrt(2) / 140  # 0.101
    batch = [ids(LIVELY), ids(FLAT)]
    metrics = {}
    lively, flat = call(VariationReward(speech_scorer(), f0_cv=f0_cv), batch, metrics)
    assert lively > 0.9 and flat < 0.1
    assert metrics["f0_cv"] == pytest.approx(f0_cv / 2, abs=0.01) and "energy_cv" in metrics
    too_much, _ = call(VariationReward(speech_scorer(), f0_cv=f0_cv / 2), batch)
    assert too_much < 0.2
    # The energy of a hum hardly varies
    both, _ = call(VariationReward(speech_scorer(), f0_cv=f0_cv, energy_cv=0.5), batch)
    energy, _ = call(VariationReward(speech_scorer(), energy_cv=0.5), batch)
    assert both == pytest.approx((lively + energy) / 2) and energy < 0.2


def test_the_voice_prompts_variation_is_the_target():
    batch, prompts = [ids(LIVELY), ids(LIVELY), ids(FLAT), ids(FLAT)], [LIVELY, FLAT, LIVELY, FLAT]
    scorer = speech_scorer(1)
    same, livelier, flatter, flat = call(VariationReward(scorer), batch, ref_codes=prompts)
    assert same == pytest.approx(1) and flat == pytest.approx(1)
    assert livelier < 0.6 and flatter < 0.6
    assert scorer.codec.decoded == [4, 2]  # four rollouts, two prompts


def test_failed_rollouts_and_those_without_a_voice_earn_nothing():
    batch = [ids([]), ids(LIVELY, truncated=True), ids([0] * 40), ids([63] * 40), ids(LIVELY[:3])]
    metrics = {}
    assert call(VariationReward(speech_scorer(5), f0_cv=0.1), batch, metrics) == [0.0] * 5
    assert math.isnan(metrics["f0_cv"])
    assert call(VariationReward(speech_scorer()), [ids(LIVELY)] * 2, ref_codes=[[0] * 40] * 2) == [None, None]


def test_a_run_without_targets_needs_voice_prompts(tmp_path):
    def needed(parameters: dict) -> bool:
        (tmp_path / "reward.json").write_text(json.dumps({"variation": parameters}))
        return needs_voice_prompt(load_config(tmp_path / "reward.json"), "tts")

    assert needed({}) and not needed({"energy_cv": 0.4})
    assert needs_voice_prompt(load_config("reward_models/voice.json"), "tts")
    assert not needs_voice_prompt(load_config("reward_models/style_lively.json"), "tts")


def test_a_constant_has_no_variation():
    assert coefficient_of_variation(np.full(5, 3.0)) == 0


@pytest.mark.parametrize("name", ["f0_cv", "energy_cv"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_bad_targets(name, value):
    with pytest.raises(InputError, match=f"{name}: must be > 0"):
        VariationReward(None, **{name: value})
