"""Melody: emphasis of words by hand, the movement at the end, what asks, the range of F0."""

import doctest
from dataclasses import replace

import numpy as np
import pytest

import speech.melody
from speech.melody import (
    DECLINATION_ST_PER_S,
    asks,
    emphasis_cues,
    emphasis_score,
    f0_range_st,
    final_movement_st,
    is_emphasised,
    is_rise,
    marked_word_scores,
    rise_score,
    words_to_emphasise,
)
from speech.pitch import PitchTrack, pitch_track
from speech.word_times import Word

WORDS = (Word("He", 0.0, 0.4), Word("will", 0.4, 0.8), Word("go.", 0.8, 1.2))


def test_worked_numbers_of_docstrings():
    result = doctest.testmod(speech.melody)
    assert result.attempted > 0 and result.failed == 0


# --- Emphasis ---------------------------------------------------------------------------------------------


def test_score_by_hand():
    # 0.5 + 0.5 (0.6 · 3/6 + 0.2 · 3/6 + 0.2 · ln 1.5 / ln 1.5) = 0.8
    assert emphasis_score(3.0, 3.0, np.log2(1.5)) == pytest.approx(0.8)
    assert emphasis_score(0, 0, 0) == 0.5
    assert emphasis_score(99, 99, 99) == 1 and emphasis_score(-99, -99, -99) == 0
    assert emphasis_score(99, 0, 0) == emphasis_score(6, 0, 0) == pytest.approx(0.8)  # shouting does not pay


def test_cues_by_hand():
    times = np.arange(0.005, 1.2, 0.01)
    inside = (times >= 0.4) & (times < 0.8)
    track = PitchTrack(times, np.where(inside, 92.0, 86.0), np.where(inside, -10.0, -14.0))
    assert emphasis_cues(track, list(WORDS), 1, [0, 2]) == pytest.approx((6, 4, 0))
    # The first word: as high as the last, later by -0.6 s than the mean of the others
    f0_st, level_db, _ = emphasis_cues(track, list(WORDS), 0, [1, 2])
    assert (f0_st, level_db) == pytest.approx((-3 - 0.6 * DECLINATION_ST_PER_S, -2))
    longer = [replace(WORDS[0], end_s=0.2), replace(WORDS[1], start_s=0.2), WORDS[2]]
    assert emphasis_cues(track, longer, 1, [0, 2])[2] == pytest.approx(1.0)  # 0.6 s against a mean of 0.3 s
    silent = PitchTrack(times[~inside], track.f0[~inside], track.level[~inside])
    assert emphasis_cues(silent, list(WORDS), 1, [0, 2]) == pytest.approx((0, 0, 0))  # whispered: no cue


def test_a_word_that_is_not_heard_is_at_most_plain():
    """ "will" is 6 st and 4 dB above the others: 0.5 + 0.5 (0.6 + 0.2 · 4/6) = 0.8667. "He" is lower, and below 0.5."""
    times = np.arange(0.005, 1.2, 0.01)
    inside = (times >= 0.4) & (times < 0.8)
    track = PitchTrack(times, np.where(inside, 92.0, 86.0), np.where(inside, -10.0, -14.0))
    assert marked_word_scores(track, WORDS, "He *will* go.", "he will go", "en") == pytest.approx([0.8667], abs=1e-4)
    assert marked_word_scores(track, WORDS, "He *will* go.", "he go", "en") == [0.5]
    amount = "He paid *ten* dollars."  # "$10" once normalised
    three = (WORDS[0], replace(WORDS[0], text="paid"), WORDS[1], replace(WORDS[2], text="dollars."))
    assert marked_word_scores(track, three, amount, "He paid ten dollars.", "en")[0] > 0.7
    assert marked_word_scores(track, three, amount, "He paid ten of the dollars.", "en") == [0.5]
    low, high = marked_word_scores(track, WORDS, "*He* *will* go.", "he will go", "en")
    assert low < 0.5 < high
    assert is_emphasised(0.8667) and not is_emphasised(0.7) and not is_emphasised(0.5)


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("He *will* go.", [1]),
        ("*He* *will* go.", [0, 1]),
        ("He will go.", []),
        ("*Go*!", []),
        ("He 2*3*4 go.", []),
        ("*Viens* ?", []),
    ],
)
def test_words_to_emphasise(text, indices):
    assert words_to_emphasise(text) == indices


