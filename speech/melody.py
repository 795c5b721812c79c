"""The melody of a clip, measured: the emphasis of a marked word, the movement at the end, the range of F0.

For the rewards and for evaluation.py. The cues of emphasis are those of word-emphasis measures since Fry (1955): an
emphasised word is higher, louder and longer than the words around it.
"""

import re
from collections.abc import Sequence

import numpy as np

from speech.error_rate import heard_words, language_code
from speech.pitch import PitchTrack
from speech.syllables import syllables
from speech.text_marks import CLOSING, marked_words, plain_text
from speech.word_times import Word

# --- Emphasis ---------------------------------------------------------------------------------------------

# A cue this large is an emphasis that nobody misses, and earns all that it can.
FULL_F0_ST, FULL_LEVEL_DB, FULL_LENGTH = 6.0, 6.0, 1.5
PLAIN = 0.5  # the score of a word like the others
EMPHASISED = 0.7  # a higher score is an emphasised word's: F0 alone has to be 4 semitones higher
WEIGHT_F0, WEIGHT_LEVEL, WEIGHT_LENGTH = 0.6, 0.2, 0.2
DECLINATION_ST_PER_S = 2.0  # F0 falls in the course of a sentence; without it, a first word would seem emphasised


def emphasis_cues(
    track: PitchTrack, words: Sequence[Word], index: int, others: list[int]
) -> tuple[float, float, float]:
    """A word beside other words: F0 in semitones, level in dB, and log2 of the ratio of durations per syllable.

    A word at 200 Hz for 0.3 s, others at 150 Hz for 0.2 s, all of one syllable and with their middles at the same
    time: 12 log2(200 / 150) = 4.98 semitones and log2(0.3 / 0.2) = 0.585. The F0 is corrected for declination. F0 and
    level are 0, no cue, where the word or the others have no voice.
    """
    inside = track.between(words[index].start_s, words[index].end_s)
    outside = np.zeros(len(inside), bool)
    for other in others:
        outside |= track.between(words[other].start_s, words[other].end_s)
    outside &= ~inside
    f0_st = level_db = 0.0
    if inside.any() and outside.any():
        later_s = track.times[inside].mean() - track.times[outside].mean()
        f0_st = track.f0[inside].mean() - track.f0[outside].mean() + DECLINATION_ST_PER_S * later_s
        level_db = track.level[inside].mean() - track.level[outside].mean()
    ratio = _syllable_s([words[index]]) / _syllable_s([words[other] for other in others])
    return float(f0_st), float(level_db), float(np.log2(ratio))


def _syllable_s(words: Sequence[Word]) -> float:
    """Mean duration of a syllable, at least 1 ms."""
    total = sum(word.end_s - word.start_s for word in words)
    return max(total / sum(syllables(word.text) for word in words), 0.001)


def emphasis_score(f0_st: float, level_db: float, length_log2: float) -> float:
    """0.5 + half the weighted mean of the cues, each at most ±1 of its full size: in [0, 1], 0.5 for a plain word.

    3 semitones, 3 dB and 1.5 times the length: 0.5 + 0.5 (0.6 · 3/6 + 0.2 · 3/6 + 0.2 · 1) = 0.8.

    >>> round(emphasis_score(3.0, 3.0, np.log2(1.5)), 4)
    0.8
    """
    cues = np.clip([f0_st / FULL_F0_ST, level_db / FULL_LEVEL_DB, length_log2 / np.log2(FULL_LENGTH)], -1, 1)
    return float(PLAIN + (1 - PLAIN) * np.dot(cues, [WEIGHT_F0, WEIGHT_LEVEL, WEIGHT_LENGTH]))


def words_to_emphasise(text: str) -> list[int]:
    """Indices of the marked words; none where every word is marked, as nothing is left to stand out from."""
    return marked_words(text) if other_words(text) else []


def other_words(text: str) -> list[int]:
    """Indices of the words without a mark; the mark of "Tu *viens* ?" is not spoken, and so no word beside them."""
    marked = marked_words(text)
    return [index for index, word in enumerate(text.split()) if index not in marked and re.search(r"\w", word)]


