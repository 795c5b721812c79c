"""F0 edits on a vowel: what comes out has the F0 asked for, and the spoiled melodies are what they say."""

import doctest

import numpy as np
import pytest
from fake_vowel import falling

from speech import melody_edits
from speech.melody_edits import (
    PEAK,
    difference_st,
    flattened,
    melody_of,
    mistimed,
    swapped,
    with_melody,
)

RATE = 16_000


def test_worked_numbers():
    assert doctest.testmod(melody_edits) == (0, 1)


@pytest.mark.parametrize("shift_st", [0.0, 3.0])
def test_a_clip_gets_the_melody_it_is_given(shift_st):
    wav = falling(1.2, 180, 120)
    melody = melody_of(wav)
    # 180 to 120 Hz is 12 log2(1.5) = 7.02 semitones of movement
    assert melody[0] - melody[-1] == pytest.approx(7.02, abs=0.6)
    edited = with_melody(wav, melody + shift_st)
    assert abs(len(edited) - len(wav)) < 0.01 * RATE and np.abs(edited).max() == pytest.approx(PEAK)
    after = melody_of(edited)
    places = np.linspace(0, 1, 50)
    before_at, after_at = (np.interp(places, np.linspace(0, 1, len(m)), m) for m in (melody, after))
    assert np.abs(after_at - before_at - shift_st).max() < 0.7


def test_flattened_keeps_the_median_and_little_movement():
    melody = np.array([1.0, 2.0, 3.0, 7.0, 9.0])
    for seed in range(20):
        flat = flattened(melody, np.random.default_rng(seed))
        assert np.median(flat) == pytest.approx(3.0)
        assert np.ptp(flat) <= 0.3 * np.ptp(melody) + 1e-9


def test_swapped_has_the_other_movement_at_its_own_median():
    melody, other = np.full(9, 50.0), np.array([10.0, 12.0, 14.0])
    assert swapped(melody, other).tolist() == [48.0, 48.5, 49.0, 49.5, 50.0, 50.5, 51.0, 51.5, 52.0]


def test_mistimed_has_the_same_values_elsewhere():
    melody = np.arange(40.0)
    seen = set()
    for seed in range(20):
        late = mistimed(melody, np.random.default_rng(seed))
        assert sorted(late) == melody.tolist() and difference_st(late, melody) > 5
        seen.add("reversed" if late[0] == 39 else "late")
    assert seen == {"reversed", "late"}
