"""Emphasis marks in a text: `*so*` asks for emphasis on the word so. They are for the policy, and are no words."""

import re

# One word between two asterisks that touch it, with no letter, digit or asterisk on their outer sides. It may end in
# what \w does not have: a vowel sign (*नहीं*), an accent of its own, a full stop (*Mr.*). No brackets: f(*args)* 2.
_MARKED = re.compile(r"(?<![\w*])\*(\w[^\s*()\[\]{}|]*)\*(?![\w*])")

# May follow the mark that ends a sentence or a clause; German closes with “ and «
CLOSING = "\"'”’»“‘«›‹)]}」』）】》〉*_ "


def plain_text(text: str) -> str:
    """The text without its marks: 'I *never* said 2*3.' is 'I never said 2*3.'; other asterisks stay."""
    return _MARKED.sub(r"\1", text)


def marked_words(text: str) -> list[int]:
    """Indices, among the words of `plain_text(text).split()`, of those with a mark: [1] for 'I *never* said 2*3.'."""
    return [index for index, word in enumerate(text.split()) if _MARKED.search(word)]
