"""One batch of rollouts for all rewards: computed once, samples, offloaded models, and bugs, which raise."""

import math

import pytest
import torch
from fake_rollouts import TOKENS, HummingCodec, Moved, PerfectScorer, call, ids, speech_scorer

from common.cli import InputError
from reward_models import build_rewards, load_config
from reward_models.rollouts import SpeechRolloutScorer
from reward_models.whisper import WhisperReward
from speech.measures import log_f0_std


def prosody_rewards(rollout_scorer) -> tuple[list, list[float]]:
    return build_rewards(load_config("reward_models/prosody_reward.json"), rollout_scorer)


def test_everything_empty_is_scored_too():
    rewards, _ = prosody_rewards(speech_scorer())
    batch = [ids([])] * 4
    assert [call(reward, batch) for reward in rewards] == [[0.0] * 4, [-1.0] * 4, [0.0] * 4]


def test_rewards_share_one_batch_of_rollouts():
    scorer = speech_scorer()
    rewards, weights = prosody_rewards(scorer)
    batch = [ids([20 + i % 7 for i in range(30)]) for _ in range(4)]
    for reward in rewards:
        call(reward, batch)
    assert scorer.codec.decoded == [4] and scorer.whisper.calls == 1
    call(rewards[0], list(batch))  # the next batch, though equal, is another one
    assert scorer.codec.decoded == [4, 4] and scorer.whisper.calls == 2
    assert weights == [1.0, 0.2, 0.5]


def test_metrics_are_logged_once_a_batch():
    scorer, logged = speech_scorer(), []
    batch = [ids([20] * 30), ids([21] * 30)]
    for _ in range(2):
        scorer.score(batch, ["a", "a"], None, lambda name, value: logged.append(name))
    assert len(logged) == len(set(logged)) > 5


def test_metrics_of_a_batch_by_hand():
    """F0 is measured in the first rollout of each group; the perfect transcripts have four words each."""
    scorer = speech_scorer()
    swinging = [int(30 + 12 * math.sin(i / 5)) for i in range(60)]
    rollouts = scorer.score([ids(swinging), ids([30] * 60), ids([]), ids(swinging)], ["a", "a", "b", "b"], None)
    expected = log_f0_std(scorer.codec.decode([swinging])[0])
    assert expected > 0.05 and rollouts.metrics()["log_f0_std"] == pytest.approx(expected)
    assert rollouts.edits_and_ref_length() == (4, 16)


def test_bugs_raise_instead_of_scoring():
    reward = WhisperReward(speech_scorer())
    with pytest.raises(ValueError, match="outside the speech codes"):
        call(reward, [[5], ids([1])])
    with pytest.raises(ValueError, match="not of one prompt"):
        call(reward, [ids([1]), ids([1])], text=["a", "b"])
    with pytest.raises(ValueError, match="groups of 2"):
        call(reward, [ids([1])] * 3)
    with pytest.raises(ValueError, match="needs a codec"):
        SpeechRolloutScorer(TOKENS, None, PerfectScorer(), 2)


def test_a_reward_that_drops_the_language_raises():
    """The first reward of a batch scores it for all."""
    german, batch = {"text": ["ja", "ja"], "language": ["de", "de"]}, [ids([20] * 30), ids([21] * 30)]
    scorer = speech_scorer()
    with pytest.raises(TypeError, match="language"):
        scorer.score(batch, german["text"])
    scorer.score(batch, german["text"], None)
    with pytest.raises(ValueError, match="text, language: must be those of the rows"):
        call(WhisperReward(scorer), batch, **german)


def test_no_reward_can_change_what_the_others_hear():
    scorer = speech_scorer()
    [wav, _] = scorer.score([ids([20] * 30), ids([21] * 30)], ["a", "a"], None).wavs
    with pytest.raises(ValueError, match="read-only"):
        wav -= wav.mean()


def test_another_codebook_is_an_input_error():
    with pytest.raises(InputError, match="the codec has 65 codes and the policy has 64"):
        SpeechRolloutScorer(TOKENS, HummingCodec(codebook_size=65), PerfectScorer(), 2)


def test_last_samples():
    scorer = speech_scorer()
    assert scorer.last_samples(3) == []
    batch = [ids([20] * 30), ids([]), ids([20] * 30, truncated=True), ids([63] * 5)]
    scorer.score(batch, ["a", "a", "b", "b"], None)
    samples = scorer.last_samples(9)
    assert [record["failure"] for record, _ in samples] == [None, "empty", "truncated", "non_finite"]
    assert [record["transcript"] for record, _ in samples] == ["a", "", "b", ""]
    assert [None if wav is None else len(wav) for _, wav in samples] == [30 * 320, None, 30 * 320, None]
    assert len(scorer.last_samples(1)) == 1


def test_offloaded_models_are_on_their_device_only_while_they_score():
    codec, whisper = HummingCodec(device=torch.device("meta")), PerfectScorer()
    codec.model, whisper.model = Moved(), Moved()
    decode, seen = codec.decode, []
    codec.decode = lambda codes: seen.append(codec.device.type) or decode(codes)
    scorer = SpeechRolloutScorer(TOKENS, codec, whisper, 2, offload=True)
    assert codec.model.devices == whisper.model.devices == ["cpu"]
    batch = [ids([5] * 20), ids([9] * 20)]
    scorer.score(batch, ["a", "a"], None)
    scorer.score(batch, ["a", "a"], None)  # scored already: nothing moves
    assert seen == ["meta"]
    assert codec.model.devices == whisper.model.devices == ["cpu", "meta", "cpu"]
    assert codec.device.type == whisper.device.type == "cpu"
