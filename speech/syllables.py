"""Syllables of a text, by its spelling."""

import re
import unicodedata

_VOWELS = re.compile(r"[aeiouy]+")
_SILENT_E = re.compile(r"(?<=[^aeiouyl\W])e$")


def syllables(text: str) -> int:
    """Groups of vowel letters, at least one a word; a word without Latin letters counts its letters.

    An estimate, right for most English words: "Did Julia count the hotels?" has 1 + 2 + 1 + 1 + 2 = 7 (Ju-lia).

    >>> syllables("Did Julia count the hotels?"), syllables("time"), syllables("今天很好。")
    (7, 1, 4)
    """
    count = 0
    for word in re.findall(r"[^\W_]+(?:['’][^\W_]+)?", text):
        bare = unicodedata.normalize("NFD", word.casefold())
        if re.search("[a-z]", bare):
            latin = re.sub("[^a-z]", "", bare)
            count += len(_VOWELS.findall(_SILENT_E.sub("", latin))) or 1
        else:
            count += len(word)
    return max(count, 1)
