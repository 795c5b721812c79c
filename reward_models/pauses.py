"""Reward of the pauses: where the punctuation, or a row's pattern, has them, and nowhere else.

arXiv 2511.21270 has several plausible pause patterns of a text written by an LLM, reads the realised one off
Whisper's time stamps, and rewards an exact match with any of them. Here the match is by degrees (F1).
"""

import numpy as np

from common.cli import InputError
from speech.pitch import silences
from speech.text_marks import plain_text
from speech.word_times import Word

PAUSE_MARK = "|"  # in a pattern: "My mother, | who was late, | left."
PUNCTUATION = frozenset(",;:.!?…—–，、；：。！？")  # at the end of a word; a dash may also stand alone
CLOSING = "\"'”’»)]}*"
MIN_PAUSE_S = 0.15  # longer than the closure of a stop consonant


def punctuation_pauses(text: str) -> set[int]:
    """Indices of the words that a pause follows by the punctuation; the last word's is no pause.

    "Well, my dear Tom, go." is {0, 3}. Words are those of text.split(), so a dash by itself is one.
    """
    words = plain_text(text).split()
    return {index for index, word in enumerate(words[:-1]) if word.rstrip(CLOSING)[-1:] in PUNCTUATION}


def pattern_pauses(pattern: str, text: str) -> set[int]:
    """The same of a pattern: "My mother, | who was late, left." is {1}.

    Raises:
        InputError: its words are not the text's.
    """
    pauses, words = set(), []
    for word in plain_text(pattern).split():
        if word == PAUSE_MARK:
            pauses.add(len(words) - 1)
        else:
            words.append(word)
    if words != plain_text(text).split():
        raise InputError(
            f"column 'pauses': a pattern is the text with {PAUSE_MARK} between spaces where a pause falls (got "
            f"{pattern!r} for {text!r}). Use the words of the text"
        )
    return pauses - {-1, len(words) - 1}


def realised_pauses(wav: np.ndarray, words: list[Word]) -> set[int]:
    """Indices of the words after which the clip is silent for 0.15 s or more.

    A silence belongs to the boundary between words that is nearest to its middle: word times are off by some 60 ms.
    """
    boundaries = np.array([(before.end_s + after.start_s) / 2 for before, after in zip(words, words[1:], strict=False)])
    pauses = set()
    if len(boundaries):
        for start_s, end_s in silences(wav, MIN_PAUSE_S):
            if start_s > words[0].start_s and end_s < words[-1].end_s:
                pauses.add(int(np.abs(boundaries - (start_s + end_s) / 2).argmin()))
    return pauses


def pause_match(realised: set[int], expected: set[int]) -> float:
    """F1 of the two: {1, 4} against {1} is 2 · 1 / (2 + 1) = 0.6667; none against none is 1.

    >>> round(pause_match({1, 4}, {1}), 4), pause_match(set(), set()), pause_match(set(), {1})
    (0.6667, 1.0, 0.0)
    """
    if not realised and not expected:
        return 1.0
    return 2 * len(realised & expected) / (len(realised) + len(expected))


class PausesReward:
    """The best `pause_match` with a row's patterns, or with its punctuation, in [0, 1].

    A row without a pattern and without punctuation inside has no reward (None, which TRL leaves out). A failed
    rollout earns 0.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec and Whisper.
    """

    __name__ = "pauses"
    needs = ("codec", "whisper", "word_times")

    def __init__(self, rollout_scorer):
        self.rollout_scorer = rollout_scorer

    def __call__(self, completion_ids, text, language=None, pauses=None, log_metric=None, **_) -> list[float | None]:
        """The rewards.

        Args:
            text, language, pauses: the dataset's columns; `pauses` a list of patterns per row, or None.
        Raises:
            InputError: a pattern whose words are not the text's.
        """
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        rewards = []
        for i, patterns in enumerate(pauses or [None] * len(text)):
            expected = expected_pauses(text[i], patterns)
            words = rollouts.scores[i].words
            if expected is None:
                rewards.append(None)
            elif rollouts.failures[i] or words is None:
                rewards.append(0.0)
            else:
                realised = realised_pauses(rollouts.wavs[i], words)
                rewards.append(max(pause_match(realised, pattern) for pattern in expected))
        return rewards


def expected_pauses(text: str, patterns: list[str] | None) -> list[set[int]] | None:
    """What a rollout is compared with: the patterns, or else the punctuation, or None where there is neither."""
    if isinstance(patterns, str):  # iterating it would yield letters
        raise InputError(f"column 'pauses': expected a list of patterns per row (got {patterns!r})")
    if patterns:
        return [pattern_pauses(pattern, text) for pattern in patterns]
    punctuation = punctuation_pauses(text)
    return [punctuation] if punctuation else None
