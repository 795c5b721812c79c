"""tiny/corpus.py: the grammar and its marks."""

import re
from collections import Counter

from tiny import corpus


def test_sentences_are_distinct_as_spoken_and_repeatable():
    texts = corpus.sentences(0)
    assert len({corpus.spoken_words(text) for text in texts}) == len(texts) == corpus.SENTENCES > 50_000
    assert texts[:1000] == corpus.sentences(0, 1000)
    assert texts != corpus.sentences(1)


def test_forms_have_their_fractions():
    forms = Counter(map(corpus.form, corpus.sentences(0, 10_000)))
    assert abs(forms["question"] / 10_000 - corpus.FRAC_QUESTIONS) < 0.02
    assert abs(forms["emphasis"] / 10_000 - corpus.FRAC_EMPHASIS) < 0.02


def test_vocabulary_is_what_the_sentences_use():
    words = {word for text in corpus.sentences(0) for word in corpus.spoken_words(text).split()}
    assert words == {word.lower() for word in corpus.vocabulary()}
    assert 150 <= len(words) <= 300


def test_one_content_word_is_emphasised():
    for text in corpus.sentences(0, 2_000):
        index = corpus.emphasised_word(text)
        if corpus.form(text) == "emphasis":
            assert re.fullmatch(r"[^*]*\*\w+\*[^*]*\.", text)
            assert text.split()[index].strip("*.").lower() not in corpus.FUNCTION_WORDS
        else:
            assert index is None and "*" not in text


def test_written_sentences_begin_with_a_capital_and_have_four_to_eight_words():
    for text in corpus.sentences(0, 2_000):
        assert re.match(r"\*?[A-Z]", text) and text[-1] in ".?"
        assert 4 <= len(text.split()) <= 8


def test_marks_are_not_spoken():
    assert corpus.spoken_words("Oliver *lost* her basket.") == "oliver lost her basket"
    assert corpus.emphasised_word("Oliver *lost* her basket.") == 1
    assert corpus.written(["*the*", "farmer"], "?") == "*The* farmer?"
