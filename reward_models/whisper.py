"""The Whisper reward (arXiv 2509.18798) as TRL calls it, and best-of-N by it; its formulas are in reward_whisper.py."""

import numpy as np

from reward_models.parts import Part
from reward_whisper import (
    ALPHA_NLL,
    ALPHA_WER,
    LAMBDA_NLL,
    LAMBDA_WER,
    check_parameters,
    harmonic_mean,
    nll_reward,
    reward,
    wer_reward,
)
from speech.error_rate import heard_words
from speech.text_marks import plain_text

EDGE_S = 0.06  # around a word: the median error of the words' times


class WhisperReward:
    """R of `reward_whisper.reward`, in [0, 1].

    A failed rollout earns 0, the lowest: truncated, without codes, silent, or with NaN in its audio.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec and Whisper.
        alpha_wer, alpha_nll, lambda_wer, lambda_nll: see the formulas in reward_whisper.py.
    Raises:
        InputError: a parameter out of range.
    """

    __name__ = "whisper"
    needs = ("codec", "whisper")
    whole_frac = 0.5  # beside `parts`: insertions are of no word

    def __init__(
        self,
        rollout_scorer,
        alpha_wer: float = ALPHA_WER,
        alpha_nll: float = ALPHA_NLL,
        lambda_wer: float = LAMBDA_WER,
        lambda_nll: float = LAMBDA_NLL,
    ):
        self.rollout_scorer = rollout_scorer
        self.parameters = {
            "alpha_wer": alpha_wer,
            "alpha_nll": alpha_nll,
            "lambda_wer": lambda_wer,
            "lambda_nll": lambda_nll,
        }
        check_parameters(**self.parameters)

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        if log_metric is not None:
            self._log_terms(rollouts, log_metric)
        return [
            reward(score, truncated, **self.parameters)
            for score, truncated in zip(rollouts.scores, rollouts.truncated, strict=True)
        ]

    def parts(self, rollouts, i: int) -> dict[int, Part] | None:
        """Of each word of the text, R of its own WER, 0 or 1, and NLL. None where the rollout's words have no times."""
        words, text, language = rollouts.scores[i].words, rollouts.texts[i], rollouts.languages[i]
        if rollouts.failures[i] or words is None:
            return None
        heard = heard_words(plain_text(text), rollouts.scores[i].hyp_text, language)
        return {
            number: Part(self._word_reward(is_heard, word.nll), word.start_s - EDGE_S, word.end_s + EDGE_S)
            for number, (word, is_heard) in enumerate(zip(words, heard, strict=True))
        }

    def _word_reward(self, is_heard: bool, nll: float) -> float:
        r_wer = wer_reward(float(not is_heard), self.parameters["alpha_wer"])
        r_nll = nll_reward(nll, self.parameters["alpha_nll"])
        return harmonic_mean(r_wer, r_nll, self.parameters["lambda_wer"], self.parameters["lambda_nll"])

    def _log_terms(self, rollouts, log_metric) -> None:
        r_wer = [wer_reward(score.wer, self.parameters["alpha_wer"]) for score in rollouts.scores]
        r_nll = [nll_reward(score.nll, self.parameters["alpha_nll"]) for score in rollouts.scores]
        for name, values in (("r_wer", r_wer), ("r_nll", r_nll)):
            log_metric(f"{name}/mean", float(np.mean(values)))
            log_metric(f"{name}/std", float(np.std(values)))
            log_metric(f"{name}/group_std", float(rollouts.grouped(values).std(axis=1).mean()))


def best_of_n(scorer, samples, wavs, texts: list[str], languages: list[str], n: int, **parameters) -> list[int]:
    """Index of the rollout with the highest reward among each n in a row (the first, where several have it).

    Args:
        scorer: a `WhisperScorer`.
        samples: `policy.Sample`s, n of each text, one after the other.
        wavs, texts, languages: one per sample.
        parameters: those of `reward_whisper.reward`.
    Returns:
        One index per n samples.
    """
    scores = scorer.score(wavs, texts, languages)
    rewards = [reward(score, sample.truncated, **parameters) for score, sample in zip(scores, samples, strict=True)]
    return [start + int(np.argmax(rewards[start : start + n])) for start in range(0, len(rewards), n)]
