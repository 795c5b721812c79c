"""Rule-based rewards for speech recognition (arXiv 2509.18569, R1 to R3) as formulas and as TRL calls them.

The paper names what R2 must catch ("repeated, inexistent or translated" text, which sets the whole reward to −1)
but gives neither rules nor thresholds. The length bounds are NIM4-ASR's (arXiv 2604.18105); the other rules are ours.
They err on the side of None: a misrecognition that is called a hallucination teaches the wrong thing, whereas a
hallucination that is missed mostly has few correct words, and an R1 near 0.
"""

import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import groupby

from common.cli import InputError
from speech.error_rate import CER_LANGUAGES, ErrorRate, error_rate, language_code, normalize_text, text_units
from speech.measures import longest_periodic_stretch

RULES = ("truncated", "non_speech", "empty", "script", "repetition", "length", "no_overlap")

# In scripts without spaces between words: most Chinese words have one or two characters. (Thai and Korean words have
# more, so the same slack is fewer of their words.)
CHARACTERS_PER_WORD = 2
CHARACTER_SCRIPTS = {"CJK", "HIRAGANA", "KATAKANA", "JAPANESE", "HANGUL", "THAI", "LAO", "MYANMAR", "KHMER"}
ORDINARY_EDITS = 3  # words: a transcript with no more edits is a misrecognition

# NIM4-ASR: more than twice or less than half as long. Here exactly twice is too long already: a transcript that has
# everything twice is a loop that FEWEST_REPEATS lets pass. Both only where more than ORDINARY_EDITS words are too many
# or missing.
MAX_LENGTH_RATIO, MIN_LENGTH_RATIO = 2.0, 0.5
# NIM4-ASR's metric has "negligible lexical overlap" without a number.
NEGLIGIBLE_OVERLAP = 0.1  # fraction of the reference's words: at 90 % WER and more nothing was recognised
OVERLAP_MIN_WORDS = 2 * ORDINARY_EDITS  # all of four or five short words can be misrecognised
MAX_FRAC_FOREIGN = 0.5  # fraction of the words: a foreign name among words of the language stays below it

LONGEST_LOOP = 16  # words, or characters: a sentence of ordinary length
# How often an n-gram must occur back to back, by its number of words. One word: five times, as in the text filter of
# SebastianBodza's Llasa GRPO; people do say "no, no, no", and "I think I think I think" before they continue.
FEWEST_REPEATS = {1: 5, 2: 4}
FEWEST_REPEATS_LONG = 3  # of three words and more
# Inside a word, as in "hahahahahaha": the same author's reward calls six equal characters in a row a hang-up.
LONGEST_LOOP_IN_WORD, FEWEST_REPEATS_IN_WORD = 4, 6


# --- R1 ---------------------------------------------------------------------------------------------------


def transcript_errors(ref: str, hyp: str, language: str) -> ErrorRate:
    """`error_rate`, also for clips without speech (ref ""): each word is an insertion there, and the rate is 0 or 1."""
    if ref.strip():
        return error_rate(ref, hyp, language)
    insertions = len(text_units(hyp, language))
    return ErrorRate(float(insertions > 0), 0, 0, insertions, 0)


def accuracy_reward(errors: ErrorRate) -> float:
    """R1 = max(0, 1 − WER), in [0, 1]; CER for CER_LANGUAGES (arXiv 2509.18569).

    'the boat was gone' transcribed as 'the boat is gone' is 1 − 1/4 = 0.75. The paper does not say whether WER may
    exceed 1. Here it is clipped, because nothing else bounds it: a single transcript of WER 40 would dominate the mean
    and deviation of its group and make the others look alike. It also keeps R2's −1 below everything. For clips without
    speech (ref ""), an empty transcript is 1 and any other 0.
    """
    return max(0.0, 1.0 - errors.rate)


# --- R2: hallucinations -----------------------------------------------------------------------------------


