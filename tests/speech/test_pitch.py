"""F0, level and silences of made clips."""

import numpy as np
import pytest

from speech.pitch import levels_db, pitch_track, silences
from speech.tokens import SAMPLE_RATE


def hum(f0_hz, duration_s: float, amplitude: float = 0.3) -> np.ndarray:
    f0 = np.broadcast_to(f0_hz, round(duration_s * SAMPLE_RATE))
    phase = 2 * np.pi * np.cumsum(f0) / SAMPLE_RATE
    return (amplitude * (np.sin(phase) + 0.5 * np.sin(2 * phase))).astype(np.float32)


QUIET = np.zeros(SAMPLE_RATE // 2, np.float32)


def test_f0_of_a_hum_in_semitones():
    track = pitch_track(np.concatenate([hum(110, 0.5), QUIET, hum(165, 0.5)]))
    low, high = track.f0[track.between(0.1, 0.4)], track.f0[track.between(1.1, 1.4)]
    assert np.median(low) == pytest.approx(12 * np.log2(110), abs=0.1)
    assert np.median(high - np.median(low)) == pytest.approx(12 * np.log2(1.5), abs=0.1)  # 7.02
    assert not track.between(0.6, 0.9).any()


def test_an_octave_error_is_no_movement():
    """A voice that halves its F0 for a moment, as creak does, stays within its own range."""
    track = pitch_track(np.concatenate([hum(200, 1.0), hum(100, 0.06), hum(200, 1.0)]))
    assert track.f0.min() > 12 * np.log2(0.6 * 200)


def test_a_faint_hum_is_left_out():
    track = pitch_track(np.concatenate([hum(150, 0.5), QUIET, hum(150, 0.5, amplitude=0.01)]))  # 30 dB below
    assert track.times.max() < 0.6


@pytest.mark.parametrize("wav", [np.zeros(0, np.float32), np.zeros(300, np.float32), QUIET])
def test_no_voice(wav):
    assert len(pitch_track(wav).times) == 0


def test_level_of_a_sine():
    sine = np.sin(2 * np.pi * 400 * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
    assert levels_db(sine, [0.3, 0.5]) == pytest.approx([-3.01, -3.01], abs=0.01)
    assert levels_db(QUIET, [0.1])[0] == pytest.approx(-120)
    assert levels_db(sine, [5.0])[0] == pytest.approx(-120)  # outside of the clip


def test_silences():
    wav = np.concatenate([hum(150, 0.5), np.zeros(3_200, np.float32), hum(150, 0.5), np.zeros(1_600, np.float32)])
    [(start_s, end_s)] = silences(wav, 0.15)
    assert (start_s, end_s) == pytest.approx((0.5, 0.7), abs=0.03)
    assert len(silences(wav, 0.05)) == 2
    assert silences(np.zeros(0, np.float32), 0.1) == []
