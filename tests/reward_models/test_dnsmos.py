"""DNSMOS as a reward: worked numbers, failures, metrics, one pass a batch."""

import doctest

import numpy as np
import pytest
from fake_rollouts import call, ids, speech_scorer

import reward_models.dnsmos
from reward_models import build_rewards, load_config
from reward_models.dnsmos import DnsmosReward
from speech.audio import audio_failure
from speech.dnsmos import MosScores


class LoudnessDnsmos:
    """OVRL 3 for a clip that can be scored."""

    def __init__(self):
        self.calls = 0

    def score(self, wavs):
        self.calls += 1
        return [None if audio_failure(wav) else MosScores(3.0, 3.5, 4.0) for wav in wavs]


def mos_scorer():
    scorer = speech_scorer()
    scorer.dnsmos = LoudnessDnsmos()
    return scorer


def test_worked_numbers():
    assert doctest.testmod(reward_models.dnsmos).failed == 0
    assert doctest.testmod(reward_models.dnsmos).attempted >= 2
    assert reward_models.dnsmos.quality_reward(MosScores(6.0, 1.0, 1.0)) == 1.0


def test_failed_rollouts_earn_nothing():
    metrics = {}
    batch = [ids([20] * 30), ids([]), ids([20] * 30, truncated=True), ids([63] * 9), ids([0] * 9), ids([9] * 30)]
    assert call(DnsmosReward(mos_scorer()), batch, metrics) == [0.5, 0.0, 0.0, 0.0, 0.0, 0.5]
    assert (metrics["dnsmos_ovrl"], metrics["dnsmos_sig"], metrics["dnsmos_bak"]) == (3.0, 3.5, 4.0)
    call(DnsmosReward(mos_scorer()), [ids([])] * 2, metrics)
    assert np.isnan(metrics["dnsmos_ovrl"])


def test_a_batch_is_scored_once():
    scorer = mos_scorer()
    rewards, weights = build_rewards(load_config("reward_models/dnsmos.json"), scorer)
    batch = [ids([20] * 30), ids([21] * 30)]
    assert [call(reward, batch)[0] for reward in rewards] == [pytest.approx(0.95963, abs=1e-5), 0.5]
    assert scorer.dnsmos.calls == 1 and weights == [1.0, 0.3]
