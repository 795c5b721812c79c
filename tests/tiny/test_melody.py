"""tiny/melody.py on a vowel: the rule, and the judge of what it did."""

import numpy as np
import pytest
from fake_vowel import falling

from tiny import melody
from tiny.judge_melody import ends_as_question, stands_out
from tiny.melody import Word

RATE = 16_000


def semitones(ratio: float) -> float:
    return 12 * np.log2(ratio)


@pytest.mark.parametrize("first, last", [(130, 100), (220, 180)])
def test_question_ends_at_its_factor_above_the_median(first, last):
    wav = falling(1.6, first, last)
    risen = melody.with_question(wav)
    times, f0 = melody.f0_track(risen)
    median = np.median(melody.f0_track(wav)[1])
    assert f0[-3:].mean() - median == pytest.approx(semitones(melody.QUESTION_F0), abs=1)
    untouched = times < 1.6 - melody.QUESTION_RISE_S - 0.1
    expected = semitones(np.interp(times[untouched], [0, 1.6], [first, last]))
    assert np.abs(f0[untouched] - expected).max() < 0.5
    assert abs(len(risen) - len(wav)) < 0.01 * RATE


def test_question_is_recognised_and_a_statement_is_not():
    wav = falling(1.6, 130, 100)
    assert not ends_as_question(wav)
    assert ends_as_question(melody.with_question(wav))


def test_breath_after_the_voice_is_not_its_end():
    wav = melody.with_question(falling(1.6, 130, 100))
    creak = 0.05 * falling(0.2, 80, 80)  # 26 dB below
    wav = np.concatenate([wav, np.zeros(800, np.float32), creak])
    assert ends_as_question(wav)


def test_silence_has_no_melody():
    silence = np.zeros(RATE, np.float32)
    assert not ends_as_question(silence) and not stands_out(silence, 0, 0.5)


def three_words() -> tuple[np.ndarray, list[Word]]:
    return falling(1.5, 125, 110), [Word("one", 0, 0.5), Word("two", 0.5, 1.0), Word("six", 1.0, 1.5)]


def test_emphasis_changes_its_word_by_the_constants_and_no_other():
    wav, words = three_words()
    emphasised, end_s = melody.with_emphasis(wav, 0.5, 1.0)
    assert end_s == pytest.approx(0.5 + 0.5 * melody.EMPHASIS_LENGTH)
    assert len(emphasised) / RATE == pytest.approx(1.5 + 0.5 * (melody.EMPHASIS_LENGTH - 1), abs=0.02)
    times, f0 = melody.f0_track(emphasised)
    middle = (times > 0.6) & (times < end_s - 0.1)
    expected = semitones(np.interp(0.5 + (times - 0.5) / melody.EMPHASIS_LENGTH, [0, 1.5], [125, 110]))
    assert (f0 - expected)[middle].mean() == pytest.approx(semitones(melody.EMPHASIS_F0), abs=0.3)
    assert f0[times < 0.4] == pytest.approx(semitones(np.interp(times[times < 0.4], [0, 1.5], [125, 110])), abs=0.3)


def test_emphasis_is_recognised_in_its_word_only():
    wav, words = three_words()
    emphasised, end_s = melody.with_emphasis(wav, 0.5, 1.0)
    later = [words[0], Word("two", 0.5, end_s), Word("six", end_s, end_s + 0.5)]
    assert not any(stands_out(wav, word.start_s, word.end_s) for word in words)
    assert [stands_out(emphasised, word.start_s, word.end_s) for word in later] == [False, True, False]


def test_a_random_melody_has_another_f0_and_the_same_length():
    wav = falling(1.5, 140, 110)
    copies = [melody.with_random_melody(wav, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert all(copy.shape == wav.shape for copy in copies)
    assert np.array_equal(copies[0], copies[1]) and not np.array_equal(copies[0], copies[2])
    own, moved = (np.interp(np.arange(0.3, 1.2, 0.01), *melody.f0_track(clip)) for clip in (wav, copies[0]))
    assert np.abs(moved - own).max() > 2 and np.std(moved - own) > 0.5  # semitones: not only shifted
    silence = np.zeros(8_000, np.float32)
    assert melody.with_random_melody(silence, np.random.default_rng(0)) is silence
