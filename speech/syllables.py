"""Syllables of a text, by its spelling."""

import re
import unicodedata

_VOWELS = re.compile("[aeiouyæøœıəɛɔɨʉɩʊ]+")
_SILENT_E = re.compile(r"(?<=[^aeiouyl\W])e$")  # not the é of café
_LETTER = "[a-zß-öø-ʯ\u0300-\u036fḁ-ỿ]"  # with those of Azerbaijani and Hausa, and accents that do not compose
_LATIN = re.compile(f"({_LETTER}+(?:['’]{_LETTER}+)?)")


def syllables(text: str) -> int:
    """Groups of vowel letters, at least one a word; what is not written in Latin letters counts its letters and digits.

    An estimate, right for most English words: "Did Julia count the hotels?" has 1 + 2 + 1 + 1 + 2 = 7 (Ju-lia).

    >>> syllables("Did Julia count the hotels?"), syllables("time"), syllables("今天很好。")
    (7, 1, 4)
    """
    count = 0
    for number, part in enumerate(_LATIN.split(unicodedata.normalize("NFKC", text).lower())):
        if number % 2:  # a Latin word
            bare = unicodedata.normalize("NFD", _SILENT_E.sub("", part))
            count += len(_VOWELS.findall(re.sub("[\u0300-\u036f]", "", bare))) or 1
        else:
            count += len(re.findall(r"[^\W_]", part))
    return max(count, 1)
