"""The Whisper reward as TRL calls it and alone, and best-of-N."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from fake_rollouts import call, ids, speech_scorer

from common.cli import InputError
from reward_models.whisper import WhisperReward, best_of_n
from reward_whisper import reward
from speech.whisper_scorer import MAX_NLL, Score

VOICE = [int(20 + 10 * math.sin(i / 3)) for i in range(40)]


def test_good_and_failed_rollouts():
    """Failures earn 0, the stated score, and each is counted."""
    batch = [ids(VOICE), ids([]), ids([0] * 10), ids(VOICE, truncated=True), ids([63] * 10), ids(VOICE[:20])]
    metrics = {}
    scores = call(WhisperReward(speech_scorer()), batch, metrics)
    # WER 0 and NLL 0.3: R_wer = 1, R_nll = e^-0.1 = 0.904837; R = 1 / (0.6 / 1 + 0.4 / 0.904837) = 0.959630
    assert scores[0] == scores[5] == pytest.approx(0.959630, abs=1e-6)
    assert scores[1:5] == [0.0, 0.0, 0.0, 0.0]
    assert metrics["frac_empty"] == metrics["frac_silent"] == metrics["frac_non_finite"] == pytest.approx(1 / 6)
    assert metrics["frac_truncated"] == pytest.approx(1 / 6)
    assert metrics["wer"] == pytest.approx(3 / 6)  # the truncated one has a perfect transcript
    assert metrics["duration_s"] == pytest.approx((40 + 0 + 10 + 40 + 10 + 20) / 6 / 50)
    # groups (0.9048, e^-20/3), (e^-20/3, 0.9048), (e^-20/3, 0.9048): each ± half the difference
    assert metrics["r_nll/group_std"] == pytest.approx((math.exp(-0.1) - math.exp(-MAX_NLL / 3)) / 2)
    assert metrics["r_wer/mean"] == pytest.approx((1 + 1 + 1 + 3 * (1 - math.tanh(3))) / 6)


def test_called_alone():
    """Without TRL: completions and texts are all it needs."""
    batch = [ids(VOICE), ids([])]
    assert WhisperReward(speech_scorer())(batch, ["hello", "hello"]) == [pytest.approx(0.959630, abs=1e-6), 0.0]
    in_german = WhisperReward(speech_scorer())(completion_ids=batch, text=["Köln", "Köln"], language=["de", "de"])
    assert in_german == [pytest.approx(0.959630, abs=1e-6), 0.0]


def test_parameters_reach_the_formulas():
    batch = [ids(VOICE), ids(VOICE)]
    # R_nll alone: e^(-0.3 / 6)
    rewards = call(WhisperReward(speech_scorer(), alpha_nll=6.0, lambda_wer=0.0, lambda_nll=1.0), batch)
    assert rewards == [pytest.approx(math.exp(-0.05))] * 2


@pytest.mark.parametrize("parameters", [{"alpha_wer": 0}, {"alpha_nll": -1}, {"lambda_wer": 0, "lambda_nll": 0}])
def test_bad_parameters_are_refused_before_the_first_batch(parameters):
    with pytest.raises(InputError, match="must"):
        WhisperReward(None, **parameters)


class ScriptedScorer:
    """A Whisper with prepared scores."""

    def __init__(self, scores: list[Score]):
        self.scores = scores

    def score(self, wavs, texts, languages):
        return self.scores


def test_best_of_n_picks_the_highest_reward_of_each_group():
    scores = [
        Score("a", 0.5, 0.5, 1, 2),
        Score("a", 0.0, 0.5, 0, 2),
        Score("a", 0.0, 0.1, 0, 2),  # the best by its numbers, but truncated
        Score("", 1.0, MAX_NLL, 2, 2, "silent"),
        Score("", 1.0, MAX_NLL, 2, 2, "empty"),
        Score("", 1.0, MAX_NLL, 2, 2, "silent"),  # three failures: the first is kept
    ]
    samples = [SimpleNamespace(truncated=truncated) for truncated in (False, False, True, False, False, False)]
    wavs = [np.zeros(1, np.float32)] * 6
    assert best_of_n(ScriptedScorer(scores), samples, wavs, ["a"] * 6, ["en"] * 6, 3) == [1, 3]


def test_best_of_n_ranks_by_the_parameters_of_the_run():
    scores = [Score("a", 0.0, 3.0, 0, 2), Score("a", 0.5, 0.0, 1, 2)]
    samples = [SimpleNamespace(truncated=False)] * 2

    def kept(**parameters) -> list[int]:
        wavs = [np.zeros(1, np.float32)] * 2
        return best_of_n(ScriptedScorer(scores), samples, wavs, ["a"] * 2, ["en"] * 2, 2, **parameters)

    assert kept(lambda_wer=1.0, lambda_nll=0.0) == [0]
    assert kept(lambda_wer=0.0, lambda_nll=1.0) == [1]
    assert reward(scores[0]) > reward(scores[1]) and kept() == [0]
