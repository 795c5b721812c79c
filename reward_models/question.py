"""Reward of the final melody: F0 rises at the end of a yes-no question, and does not at the end of a statement."""

import math

import numpy as np

from reward_models.parts import Part
from speech.melody import asks, final_movement_st, rise_score
from speech.tokens import CODES_PER_SECOND

END_PART_S = 0.6  # a final rise and the silence behind it


class QuestionReward:
    """`rise_score` of the final movement for a yes-no question, 1 minus it for a statement, in [0, 1].

    A text that is neither has no reward (None, which TRL leaves out). A failed rollout, or one without a voice
    in the 2 to 0.25 s before its last voice, earns 0.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec.
    """

    __name__ = "question"
    needs = ("codec",)

    def __init__(self, rollout_scorer):
        self.rollout_scorer = rollout_scorer

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float | None]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        return [self._reward(rollouts, i) for i in range(len(text))]

    def _reward(self, rollouts, i: int) -> float | None:
        question = asks(rollouts.texts[i], rollouts.languages[i])
        if question is None:
            return None
        movement_st = float("nan") if rollouts.failures[i] else final_movement_st(rollouts.pitch_track(i))
        if np.isnan(movement_st):
            return 0.0
        score = rise_score(movement_st)
        return score if question else 1.0 - score

    def parts(self, rollouts, i: int) -> dict[str, Part] | None:
        """The end, with the reward. None where the reward does not concern the rollout, or it failed."""
        value = self._reward(rollouts, i)
        if value is None or rollouts.failures[i]:
            return None
        seconds = len(rollouts.codes[i]) / CODES_PER_SECOND
        return {"end": Part(value, seconds - END_PART_S, math.inf)}
