"""Error rates by hand and against jiwer, languages, and how a text is divided over the windows of a clip."""

import doctest
import math

import jiwer
import pytest

from common.cli import InputError
from speech import error_rate as error_rates
from speech.error_rate import (
    ErrorRate,
    check_reference_text,
    error_rate,
    heard_words,
    language_code,
    normalize_text,
    split_reference,
    sum_errors,
)


@pytest.mark.parametrize(
    ("ref", "hyp", "substitutions", "deletions", "insertions", "ref_length"),
    [
        ("The cat sat.", "the cat sat", 0, 0, 0, 3),
        ("The cat sat.", "the hat sat", 1, 0, 0, 3),
        ("The cat sat on the mat.", "the cat on mat", 0, 2, 0, 6),
        ("The cat.", "the big fat cat", 0, 0, 2, 2),
        ("I didn't see Mr. Brown", "i did not see mister brown", 0, 0, 0, 6),
        ("Twenty-three dollars", "$23", 0, 0, 0, 1),
        ("The colour grey", "the color gray", 0, 0, 0, 3),
        ("Hello there", "", 0, 2, 0, 2),
        ("Hello there", " ... ", 0, 2, 0, 2),
        ("Hello", "a b c d", 1, 0, 3, 1),
        ("Well... wait...", "well wait", 0, 0, 0, 2),
    ],
)
def test_wer_is_jiwers_on_normalised_text(ref, hyp, substitutions, deletions, insertions, ref_length):
    errors = error_rate(ref, hyp, "en")
    assert errors[1:] == (substitutions, deletions, insertions, ref_length)
    assert errors.edits == substitutions + deletions + insertions
    assert errors.rate == pytest.approx(jiwer.wer(normalize_text(ref, "en"), normalize_text(hyp, "en")))


def test_empty_transcript_is_the_worst_not_the_best():
    for language, ref in (("en", "Hello there"), ("de", "Guten Tag"), ("zh", "你好"), ("ko", "안녕하세요")):
        assert error_rate(ref, "", language).rate == 1.0


def test_cer_for_languages_without_word_spaces():
    # 6 characters, one wrong; neither punctuation nor spaces count
    errors = error_rate("今天天气很好。", "今天 天汽很好", "zh")
    assert errors == (1 / 6, 1, 0, 0, 6)
    # Korean: 5 syllables whatever the spacing
    assert error_rate("나는 학교에", "나는학교에", "ko") == (0.0, 0, 0, 0, 5)
    # Other languages with spaces are scored by words, without English spelling rules
    assert error_rate("Mr. Müller kommt", "mister müller kommt", "de") == (1 / 3, 1, 0, 0, 3)


@pytest.mark.parametrize(
    ("traditional", "simplified"),
    [
        ("臺灣", "台湾"),
        ("然後皇后走了", "然后皇后走了"),  # 后, the empress, is traditional as well
        ("一隻貓，只有一隻", "一只猫,只有一只"),
        ("頭髮發現乾淨", "头发发现干净"),
        ("乾隆皇帝", "乾隆皇帝"),  # a name, whose character is not simplified
        ("裡面裏面", "里面里面"),  # Taiwan's and Hong Kong's
        ("他看著著名的畫", "他看着著名的画"),
        ("唔該晒，佢哋喺度", "唔该晒，佢哋喺度"),
    ],
)
def test_chinese_in_either_script_is_the_same(traditional, simplified):
    for language in ("zh", "Chinese", "yue"):
        for ref, hyp in ((traditional, simplified), (simplified, traditional)):
            assert error_rate(ref, hyp, language).rate == 0
            assert normalize_text(ref, language) == normalize_text(hyp, language)
    # What differs besides is still counted: 我 in place of 我們, one of four characters
    assert error_rate("我們後來", "我后来", "zh") == (1 / 4, 0, 1, 0, 4)


def test_japanese_is_not_turned_into_chinese():
    """国 and 國, 体 and 體 are spellings of Japanese too, and an error there; 気 or 発 no simplified character."""
    for text in ("日本語の発音を勉強する", "臺灣へ行く", "天気がいい"):
        assert normalize_text(text, "ja") == text
    assert error_rate("國", "国", "ja").rate == 1
    assert error_rate("著名", "着名", "ja").substitutions == 1
    assert normalize_text("臺灣 taiwan", "en") == "臺灣 taiwan"


