"""Rewards: formulas by hand, stated scores for failures, configs, one set of rollouts for all."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from reward_models import REWARDS, build_rewards, load_config
from reward_models.prosody import DurationReward, LogF0SpreadReward, duration_reward
from reward_models.rollouts import SpeechRolloutScorer
from reward_whisper import harmonic_mean
from speech.measures import is_repetitive, log_f0_std
from speech.tokens import HOP_LENGTH, SAMPLE_RATE, SpeechTokens
from speech.whisper_scorer import MAX_NLL, Score

TOKENS = SpeechTokens(start_id=0, end_id=1, first_code_id=10, num_codes=64, num_text_ids=0, text_end_id=2)


@dataclass
class HummingCodec:
    """A code is 20 ms of a tone; code 0 is silence and code 63 breaks the decoder."""

    codebook_size: int = 64
    decoded: list = field(default_factory=list)
    device: torch.device = torch.device("cpu")

    def decode(self, codes):
        self.decoded.append(len(codes))
        return [self._hum(np.array(ids)) for ids in codes]

    def _hum(self, ids: np.ndarray) -> np.ndarray:
        f0 = np.repeat(100.0 + 2 * ids, HOP_LENGTH)
        wav = 0.3 * np.sin(2 * np.pi * np.cumsum(f0) / SAMPLE_RATE) * np.repeat(ids > 0, HOP_LENGTH)
        wav[np.repeat(ids == 63, HOP_LENGTH)] = np.nan
        return wav.astype(np.float32)


class PerfectScorer:
    """Hears every text right, or nothing where there is nothing to hear."""

    def __init__(self):
        self.calls = 0

    def score(self, wavs, texts, languages):
        from speech.audio import audio_failure

        self.calls += 1
        return [
            Score("", 1.0, MAX_NLL, 4, 4, failure) if (failure := audio_failure(wav)) else Score(text, 0.0, 0.3, 0, 4)
            for wav, text in zip(wavs, texts, strict=True)
        ]


@pytest.fixture
def listener():
    return SpeechRolloutScorer(TOKENS, HummingCodec(), PerfectScorer(), group_size=2)


def ids(codes: list[int], ended: bool = True) -> list[int]:
    return TOKENS.ids(codes) + ([TOKENS.end_id] if ended else [])


def call(reward, completion_ids, metrics=None, **columns):
    log = (metrics if metrics is not None else {}).__setitem__
    texts = columns.pop("text", ["hello"] * len(completion_ids))
    return reward(
        prompts=[],
        completions=[],
        completion_ids=completion_ids,
        text=texts,
        log_metric=log,
        log_extra=None,
        trainer_state=None,
        **columns,
    )


def test_whisper_reward_of_good_and_failed_rollouts(listener):
    """Failures earn 0, the stated score, and each is counted."""
    voice = [int(20 + 10 * math.sin(i / 3)) for i in range(40)]
    batch = [ids(voice), ids([]), ids([0] * 10), ids(voice, ended=False), ids([63] * 10), ids(voice[:20])]
    rewards, weights = build_rewards("reward_models/whisper.json", listener)
    metrics = {}
    scores = call(rewards[0], batch, metrics)
    # WER 0 and NLL 0.3: R_wer = 1, R_nll = e^-0.1 = 0.904837; R = 1 / (0.6 / 1 + 0.4 / 0.904837) = 0.959630
    assert scores[0] == scores[5] == pytest.approx(0.959630, abs=1e-6)
    assert scores[1:5] == [0.0, 0.0, 0.0, 0.0]
    assert weights == [1.0]
    assert metrics["frac_empty"] == metrics["frac_silent"] == metrics["frac_non_finite"] == pytest.approx(1 / 6)
    assert metrics["frac_truncated"] == pytest.approx(1 / 6)
    assert metrics["wer"] == pytest.approx(3 / 6)  # the unended one was understood
    assert metrics["duration_s"] == pytest.approx((40 + 0 + 10 + 40 + 10 + 20) / 6 / 50)
    # groups (0.9048, e^-20/3), (e^-20/3, 0.9048), (e^-20/3, 0.9048): each ± half the difference
    assert metrics["r_nll/group_std"] == pytest.approx((math.exp(-0.1) - math.exp(-MAX_NLL / 3)) / 2)


def test_everything_empty_is_scored_too(listener):
    rewards, _ = build_rewards("reward_models/prosody_reward.json", listener)
    batch = [ids([])] * 4
    assert [call(reward, batch) for reward in rewards] == [[0.0] * 4, [-1.0] * 4, [0.0] * 4]


def test_rewards_share_one_batch_of_rollouts(listener):
    rewards, weights = build_rewards("reward_models/prosody_reward.json", listener)
    batch = [ids([20 + i % 7 for i in range(30)]) for _ in range(4)]
    for reward in rewards:
        call(reward, batch)
    assert listener.codec.decoded == [4] and listener.scorer.calls == 1
    call(rewards[0], list(batch))  # the next batch, though equal, is another one
    assert listener.codec.decoded == [4, 4] and listener.scorer.calls == 2
    assert weights == [1.0, 0.2, 0.5]


def test_ours_raises(listener):
    rewards, _ = build_rewards("reward_models/whisper.json", listener)
    with pytest.raises(ValueError, match="outside the speech codes"):
        call(rewards[0], [[5], ids([1])])
    with pytest.raises(ValueError, match="not of one prompt"):
        call(rewards[0], [ids([1]), ids([1])], text=["a", "b"])
    with pytest.raises(ValueError, match="groups of 2"):
        call(rewards[0], [ids([1])] * 3)
    with pytest.raises(ValueError, match="do not belong together"):
        SpeechRolloutScorer(TOKENS, HummingCodec(codebook_size=65), PerfectScorer(), 2)


def test_duration_reward_by_hand():
    # T_m = 50: -10/50, 0, -10/50;  T_m = (20+30)/2 = 25: -15/25, -5/25, -5/25, -75/25
    assert duration_reward(np.array([[40, 50, 60]]))[0].tolist() == [-0.2, 0.0, -0.2]
    assert duration_reward(np.array([[10, 20, 30, 100]]))[0] == pytest.approx([-0.6, -0.2, -0.2, -3.0])
    assert duration_reward(np.array([[0, 0, 9]]))[0].tolist() == [-1.0, -1.0, -1.0]


def test_duration_reward_is_per_group(listener):
    batch = [ids([1] * n) for n in (10, 30, 7, 7)]
    assert call(DurationReward(listener), batch) == [-0.5, -0.5, 0.0, 0.0]


def test_log_f0_std_of_known_contours():
    """A tone that swings evenly by ±20 % in ln F0 has a standard deviation of 0.2 / √2 = 0.1414."""
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    for swing in (0.0, 0.2):
        f0 = 150 * np.exp(swing * np.sin(2 * np.pi * t))
        phase = 2 * np.pi * np.cumsum(f0) / SAMPLE_RATE
        wav = sum(np.sin(k * phase) / k for k in range(1, 6)) * 0.1
        assert log_f0_std(wav.astype(np.float32)) == pytest.approx(swing / math.sqrt(2), abs=0.01)
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
    assert math.isnan(log_f0_std(np.zeros(SAMPLE_RATE, np.float32)))
    assert math.isnan(log_f0_std(noise[:100]))


def test_log_f0_spread_reward(listener):
    swinging = [int(30 + 12 * math.sin(i / 5)) for i in range(60)]
    batch = [ids(swinging), ids([30] * 60), ids(swinging, ended=False), ids([])]
    rewards = call(LogF0SpreadReward(listener, ceiling=0.3), batch)
    assert rewards[0] > rewards[1] + 0.03
    assert rewards[2:] == [0.0, 0.0]
    ceiling = call(LogF0SpreadReward(listener, ceiling=0.01), batch)
    assert ceiling[0] == 0.01


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([5] * 25, True),
        ([5] * 24, False),
        ([1, 2, 3] * 9, True),
        ([1, 2, 3] * 8, False),
        (list(range(60)), False),
        ([], False),
        ([1], False),
        (list(range(20)) + [7] * 25, True),
    ],
)
def test_repetition(codes, expected):
    assert is_repetitive(codes) is expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"whisper": {"lamda_wer": 1}}, "unknown key 'lamda_wer'. Did you mean 'lambda_wer'?"),
        ({"wisper": {}}, "unknown key 'wisper'. Did you mean 'whisper'?"),
        ({"whisper": {"alpha_wer": "3"}}, "alpha_wer must be a number"),
        ({"whisper": {"alpha_wer": True}}, "alpha_wer must be a number"),
        ({"whisper": 1}, "whisper must be an object"),
        ([], "expected an object"),
        ({}, "expected an object"),
    ],
)
def test_bad_configs(tmp_path, config, message):
    path = tmp_path / "reward.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        load_config(path)
    assert str(path) in str(error.value)


class Moved:
    """Stands for a model: keeps where it was moved to."""

    def __init__(self):
        self.places = []

    def to(self, device):
        self.places.append(device.type)


def test_offloaded_models_are_on_their_device_only_while_they_listen():
    codec, scorer = HummingCodec(device=torch.device("meta")), PerfectScorer()
    codec.model, scorer.model = Moved(), Moved()
    decode, seen = codec.decode, []
    codec.decode = lambda codes: seen.append(codec.device.type) or decode(codes)
    listener = SpeechRolloutScorer(TOKENS, codec, scorer, 2, offload=True)
    assert codec.model.places == scorer.model.places == ["cpu"]
    hear = [ids([5] * 20), ids([9] * 20)], ["a", "a"], None, lambda name, value: None
    listener.hear(*hear)
    listener.hear(*hear)  # heard already: nothing moves
    assert seen == ["meta"]
    assert codec.model.places == scorer.model.places == ["cpu", "meta", "cpu"]
    assert codec.device.type == scorer.device.type == "cpu"


def test_bad_config_files_and_values(tmp_path, listener):
    with pytest.raises(ValueError, match="no reward config"):
        load_config(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{whisper}")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(tmp_path / "text.json")
    (tmp_path / "zero.json").write_text('{"whisper": {"alpha_nll": 0}}')
    with pytest.raises(ValueError, match="alpha"):
        build_rewards(tmp_path / "zero.json", listener)


def test_every_reward_has_a_name_of_its_own():
    classes = [cls for rewards in REWARDS.values() for cls in rewards.values()]
    assert len({cls.__dict__["__name__"] for cls in classes}) == len(classes)


def test_a_reward_of_the_other_task_is_named(tmp_path):
    with pytest.raises(ValueError, match="asr_rules is a reward of --task asr, this is --task tts"):
        load_config("reward_models/asr_rules.json")
    with pytest.raises(ValueError, match="whisper is a reward of --task tts, this is --task asr"):
        load_config("reward_models/prosody_reward.json", "asr")
    assert harmonic_mean(1.0, 1.0) == 1.0
