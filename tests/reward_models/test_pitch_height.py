"""Pitch height: worked numbers, the two references, failures, and how far it can be hacked."""

import json
import math

import numpy as np
import pytest
from fake_rollouts import call, ids, speech_scorer
from fake_vowel import vowel

from common.cli import InputError
from reward_models import load_config, needs_voice_prompt
from reward_models.pitch_height import PitchHeightReward, height_reward, mean_pitch
from speech.pitch import PitchTrack, pitch_track


def tone(f0_hz: float, length: int = 40) -> list[int]:
    """HummingCodec's code n is 100 + 2 n Hz."""
    return [round((f0_hz - 100) / 2)] * length


def test_height_reward_by_hand():
    # 1 − (3.25 − 0.5) / 5.5 = 0.5, above and below the target alike
    assert height_reward(3.25, 0) == height_reward(-3.25, 0) == height_reward(6.25, 3) == 0.5
    assert height_reward(2.5, 3) == height_reward(3.5, 3) == 1
    assert height_reward(-3, 3) == height_reward(40, 3) == 0
    heights = np.linspace(-8, 8, 65)
    assert all(0 <= height_reward(height, 3) <= 1 for height in heights)


def test_mean_pitch_is_of_the_logarithm():
    glide = vowel(np.exp(np.linspace(math.log(100), math.log(200), 16_000)))
    assert mean_pitch(pitch_track(glide)) == pytest.approx(12 * math.log2(100 * math.sqrt(2)), abs=0.1)
    assert math.isnan(mean_pitch(pitch_track(np.zeros(16_000, np.float32))))
    short, long_enough = (PitchTrack(np.zeros(frames), np.full(frames, 80.0), np.zeros(frames)) for frames in (9, 10))
    assert math.isnan(mean_pitch(short)) and mean_pitch(long_enough) == 80


def test_height_above_the_voice_prompt():
    # 126 Hz is 4 semitones above 100 (12 log2 1.26 = 4.0010); the second rollout is as high as its prompt
    metrics = {}
    batch, prompts = [ids(tone(126)), ids(tone(126))], [tone(102), tone(126)]
    offset = 12 * math.log2(126 / 102)  # 3.658
    rewards = call(PitchHeightReward(speech_scorer(1), target=4), batch, metrics, ref_codes=prompts)
    assert rewards == pytest.approx([1.0, 1 - 3.5 / 5.5], abs=0.02)
    assert metrics["pitch_height"] == pytest.approx(offset / 2, abs=0.02)
    assert call(PitchHeightReward(speech_scorer(1)), batch, ref_codes=prompts)[1] == 1


def test_height_above_a_frequency():
    batch = [ids(tone(126)), ids(tone(178))]
    # 178 / 126 is 5.983 semitones: 1 − 5.483 / 5.5
    rewards = call(PitchHeightReward(speech_scorer(), reference_hz=126), batch, ref_codes=[tone(178)] * 2)
    assert rewards == pytest.approx([1, 1 - 5.483 / 5.5], abs=0.02)


def test_failed_rollouts_and_those_without_a_voice_earn_nothing():
    batch = [ids([]), ids(tone(126), truncated=True), ids([0] * 40), ids([63] * 40), ids(tone(126, 3))]
    metrics = {}
    rewards = call(PitchHeightReward(speech_scorer(5), reference_hz=126), batch, metrics)
    assert rewards == [0.0] * 5 and math.isnan(metrics["pitch_height"])


def test_a_voice_prompt_without_a_voice_is_no_row_of_this_reward():
    batch = [ids(tone(126))] * 2
    assert call(PitchHeightReward(speech_scorer()), batch, ref_codes=[[0] * 40] * 2) == [None, None]


def test_a_run_without_a_reference_frequency_needs_voice_prompts(tmp_path):
    def needed(parameters: dict) -> bool:
        (tmp_path / "reward.json").write_text(json.dumps({"whisper": {}, "pitch_height": parameters}))
        return needs_voice_prompt(load_config(tmp_path / "reward.json"), "tts")

    assert needed({"target": 2}) and not needed({"target": 2, "reference_hz": 180})


@pytest.mark.parametrize("reference_hz", [0, -100, math.nan])
def test_bad_reference(reference_hz):
    with pytest.raises(InputError, match="reference_hz: must be > 0"):
        PitchHeightReward(None, reference_hz=reference_hz)
