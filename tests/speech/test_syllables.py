"""Syllables of English words, of accents, and of a language without Latin letters."""

import doctest

import pytest

import speech.syllables
from speech.syllables import syllables


def test_worked_numbers_of_docstrings():
    result = doctest.testmod(speech.syllables)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Did Julia count the hotels?", 7),
        ("time", 1),
        ("little", 2),
        ("don't", 1),
        ("the", 1),
        ("5", 1),
        ("Él comió.", 3),
        ("今天很好。", 4),
        ("—", 1),
    ],
)
def test_syllables(text, count):
    assert syllables(text) == count