def test_a_mark_by_itself_is_no_word_to_compare_with():
    """French writes a space before it; the time that it got is the silence at the end."""
    track = PitchTrack(np.arange(0.005, 1.2, 0.01), np.full(120, 86.0), np.full(120, -14.0))
    words = (*WORDS[:2], Word("?", WORDS[1].end_s, 3.0))
    alone = marked_word_scores(track, WORDS[:2], "Tu *viens*", "tu viens", "fr")
    assert marked_word_scores(track, words, "Tu *viens* ?", "tu viens", "fr") == alone


# --- The end, and the whole -------------------------------------------------------------------------------


def test_final_movement_by_hand():
    times = np.arange(0, 1, 0.01)
    f0 = np.where(times > 0.9, 92.0, 86.0)  # semitones
    assert final_movement_st(PitchTrack(times, f0, np.zeros(100))) == 6.0
    assert np.isnan(final_movement_st(PitchTrack(times[:10], f0[:10], np.zeros(10))))  # 0.1 s of voice
    voiceless = (times < 0.4) | (times > 0.8)  # "seven potatoes?"
    assert final_movement_st(PitchTrack(times[voiceless], f0[voiceless], np.zeros(voiceless.sum()))) == 6.0
    long = np.arange(0, 4, 0.01)
    earlier_sentence = np.where(long > 3.9, 92.0, np.where(long < 1.9, 99.0, 86.0))
    assert final_movement_st(PitchTrack(long, earlier_sentence, np.zeros(400))) == 6.0
    dip = np.where((times > 0.5) & (times < 0.75), 80.0, 86.0)
    assert final_movement_st(PitchTrack(times, dip, np.zeros(100))) == 0.0
    assert np.isnan(final_movement_st(pitch_track(np.zeros(16_000, np.float32))))


@pytest.mark.parametrize(("movement_st", "score"), [(-3.0, 0.0), (0.0, 0.0), (1.5, 0.25), (4.5, 0.75), (9.0, 1.0)])
def test_rise_score(movement_st, score):
    assert rise_score(movement_st) == score


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Did he go?", "en", True),
        ('"Did *he* go?"', "en", True),
        ("He went.", "en", False),
        ("Where did he go?", "en", None),
        ("*Who* went?", "en", None),
        ("Wo ist er?", "de", True),
        ("你好吗？", "zh", True),
        ("Where did he go?", "English", None),
        ("Where?", "EN", None),
        ("?", "en", True),
        ("He went,", "en", None),
        ("He went", "en", None),
        ("I saw him. Where is he?", "en", None),
        ("What a day! Is he here?", "en", True),
        ("“Who is he?” he asked.", "en", False),
        ("Well, and where is he?", "en", None),
        ("And is he here?", "en", True),
        ("And?", "en", True),
        ("What's that?", "en", None),
        ("Where is Mr. Smith?", "en", None),
        ("Did J. Smith go?", "en", True),
        ('Who said "Stop!" and left?', "en", None),
        ("What... are you doing?", "en", None),
        ('He said "No." Is he here?', "en", True),
        ("我知道。你好吗？", "zh", True),
        ("¿Dónde está?", "es", True),
        ("„Kommst du?“", "de", True),
        ("»Er kommt.«", "de", False),
        ("「来ますか？」", "ja", True),
        ("（来ます。）", "ja", False),
        ("کیا آپ آئے؟", "ur", True),
        ("وہ آیا۔", "ur", False),
        ("Έρχεσαι;", "el", True),
        ("Er kam;", "de", None),
    ],
)
def test_what_asks(text, language, expected):
    assert asks(text, language) is expected


def test_a_rise_is_more_than_3_semitones():
    assert is_rise(3.1) and not is_rise(3.0) and not is_rise(-6.0) and not is_rise(float("nan"))


def test_f0_range_by_hand():
    """A steady rise by 12 semitones: 90 % of it. One octave error in 100 frames is no movement."""
    times = np.arange(101) / 100
    assert f0_range_st(PitchTrack(times, 86 + 12 * times, times)) == pytest.approx(10.8)
    level = np.full(101, 86.0)
    level[50] = 98.0
    assert f0_range_st(PitchTrack(times, level, times)) == 0
    assert np.isnan(f0_range_st(pitch_track(np.zeros(16_000, np.float32))))
