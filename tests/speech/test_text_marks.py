"""Marks of emphasis: found, taken off, and no words to the error rate; other asterisks stay."""

import pytest

from speech.error_rate import error_rate
from speech.text_marks import marked_words, plain_text


@pytest.mark.parametrize(
    "text, plain, marked",
    [
        ("I *never* said so.", "I never said so.", [1]),
        ("*You* did *it*!", "You did it!", [0, 2]),
        ('He said "*no*," twice.', 'He said "no," twice.', [2]),
        ("They *don't* use a *well-known* one.", "They don't use a well-known one.", [1, 4]),
        ("Is it *5*?", "Is it 5?", [2]),
        ("Él *sí* vino.", "Él sí vino.", [1]),
        ("मैंने *नहीं* कहा।", "मैंने नहीं कहा।", [1]),  # ends in a sign that is no letter to Python
        ("Un *cafe\u0301* noir.", "Un cafe\u0301 noir.", [1]),
        ("f(*args)* 2", "f(*args)* 2", []),
        ("*Mr.* Smith *never,* ever", "Mr. Smith never, ever", [0, 2]),
        ("no marks", "no marks", []),
        ("", "", []),
    ],
)
def test_marks(text, plain, marked):
    assert plain_text(text) == plain
    assert marked_words(text) == marked


@pytest.mark.parametrize(
    "text", ["2*3", "2*3*4 is 24", "2 * 3 * 4", "a* b", "*b", "five stars *****", "**bold**", "* a *", "*two words*"]
)
def test_other_asterisks_stay(text):
    assert plain_text(text) == text
    assert marked_words(text) == []


@pytest.mark.parametrize("text", ["I *never* said so.", "It *doesn't* cost *five* dollars.", "*Mr.* Smith"])
def test_a_mark_is_no_word_error(text):
    assert error_rate(text, plain_text(text), "en").edits == 0
    assert error_rate(plain_text(text), text, "en").edits == 0


def test_a_mark_is_no_word_error_in_other_languages():
    assert error_rate("Elle *l'a* vu.", "Elle l'a vu.", "fr").edits == 0