def hallucination(ref: str, hyp: str, language: str, errors: ErrorRate) -> str | None:
    """The name of the first of these rules that a transcript breaks, or None; R2 of arXiv 2509.18569.

    "non_speech": words in a clip without speech (ref ""). "empty": no words where the reference has some. "script":
    most of it is in a script that the reference does not have, as after a translation. Then, only for a transcript
    with more than ORDINARY_EDITS edits: "repetition", "length" and "no_overlap"; see `repetition`, `wrong_length` and
    `no_overlap`.

    'the boat was gone' with 'the boat the boat the boat the boat': 6 edits and 'the boat' 4 times, "repetition";
    with 'a goat is gone': 3 edits, None.

    Args:
        errors: the `transcript_errors` of the two texts.
    """
    has_words = bool(normalize_text(hyp, language))
    if not ref.strip():
        return "non_speech" if has_words else None
    if not has_words:
        return "empty"
    if other_script(ref, hyp, language):
        return "script"
    if errors.edits <= _in_units(ORDINARY_EDITS, language):
        return None
    for name, breaks_rule in (("repetition", repetition), ("length", wrong_length), ("no_overlap", no_overlap)):
        if breaks_rule(ref, hyp, language):
            return name
    return None


def other_script(ref: str, hyp: str, language: str) -> bool:
    """True if more than half of the transcript is in scripts of which the reference has no letter.

    'thank you' transcribed as 'спасибо': 1 word of 1. '我买了一部手机' as '我买了一部 iPhone': 1 word beside 5 / 2, so
    False. Words are counted, not letters, or six Latin letters would outweigh five Chinese characters. Japanese mixes
    its three scripts freely, so they count as one; of a language with two alphabets (Serbian) the reference's counts.
    """
    known = set(_words_by_script(ref, language))
    written = _words_by_script(hyp, language)
    foreign = sum(words for script, words in written.items() if script not in known)
    return bool(known) and foreign > MAX_FRAC_FOREIGN * sum(written.values())


