"""Pauses: where the punctuation or a pattern has them, where a clip has them, and how well the two agree."""

import numpy as np

from common.cli import InputError
from speech.pitch import STEP_S, silences
from speech.text_marks import CLOSING, plain_text
from speech.tokens import SAMPLE_RATE
from speech.word_times import Word

PAUSE_MARK = "|"  # in a pattern: "My mother, | who was late, | left."
PUNCTUATION = frozenset(",;:.!?…—–，、；：。！？．｡،؛؟۔।፣፤።፧")  # at the end of a word; a dash may also stand alone
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


def num_pauses(wav: np.ndarray) -> int:
    """How often the clip is silent for 0.15 s or more, silence at its edges not counted."""
    duration_s = len(wav) / SAMPLE_RATE
    inner = [(start_s, end_s) for start_s, end_s in silences(wav, MIN_PAUSE_S) if start_s > 0]
    return sum(end_s < duration_s - STEP_S for _, end_s in inner)


def pause_match(realised: set[int], expected: set[int]) -> float:
    """F1 of the two: {1, 4} against {1} is 2 · 1 / (2 + 1) = 0.6667; none against none is 1.

    >>> round(pause_match({1, 4}, {1}), 4), pause_match(set(), set()), pause_match(set(), {1})
    (0.6667, 1.0, 0.0)
    """
    if not realised and not expected:
        return 1.0
    return 2 * len(realised & expected) / (len(realised) + len(expected))


def expected_pauses(text: str, patterns: list[str] | None) -> list[set[int]] | None:
    """What a rollout is compared with: the patterns, or else the punctuation, or None where there is neither."""
    if isinstance(patterns, str):  # iterating it would yield letters
        raise InputError(f"column 'pauses': expected a list of patterns per row (got {patterns!r})")
    if patterns:
        return [pattern_pauses(pattern, text) for pattern in patterns]
    punctuation = punctuation_pauses(text)
    return [punctuation] if punctuation else None
