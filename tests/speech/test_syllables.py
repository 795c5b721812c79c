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
        ("été", 2),
        ("un cafe\u0301", 3),  # the accent a character of its own
        ("ブルーベリー", 6),
        ("私はiPhoneを買った。", 8),  # six kana and kanji, and i-Phon
        ("한국어", 3),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165", 3),  # the same in letters of their own
        ("bønder", 2),
        ("mən gəl", 2),
        ("ɗan", 1),
        ("kɔ́lɔ́ngɔnɔ", 4),
        ("gbọ́n", 1),
        ("a ﬁne 3", 3),
    ],
)
def test_syllables(text, count):
    assert syllables(text) == count