def repetition(ref: str, hyp: str, language: str) -> bool:
    """True if an n-gram of up to LONGEST_LOOP words occurs back to back so often that the transcript is a loop.

    One word 5 times, two words 4 times, more words 3 times (FEWEST_REPEATS; two characters count as a word for
    CER_LANGUAGES), and as many times more than any n-gram of that length does in the reference: where that has
    'no no no', it takes 'no' 5 − 1 + 3 = 7 times. Or a word that is a loop in itself ('hahahahahaha').
    Words are taken as written: Whisper's normaliser would join 'twenty twenty twenty' to one number.
    """
    ref_units, hyp_units = _written_units(ref, language), _written_units(hyp, language)
    for period in range(1, min(LONGEST_LOOP, len(hyp_units) // FEWEST_REPEATS_LONG) + 1):
        num_words = math.ceil(period / _in_units(1, language))
        fewest = FEWEST_REPEATS.get(num_words, FEWEST_REPEATS_LONG)
        if back_to_back(hyp_units, period) - back_to_back(ref_units, period) >= fewest - 1:
            return True
    return any(_is_loop(word, "".join(ref_units)) for word in hyp_units)


def _is_loop(word: str, ref_letters: str) -> bool:
    """True for a word such as 'hahahahahaha', unless the reference has such a run too. A number's zeros are no loop."""
    if not word.isalpha():
        return False
    for period in range(1, LONGEST_LOOP_IN_WORD + 1):
        repeats = back_to_back(word, period)
        if repeats < FEWEST_REPEATS_IN_WORD:
            continue
        if repeats - back_to_back(ref_letters, period) >= FEWEST_REPEATS_IN_WORD - 1:
            return True
    return False


def back_to_back(units: list[str] | str, period: int) -> int:
    """How often, at most, the same `period` units follow each other: 'a b a b a c' has 2 for period 2, 1 for 1."""
    return (longest_periodic_stretch(units, period) + period) // period


def wrong_length(ref: str, hyp: str, language: str) -> bool:
    """True if the transcript is twice as long as the reference or less than half, by more than three words.

    NIM4-ASR's bounds (arXiv 2604.18105) with slack for short texts: after 'yes', up to four words are allowed.
    The ratio is one of characters, so that it does not depend on a normaliser that makes one word of
    'five five one two' and three of 'five five won two'.
    """
    ref_units, hyp_units = text_units(ref, language), text_units(hyp, language)
    if abs(len(hyp_units) - len(ref_units)) <= _in_units(ORDINARY_EDITS, language):
        return False
    ratio = len("".join(hyp_units)) / len("".join(ref_units))
    if len(hyp_units) > len(ref_units):
        return ratio >= MAX_LENGTH_RATIO
    return ratio < MIN_LENGTH_RATIO


def no_overlap(ref: str, hyp: str, language: str) -> bool:
    """True if of six or more reference words (twelve characters) at most one in ten is in the transcript at all.

    Catches a translation into the same script, where only a name survives, and the subtitles of another film.
    'Der Zug nach Hamburg fährt heute von Gleis sieben ab' as 'the train to Hamburg leaves from platform seven
    today': 1 of 10. Of six to nine words none may be there.
    """
    ref_units, hyp_units = text_units(ref, language), text_units(hyp, language)
    shared = (Counter(ref_units) & Counter(hyp_units)).total()
    enough = len(ref_units) >= _in_units(OVERLAP_MIN_WORDS, language)
    return enough and shared <= NEGLIGIBLE_OVERLAP * len(ref_units)


def _in_units(words: int, language: str) -> int:
    """A number of words in the units of the language's error rate: words, or characters."""
    return words * CHARACTERS_PER_WORD if language_code(language) in CER_LANGUAGES else words


def _written_units(text: str, language: str) -> list[str]:
    """Words as written, without case and punctuation, or their characters for CER_LANGUAGES."""
    words = [re.sub(r"\W", "", word) for word in text.casefold().split()]
    words = [word for word in words if word]
    return list("".join(words)) if language_code(language) in CER_LANGUAGES else words


def _words_by_script(text: str, language: str) -> dict[str, float]:
    """How many words are in each script: runs of its letters, or CHARACTERS_PER_WORD characters without spaces."""
    words = Counter()
    for raw in unicodedata.normalize("NFKC", text).split():
        for script, letters in groupby(_script(letter, language) for letter in raw if letter.isalpha()):
            words[script] += len(list(letters)) / CHARACTERS_PER_WORD if script in CHARACTER_SCRIPTS else 1
    return words


@lru_cache(maxsize=4096)
def _script(letter: str, language: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HANGUL …; one name for Japanese's three."""
    script = unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]
    script = "CJK" if script == "IDEOGRAPHIC" else script  # 々
    japanese = language_code(language) == "ja" and script in ("CJK", "HIRAGANA", "KATAKANA")
    return "JAPANESE" if japanese else script


# --- R3: keywords -----------------------------------------------------------------------------------------


def keyword_reward(ref: str, hyp: str, keywords: list[str], language: str) -> float:
    """R3 = (recall + precision) / 2 over the occurrences of keywords, in [0, 1] (arXiv 2509.18569).

    Keywords Zagreb, Split; 'from Zagreb to Split' transcribed as 'Zagreb Zagreb to spit': 1 hit (an occurrence counts
    as often as both texts have it); recall 1 / 2, precision 1 / 2, R3 0.5.
    No hit is 0: a keyword hallucinated where there is none costs as much as one missed. Where neither text has a
    keyword R3 is 1 (the paper leaves 0 / 0 open).

    Args:
        keywords: one or several words each, compared as normalised; those that normalise to nothing are ignored.
    """
    index = keyword_index(keywords, language)
    in_ref, in_hyp = find_keywords(ref, index, language), find_keywords(hyp, index, language)
    if not in_ref and not in_hyp:
        return 1.0
    hits = (in_ref & in_hyp).total()
    if hits == 0:
        return 0.0
    return (hits / in_ref.total() + hits / in_hyp.total()) / 2


def keyword_index(keywords: list[str], language: str) -> dict[tuple[str, ...], str]:
    """The keywords by their normalised words (characters for CER_LANGUAGES), each once."""
    index = {}
    for keyword in keywords:
        index.setdefault(tuple(text_units(keyword, language)), keyword)
    index.pop((), None)
    return index


def find_keywords(text: str, index: dict[tuple[str, ...], str], language: str) -> Counter[str]:
    """How often each keyword of a `keyword_index` occurs in the text, as whole words (or characters)."""
    units = text_units(text, language)
    occurrences = Counter()
    for length in {len(words) for words in index}:
        for start in range(len(units) - length + 1):
            words = tuple(units[start : start + length])
            if words in index:
                occurrences[index[words]] += 1
    return occurrences


# --- As TRL calls it --------------------------------------------------------------------------------------


class AsrRulesReward:
    """R1, R2, R3 and exact match: the weighted mean of the terms, or the override for a hallucination.

    Exact match is 1 if the normalised texts are the same, else 0 (a reward of arXiv 2509.01939).

    In the paper R1 alone is (1, 0, 0, 0), R1 and R2 (1, 1, 0, 0), all three (1, 1, 1, 0); it does not state how R1 and
    R3 are weighted. The override holds within this reward: another reward in the same config is added to it.
    A truncated rollout is treated as a hallucination ("truncated"); without R2 it earns R1 of its transcript so far.

    Args:
        rollout_scorer: a `TranscriptScorer`.
        weight_accuracy, weight_exact: weights of R1 and of the exact match.
        weight_hallucination: a hallucination earns −weight_hallucination, whatever its other terms; 0 leaves R2 out.
        weight_keywords: weight of R3, in rows with keywords. Rows without keywords do without the term, which would be
            1 for their whole group.
    Raises:
        InputError: a weight below 0 or not finite, or no term for rows without keywords.
    """

    __name__ = "asr_rules"
    needs = ()

    def __init__(
        self,
        rollout_scorer,
        weight_accuracy: float = 1.0,
        weight_hallucination: float = 1.0,
        weight_keywords: float = 1.0,
        weight_exact: float = 0.0,
    ):
        self.rollout_scorer = rollout_scorer
        self.weights = {
            "accuracy": weight_accuracy,
            "hallucination": weight_hallucination,
            "keywords": weight_keywords,
            "exact": weight_exact,
        }
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"weight_{name}: must be finite and >= 0 (got {weight})")
        if weight_accuracy + weight_exact == 0:
            raise InputError(
                "weight_accuracy, weight_exact: both 0, so texts without keywords would have no reward. "
                "Set one of them above 0"
            )

    def __call__(self, completion_ids, text, language=None, keywords=None, log_metric=None, **_) -> list[float]:
        """The rewards, in [−weight_hallucination, 1].

        Args:
            text, language, keywords: the dataset's columns; `keywords` a list of strings per row, or None.
        """
        transcripts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        languages = language or ["en"] * len(text)
        keyword_lists = [_checked_keywords(row) for row in keywords or [None] * len(text)]
        items = zip(text, transcripts.hyp_texts, transcripts.errors, languages, keyword_lists, strict=True)
        terms = [self._terms(*item) for item in items]
        r_keywords = [row["keywords"] for row in terms if "keywords" in row]
        if r_keywords and log_metric is not None:
            log_metric("r_keywords", sum(r_keywords) / len(r_keywords))
        override = self.weights["hallucination"]
        return [
            -override if rule and override else self._mean(row)
            for row, rule in zip(terms, transcripts.rules, strict=True)
        ]

    def _terms(self, ref: str, hyp: str, errors: ErrorRate, language: str, keywords: list[str]) -> dict[str, float]:
        terms = {}
        if self.weights["accuracy"]:
            terms["accuracy"] = accuracy_reward(errors)
        if self.weights["keywords"] and keywords:
            terms["keywords"] = keyword_reward(ref, hyp, keywords, language)
        if self.weights["exact"]:
            terms["exact"] = float(errors.edits == 0)
        return terms

    def _mean(self, terms: dict[str, float]) -> float:
        total = sum(self.weights[name] for name in terms)
        return sum(self.weights[name] * value for name, value in terms.items()) / total


def _checked_keywords(keywords: list[str] | None) -> list[str]:
    if isinstance(keywords, str):  # iterating it would yield letters
        raise InputError(f"column 'keywords': expected a list of words per row (got {keywords!r})")
    return keywords or []
