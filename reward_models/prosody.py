"""Rewards that keep the prosody natural beside an intelligibility reward (arXiv 2509.18569, R2 and R3).

A policy rewarded for intelligibility alone learns to speak slowly and flatly (arXiv 2509.18531 reports a collapse of
pitch with the WER + NLL reward on this very model).
"""

import math

import numpy as np

from common.cli import InputError

LOG_F0_STD_CEILING = 0.3  # natural-log units; read speech has 0.15 to 0.3


def duration_reward(lengths: np.ndarray) -> np.ndarray:
    """R2_i = −| |o_i| − T_m | / T_m, T_m the median length of the group, in (−∞, 0] (arXiv 2509.18569, §3.2).

    Lengths 40, 50, 60: T_m = 50, rewards −0.2, 0, −0.2. A group whose median is 0 has no speech: all −1.

    Args:
        lengths: codes per rollout, shape (prompts, group_size).
    Returns:
        The rewards, of the same shape.
    """
    median = np.median(lengths, axis=1, keepdims=True)
    return np.where(median > 0, -np.abs(lengths - median) / np.maximum(median, 1), -1.0)


def log_f0_rewards(rollouts, ceiling: float) -> list[float]:
    """min(std of ln F0, ceiling) of each rollout; 0 without voiced frames or where the rollout failed."""
    return [
        0.0 if failure or math.isnan(std) else min(std, ceiling)
        for std, failure in zip(rollouts.log_f0_stds, rollouts.failures, strict=True)
    ]


def check_ceiling(ceiling: float) -> None:
    if not 0 < ceiling < math.inf:
        raise InputError(f"ceiling: must be finite and > 0 (got {ceiling})")


class DurationReward:
    """`duration_reward` of the number of codes: keeps the policy from slowing down or rushing.

    Args:
        rollout_scorer: a `SpeechRolloutScorer`; no model of it is used.
    """

    __name__ = "duration"
    needs = ()

    def __init__(self, rollout_scorer):
        self.rollout_scorer = rollout_scorer

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        lengths = rollouts.grouped([len(codes) for codes in rollouts.codes])
        return duration_reward(lengths).flatten().tolist()


class LogF0SpreadReward:
    """Spread of ln F0, the second term of R3; see `log_f0_rewards`.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec.
        ceiling: in natural-log units; spread beyond it comes from octave errors and voice breaks, and earns nothing.
    Raises:
        InputError: a ceiling that is not above 0.
    """

    __name__ = "log_f0_spread"
    needs = ("codec",)

    def __init__(self, rollout_scorer, ceiling: float = LOG_F0_STD_CEILING):
        check_ceiling(ceiling)
        self.rollout_scorer, self.ceiling = rollout_scorer, ceiling

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        return log_f0_rewards(self.rollout_scorer.score(completion_ids, text, language, log_metric), self.ceiling)
