"""Reward of the speaking rate: a dead zone around a target, the voice prompt's, or the group's median."""

import numpy as np

from common.averages import mean_of_known
from common.cli import InputError
from speech.syllables import syllables
from speech.text_marks import plain_text
from speech.tokens import CODES_PER_SECOND

DEAD_ZONE = 1.15  # a rate up to this factor from the target is as good as the target
ZERO_AT = 2.0  # twice or half the target's rate earns nothing


def rate_reward(rate: float, target: float, dead_zone: float = DEAD_ZONE) -> float:
    """1 within a factor `dead_zone` of the target, then falling in the logarithm of the rate to 0 at a factor of 2.

    1.5 times the target, dead zone 1.15: ln(1.5 / 1.15) / ln(2 / 1.15) = 0.2657 / 0.5534 = 0.4801 lost, 0.5199.

    >>> round(rate_reward(6.0, 4.0), 4)
    0.5199
    """
    off = abs(np.log(rate / target))
    return float(np.clip(1 - (off - np.log(dead_zone)) / np.log(ZERO_AT / dead_zone), 0, 1))


class RateReward:
    """`rate_reward` of the syllables a second, in [0, 1].

    The target is `target`, or else the voice prompt's rate, or else the group's median. A failed rollout earns 0 and is
    not part of the median. A group in which all failed earns 0.

    How a slow target is hacked: with silence, which counts as time; evaluation and `pauses` show it.

    Args:
        rollout_scorer: a `SpeechRolloutScorer`; no model of it is used.
        dead_zone: factor.
        target: syllables a second, for a slow or a fast style.
    Raises:
        InputError: a dead zone that is not between 1 and 2, a target that is not above 0.
    """

    __name__ = "rate"
    needs = ()

    def __init__(self, rollout_scorer, dead_zone: float = DEAD_ZONE, target: float | None = None):
        if not 1 <= dead_zone < ZERO_AT:
            raise InputError(f"dead_zone: must be >= 1 and < {ZERO_AT:g}, a factor (got {dead_zone})")
        if target is not None and not target > 0:
            raise InputError(f"target: must be > 0, syllables a second (got {target})")
        self.rollout_scorer, self.dead_zone, self.target = rollout_scorer, dead_zone, target

    def __call__(
        self, completion_ids, text, language=None, ref_text=None, ref_codes=None, log_metric=None, **_
    ) -> list[float]:
        """The rewards.

        Args:
            text, language: the dataset's columns.
            ref_text, ref_codes: transcript and codes of each row's voice prompt; empty or None in a row without one.
        """
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        rates = np.full(len(text), np.nan)
        for i, codes in enumerate(rollouts.codes):
            if rollouts.failures[i] is None:
                rates[i] = syllables(plain_text(text[i])) * CODES_PER_SECOND / len(codes)
        if log_metric is not None:
            log_metric("syllable_rate", mean_of_known(rates))
        rewards = []
        for first in range(0, len(text), rollouts.group_size):
            group = rates[first : first + rollouts.group_size]
            spoken = group[np.isfinite(group)]
            if self.target is not None:
                target = self.target
            elif ref_text and ref_codes and ref_text[first] and ref_codes[first]:
                target = syllables(plain_text(ref_text[first])) * CODES_PER_SECOND / len(ref_codes[first])
            else:
                target = float(np.median(spoken)) if len(spoken) else 1.0
            rewards += [0.0 if np.isnan(rate) else rate_reward(rate, target, self.dead_zone) for rate in group]
        return rewards
