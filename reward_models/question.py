"""Reward of the final melody: F0 rises at the end of a yes-no question, and does not at the end of a statement."""

import numpy as np

from speech.pitch import PitchTrack
from speech.text_marks import plain_text

END_S = 0.08  # voiced time at the end of which the F0 is taken
BEFORE_S = (0.5, 0.25)  # and the time before the end that it is compared with
FALL_ST, RISE_ST = 0.0, 6.0  # a movement up to here is a statement's, from here on a question's
# English questions that begin with these ask for a word, not for yes or no, and fall.
WH_WORDS = frozenset("what when where which who whom whose why how".split())
CLOSING = "\"'”’»)]}*_ "  # may follow the mark that ends a sentence


def final_movement_st(track: PitchTrack) -> float:
    """F0 of the last 80 ms of voice minus that from 0.5 to 0.25 s before the end, medians; NaN without voice there.

    100 Hz that end at 141.4 Hz are 6 semitones.
    """
    if len(track.times) == 0:
        return float("nan")
    to_end = track.times[-1] - track.times
    before = track.f0[(to_end <= BEFORE_S[0]) & (to_end >= BEFORE_S[1])]
    if len(before) == 0:
        return float("nan")
    return float(np.median(track.f0[to_end < END_S]) - np.median(before))


def rise_share(movement_st: float) -> float:
    """0 for a fall, 1 for a rise of 6 semitones or more, linear between: 4.5 semitones are 0.75.

    >>> rise_share(4.5), rise_share(-3.0), rise_share(9.0)
    (0.75, 0.0, 1.0)
    """
    return float(np.clip((movement_st - FALL_ST) / (RISE_ST - FALL_ST), 0, 1))


def asks(text: str, language: str) -> bool | None:
    """True for a yes-no question, False for a statement, None for what has no such end: a question for a word, "…".

    "Did he?" is True, "He did." False, "Where is he?" and "He did," None.
    """
    end = plain_text(text).rstrip(CLOSING)[-1:]
    if end in ("?", "？", "؟"):
        first = plain_text(text).replace("¿", " ").split()[0].strip("\"'“‘(").casefold()
        return None if language == "en" and first in WH_WORDS else True
    return False if end in (".", "。", "।") else None


class QuestionReward:
    """`rise_share` of the final movement for a yes-no question, 1 minus it for a statement, in [0, 1].

    A text that is neither has no reward (None, which TRL leaves out). A failed rollout, or one without a voice in its
    last half second, earns 0.

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
        share = rise_share(movement_st)
        return share if question else 1.0 - share
