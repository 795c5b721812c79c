"""Word and character error rates of normalised texts, with Whisper's own normalisers."""

import math
import re
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import jiwer
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

from common.cli import InputError, did_you_mean

# Written without spaces between words, so a "word" error rate means nothing; Whisper writes them without a
# leading space (openai/whisper#2112).
SPACELESS_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "km", "yue"})
# Scored by characters. Korean has spaces, but writers disagree on where, and arXiv 2509.18798 uses CER for it.
CER_LANGUAGES = SPACELESS_LANGUAGES | {"ko"}
# Whisper writes them now in traditional, now in simplified characters, whatever the reference is in.
CHINESE = frozenset({"zh", "yue"})


def language_code(language: str) -> str:
    """Whisper's code of a language: 'en', 'EN', 'en-US' and 'English' are 'en', 'zh-Hans' is 'zh'.

    Raises:
        InputError: a language that Whisper does not know.
    """
    name = language.lower().replace("_", "-")
    if name in ("zh-hk", "zh-yue"):
        name = "yue"  # Cantonese, as in Common Voice
    elif re.fullmatch("[a-z]{2,3}(-[a-z]{4})?(-[a-z]{2}|-[0-9]{3})?", name):
        name = name.split("-")[0]  # without script and region
    if name in LANGUAGES:
        return name
    if name in TO_LANGUAGE_CODE:
        return TO_LANGUAGE_CODE[name]
    hint = did_you_mean(name, [*LANGUAGES, *TO_LANGUAGE_CODE], cutoff=0.3) or "."
    raise InputError(f"unknown language {language!r}{hint} Known: {', '.join(sorted(LANGUAGES))}")


@lru_cache(maxsize=2)
def _normalizer(english: bool) -> BasicTextNormalizer | EnglishTextNormalizer:
    return EnglishTextNormalizer() if english else BasicTextNormalizer()


@lru_cache(maxsize=1)
def _chinese_converter():
    from opencc import OpenCC  # here: no other language needs its dictionaries

    return OpenCC("t2s")


def simplified(text: str) -> str:
    """Chinese in simplified characters: 臺灣 is 台湾, 後 is 后 and 隻 只; simplified text stays as it is.

    著 is 着 in every word: Taiwan writes both with it (看著, 著名), and OpenCC's "t2s" leaves it.
    """
    return _chinese_converter().convert(text).replace("著", "着")


@lru_cache(maxsize=4096)  # a reference text is compared with all rollouts of its group, and so are its parts
def normalize_text(text: str, language: str) -> str:
    """The text as it is compared: Whisper's own English normaliser for English, its basic one otherwise.

    The English one leaves a "." where a text ends in an ellipsis; what holds no letter or digit is dropped here,
    or it would be a word. It also joins numbers: "one two" is "12", one word. The basic one turns combining
    vowel signs (Hindi, Thai …) into spaces, in reference and transcript alike. Chinese is `simplified`.
    """
    code = language_code(language)
    words = _normalizer(code == "en")(text).split()
    normalized = " ".join(word for word in words if re.search(r"\w", word))
    return simplified(normalized) if code in CHINESE else normalized


def check_reference_text(text: str, language: str) -> None:
    """Raises InputError where nothing is left of a text after normalisation, or Whisper does not know the language."""
    if not normalize_text(text, language):
        raise InputError(
            f"reference text {text!r} is empty after Whisper's normalisation ({language_code(language)}). Use a text "
            "with at least one word, or drop it from the dataset"
        )


class ErrorRate(NamedTuple):
    """WER, or CER for CER_LANGUAGES, with its counts. Can exceed 1: insertions count, and nothing bounds them."""

    rate: float
    substitutions: int
    deletions: int
    insertions: int
    ref_length: int  # words, or characters

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def error_rate(ref: str, hyp: str, language: str) -> ErrorRate:
    """Edits between the normalised texts over the reference's length: 'a b c' transcribed as 'a x' is 2 / 3.

    Characters in place of words, and all spaces ignored, for CER_LANGUAGES. An empty `hyp` is 1.

    Raises:
        InputError: nothing is left of `ref` after normalisation, so its error rate is undefined; an unknown language.
    """
    check_reference_text(ref, language)
    ref_text, hyp_text = normalize_text(ref, language), normalize_text(hyp, language)
    if language_code(language) in CER_LANGUAGES:
        output = jiwer.process_characters("".join(ref_text.split()), "".join(hyp_text.split()))
    else:
        output = jiwer.process_words(ref_text, hyp_text)
    counts = (output.substitutions, output.deletions, output.insertions)
    ref_length = output.hits + output.substitutions + output.deletions
    return ErrorRate(sum(counts) / ref_length, *counts, ref_length)