def marked_word_scores(
    track: PitchTrack, words: Sequence[Word], text: str, hyp_text: str, language: str
) -> list[float]:
    """`emphasis_score` of each of `words_to_emphasise`; at most that of a plain word where the word is not heard.

    Args:
        words: of the text, in the clip.
        hyp_text: transcript of the clip.
    """
    marked, others = words_to_emphasise(text), other_words(text)
    heard = heard_words(plain_text(text), hyp_text, language)
    scores = []
    for index in marked:
        score = emphasis_score(*emphasis_cues(track, words, index, others))
        scores.append(score if heard[index] else min(score, PLAIN))
    return scores


def is_emphasised(score: float) -> bool:
    """Whether an `emphasis_score` is that of an emphasised word."""
    return score > EMPHASISED


# --- The end ----------------------------------------------------------------------------------------------

END_S = 0.08  # voiced time at the end of which the F0 is taken
BEFORE_S = (2.0, 0.25)  # and the time before the end that it is compared with: what is left of the phrase
FALL_ST, RISE_ST = 0.0, 6.0  # a movement up to here is a statement's, from here on a question's
MIN_RISE_ST = 3.0  # a higher one is a rise: half way between the two
# English questions that begin with these ask for a word, not for yes or no, and fall.
WH_WORDS = frozenset("what when where which who whom whose why how".split())
LEADING_WORDS = frozenset("and but so then well or".split())  # "And where is he?" asks for a word all the same
# Between two English sentences; not in "Mr. Smith", "J. Smith", "Wait... what" or 'said "Stop!" and left'.
SENTENCE_END = re.compile(
    r"(?<=[.!?…])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)[\"'”’)\]]*\s+(?=[^a-z])"
)
QUESTION_MARKS, FULL_STOPS = tuple("?？؟፧"), tuple(".。।．｡۔።")


def final_movement_st(track: PitchTrack) -> float:
    """F0 of the last 80 ms of voice minus that from 2 to 0.25 s before the end, medians; NaN without voice there.

    100 Hz that end at 141.4 Hz are 6 semitones.

    A shorter time to compare with often has no voice ("seven *potatoes*?"), and a dip in it makes a rise of an end that
    is no higher than the phrase.
    """
    if len(track.times) == 0:
        return float("nan")
    to_end = track.times[-1] - track.times
    before = track.f0[(to_end <= BEFORE_S[0]) & (to_end >= BEFORE_S[1])]
    if len(before) == 0:
        return float("nan")
    return float(np.median(track.f0[to_end < END_S]) - np.median(before))


def rise_score(movement_st: float) -> float:
    """0 for a fall, 1 for a rise of 6 semitones or more, linear between: 4.5 semitones are 0.75.

    >>> rise_score(4.5), rise_score(-3.0), rise_score(9.0)
    (0.75, 0.0, 1.0)
    """
    return float(np.clip((movement_st - FALL_ST) / (RISE_ST - FALL_ST), 0, 1))


def is_rise(movement_st: float) -> bool:
    """Whether a `final_movement_st` is a rise; NaN is none."""
    return movement_st > MIN_RISE_ST


def asks(text: str, language: str) -> bool | None:
    """True for a yes-no question, False for a statement, None for what has no such end: a question for a word, "…".

    Of several sentences the last one counts.

    "Did he?" is True, "He did." False, "Where is he?" and "He did," None; so is "I saw him. And where is he?".
    """
    text = plain_text(text).rstrip(CLOSING)
    code = language_code(language)
    if text.endswith(QUESTION_MARKS) or (code == "el" and text.endswith((";", "\u037e"))):
        return None if code == "en" and asks_for_a_word(text) else True
    return False if text.endswith(FULL_STOPS) else None


def asks_for_a_word(text: str) -> bool:
    """Whether the last sentence of an English text begins with a wh-word: "And what's that?", not "Is that what?"."""
    words = [re.split("['’]", word.strip('"“‘(,?.!…').casefold())[0] for word in SENTENCE_END.split(text)[-1].split()]
    while len(words) > 1 and words[0] in LEADING_WORDS:
        words = words[1:]
    return words[0] in WH_WORDS


# --- The whole --------------------------------------------------------------------------------------------

F0_RANGE_PERCENTILES = (5, 95)  # an octave error or two at either end is left out


def f0_range_st(track: PitchTrack) -> float:
    """F0 from its 5th to its 95th percentile over the voiced frames, in semitones: 12 log2(p95 / p5); NaN without any.

    A steady rise by an octave has 90 % of it, 10.8; a held tone 0.
    """
    if len(track.f0) == 0:
        return float("nan")
    low, high = np.percentile(track.f0, F0_RANGE_PERCENTILES)
    return float(high - low)