def test_a_reference_without_a_word_is_an_input_error():
    for text in ("", "...", "[laughs]", "Hmm."):
        with pytest.raises(InputError, match="empty after Whisper's normalisation"):
            error_rate(text, "hello", "en")
        with pytest.raises(InputError, match="empty after Whisper's normalisation"):
            check_reference_text(text, "en")
    check_reference_text("hello", "en")


def test_summed_errors_weigh_texts_by_their_length():
    # 1 of 1 and 1 of 9 words wrong: 2 / 10, where the mean of the rates is 0.56
    pairs = [("one", "two"), ("a b c d e f g h i", "a b c d x f g h i")]
    assert sum_errors([error_rate(ref, hyp, "de") for ref, hyp in pairs]) == (0.2, 2, 0, 0, 10)
    # Edits are summed by kind: 1 substitution of 1 word, 2 deletions of 3, 1 insertion to 1
    pairs = [("one", "two"), ("a b c", "a"), ("a", "a b")]
    assert sum_errors([error_rate(ref, hyp, "de") for ref, hyp in pairs]) == (4 / 5, 1, 2, 1, 5)


def test_summed_errors_without_reference_words():
    errors = sum_errors([ErrorRate(1.0, 0, 0, 2, 0), ErrorRate(0.0, 0, 0, 0, 0)])
    assert math.isnan(errors.rate) and errors[1:] == (0, 0, 2, 0)
    assert math.isnan(sum_errors([]).rate)


def test_language_names():
    names = ("en", "EN", "English", "Mandarin", "yue", "zh-CN", "sv_SE", "zh-HK", "zh-Hant-TW", "zh-Hans")
    assert [language_code(name) for name in names] == ["en", "en", "en", "zh", "yue", "zh", "sv", "yue", "zh", "zh"]
    with pytest.raises(InputError, match="Did you mean 'english'"):
        language_code("englisch")
    with pytest.raises(InputError, match="unknown language 'de_english'"):
        language_code("de_english")


@pytest.mark.parametrize(
    ("text", "hyps", "language", "stretches"),
    [
        (" One, two! ", ["anything"], "en", ["One, two!"]),
        ("One, two, three. Four!", ["one two", "three four"], "en", ["One, two,", "three. Four!"]),
        # A word that is in no transcript goes with the one before it.
        ("one two three four", ["one too", "four"], "en", ["one two three", "four"]),
        ("one two", ["uh one um", "er two oh no"], "en", ["one", "two"]),
        ("one two", ["", "one two"], "en", ["", "one two"]),
        ("one two", ["one two", "babble on"], "en", ["one two", ""]),
        ("one - two", ["one", "two"], "en", ["one -", "two"]),
        ("one two", ["", ""], "en", ["one two", ""]),
        ("今天,天气很好。", ["今天", "天气很号"], "zh", ["今天,", "天气很好。"]),
        ("我說話後來", ["说话", "后来"], "zh", ["我說話", "後來"]),
    ],
)
def test_split_reference(text, hyps, language, stretches):
    assert split_reference(text, hyps, language) == stretches


def test_worked_numbers_of_docstrings():
    result = doctest.testmod(error_rates)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("text", "hyp", "language", "heard"),
    [
        ("Tom took 7 cars.", "tom so seven cars", "en", "1011"),
        ("He did - not go.", "he did go", "en", "11101"),  # a dash is no word, and so is not missed
        ("It cost ten dollars today.", "It cost ten dollars today.", "en", "11111"),  # "$10" once normalised
        ("It cost ten dollars today.", "it cost tender today", "en", "11001"),
        ("She has twenty one cats.", "she has 21 cats", "en", "11111"),
        ("She has twenty one cats.", "she has twenty won cats", "en", "11001"),
        ("Dr. Smith's car isn't here, um, okay.", "doctor smith's car is not here okay", "en", "1111111"),
        ("你好 吗", "你好", "zh", "10"),
        ("臺灣 隻", "台湾只", "zh", "11"),
        ("오늘 날씨", "오늘날시", "ko", "10"),
    ],
)
def test_which_words_are_heard(text, hyp, language, heard):
    assert heard_words(text, hyp, language) == [mark == "1" for mark in heard]


def test_every_word_of_a_transcript_that_is_the_text_is_heard():
    text = "In 1999, one hundred and one people paid $5.50 each: forty five percent of it on Monday the twenty-first."
    assert all(heard_words(text, text, "en"))
