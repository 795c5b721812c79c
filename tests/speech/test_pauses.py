"""Pauses: read off the punctuation, a pattern and the audio, and how well they agree."""

import doctest

import numpy as np
import pytest
from fake_rollouts import speech_scorer

import speech.pauses
from common.cli import InputError
from speech.pauses import num_pauses, pattern_pauses, pause_match, punctuation_pauses, realised_pauses
from speech.word_times import Word

TEXT = "Well, my dear."
HUM = [30] * 20  # 0.4 s
WORDS = tuple(Word(word, 0.5 * n, 0.5 * n + 0.5) for n, word in enumerate(TEXT.split()))


def test_worked_numbers_of_docstrings():
    result = doctest.testmod(speech.pauses)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("text", "pauses"),
    [
        ("Well, my dear Tom, go.", {0, 3}),
        ('"Well," he *said*; "go!"', {0, 2}),
        ("No pause here.", set()),
        ("So — no", {1}),
        ("你好，世界。", set()),
        ("„Komm,“ sagte er.", {0}),
        ("نعم، قال", {0}),
        ("वह आया। मैं गया।", {1}),
    ],
)
def test_punctuation(text, pauses):
    assert punctuation_pauses(text) == pauses


def test_patterns():
    assert pattern_pauses("Well, my | dear.", TEXT) == {1}
    assert pattern_pauses("Well, my dear. |", TEXT) == set()
    assert pattern_pauses("Well, | *my* dear.", "Well, my *dear*.") == {0}
    with pytest.raises(InputError, match="column 'pauses': a pattern is the text with |"):
        pattern_pauses("Well | my dear.", TEXT)


def test_match_by_hand():
    assert pause_match({1, 4}, {1}) == pytest.approx(2 / 3)
    assert pause_match(set(), set()) == 1
    assert pause_match(set(), {1}) == pause_match({2}, set()) == pause_match({2}, {1}) == 0


def test_realised_pauses():
    [wav] = speech_scorer().codec.decode([HUM + [0] * 10 + HUM + [0] * 5 + HUM])  # silent from 0.4 to 0.6, 1.0 to 1.1
    assert realised_pauses(wav, list(WORDS)) == {0}
    [wav] = speech_scorer().codec.decode([[0] * 10 + HUM * 3 + [0] * 10])  # before the first word, after the last
    words = [Word("a", 0.2, 0.8), Word("b", 0.8, 1.4)]
    assert realised_pauses(wav, words) == set()
    assert realised_pauses(wav, words[:1]) == set()
    # Silent from 0.6 to 0.8 s. Between the first two words, 0.3 to 0.7 s, the boundary is at 0.5 s, nearer than at 1 s
    [wav] = speech_scorer().codec.decode([[30] * 30 + [0] * 10 + [30] * 20])
    assert realised_pauses(wav, [Word("a", 0.0, 0.3), Word("b", 0.7, 1.0), Word("c", 1.0, 1.2)]) == {0}


def test_silence_is_no_speech():
    assert realised_pauses(np.zeros(16_000, np.float32), list(WORDS)) == set()


def test_pauses_inside_a_clip_are_counted():
    """Silent for 0.2 s, then hums with gaps of 0.2, 0.1 and 0.3 s between, and silent at the end: two pauses."""
    quiet = [0] * 10
    [wav] = speech_scorer().codec.decode([quiet + HUM + quiet + HUM + [0] * 5 + HUM + [0] * 15 + HUM + quiet])
    assert num_pauses(wav) == 2
    assert num_pauses(np.zeros(16_000, np.float32)) == num_pauses(np.zeros(0, np.float32)) == 0