def heard_words(text: str, hyp: str, language: str) -> list[bool]:
    """Which of `text.split()` a transcript has, in its place; all of the word's characters for CER_LANGUAGES.

    'Tom took 7 cars.' over 'tom so seven cars' is [True, False, True, True]. Words that are one word once normalised,
    'ten dollars' as '$10', are heard together or not at all.
    """
    units, spans = _units_of_words(text, language)
    [alignment] = jiwer.process_words(" ".join(units), " ".join(text_units(hyp, language))).alignments
    equal = {place for op in alignment if op.type == "equal" for place in range(op.ref_start_idx, op.ref_end_idx)}
    return [all(place in equal for place in range(*span)) for span in spans]


def text_units(text: str, language: str) -> list[str]:
    """What an error rate compares: the words of the normalised text, or its characters for CER_LANGUAGES."""
    words = normalize_text(text, language).split()
    return list("".join(words)) if language_code(language) in CER_LANGUAGES else words


@lru_cache(maxsize=1024)  # a reference text is compared with all rollouts of its group
def _units_of_words(text: str, language: str) -> tuple[list[str], list[tuple[int, int]]]:
    """A text's `text_units`, and for each word of `text.split()` the first of them that is its own and the one behind.

    The normaliser sees the text whole, as it does for the error rate. Between two words is a boundary where the text
    before and the text behind, each normalised alone, are the whole; words without one between them share their units.

    >>> _units_of_words("It cost ten dollars.", "en")
    (['it', 'cost', '$10'], [(0, 1), (1, 2), (2, 3), (2, 3)])
    """
    units, words = text_units(text, language), text.split()
    boundaries = [(0, 0)]  # numbers of words and of units before it
    for count in range(1, len(words)):
        before, behind = text_units(" ".join(words[:count]), language), text_units(" ".join(words[count:]), language)
        if before + behind == units:
            boundaries.append((count, len(before)))
    spans = []
    for (word, unit), (next_word, next_unit) in pairwise([*boundaries, (len(words), len(units))]):
        spans += [(unit, next_unit)] * (next_word - word)
    return units, spans


def sum_errors(error_rates: list[ErrorRate]) -> ErrorRate:
    """The error rate of a corpus: all edits over all reference words (or characters), so that long texts weigh more.

    1 of 1 and 1 of 9 words wrong is 2 / 10. NaN where no reference has a word: clips without speech.
    """
    substitutions = sum(errors.substitutions for errors in error_rates)
    deletions = sum(errors.deletions for errors in error_rates)
    insertions = sum(errors.insertions for errors in error_rates)
    ref_length = sum(errors.ref_length for errors in error_rates)
    rate = (substitutions + deletions + insertions) / ref_length if ref_length else math.nan
    return ErrorRate(rate, substitutions, deletions, insertions, ref_length)


def split_reference(text: str, hyps: list[str], language: str) -> list[str]:
    """Divide a reference text over the consecutive transcripts of a clip: each gets the stretch that aligns with it.

    'one two three four' over ['one too', 'four'] is ['one two three', 'four'].
    """
    if len(hyps) == 1:
        return [text.strip()]
    spaceless = language in SPACELESS_LANGUAGES
    ref_units = list(text.strip()) if spaceless else text.split()
    hyp_units = [list(hyp) if spaceless else hyp.split() for hyp in hyps]

    def keys(units: list[str]) -> str:
        # Not normalize_text: it merges and splits words, and here every raw word needs exactly one key.
        bare = [re.sub(r"\W", "", unit).casefold() or "·" for unit in units]
        return " ".join(map(simplified, bare) if language in CHINESE else bare)

    [alignment] = jiwer.process_words(keys(ref_units), keys(list(chain(*hyp_units)))).alignments
    ref_after = [0]  # ref_after[n]: how many reference units are aligned with the first n units of the transcripts
    for op in alignment:
        if op.type == "delete":
            ref_after[-1] = op.ref_end_idx
        for n in range(op.hyp_end_idx - op.hyp_start_idx):
            ref_after.append(min(op.ref_start_idx + n + 1, op.ref_end_idx))
    cuts = [0, *(ref_after[n] for n in accumulate(map(len, hyp_units)))]
    joiner = "" if spaceless else " "
    return [joiner.join(ref_units[a:b]) for a, b in pairwise(cuts)]
