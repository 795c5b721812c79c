"""Degraded copies: each is what its name says, and the same for the same seed."""

import numpy as np
import pytest

from metrics.degraded_copies import DEGRADATIONS, PIECE, garbled, hurried, noisy
from speech.tokens import SAMPLE_RATE


@pytest.fixture
def voice() -> np.ndarray:
    """Two seconds at 120 Hz with eight harmonics, swelling and fading four times a second."""
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    wave = sum(np.sin(2 * np.pi * 120 * n * t) / n for n in range(1, 9))
    return (0.1 * wave * (1 + np.sin(2 * np.pi * 4 * t))).astype(np.float32)


def test_hurried_is_shorter_at_the_same_pitch(voice):
    wav = hurried(voice, np.random.default_rng(0))
    assert len(wav) == pytest.approx(len(voice) / 2.2, rel=0.05)
    spectrum = np.abs(np.fft.rfft(wav))
    assert spectrum.argmax() * SAMPLE_RATE / len(wav) == pytest.approx(120, abs=10)


def test_noisy_has_a_signal_to_noise_ratio_of_0_db(voice):
    noise = noisy(voice, np.random.default_rng(0)) - voice
    assert 20 * np.log10(voice.std() / noise.std()) == pytest.approx(0, abs=0.1)


def test_garbled_has_every_sample_and_no_piece_in_its_place(voice):
    clip = voice + np.linspace(0, 0.01, len(voice), dtype=np.float32)  # no piece is like another
    for seed in range(20):
        wav = garbled(clip, np.random.default_rng(seed))
        assert sorted(wav) == sorted(clip)
        assert not any(np.array_equal(wav[i : i + PIECE], clip[i : i + PIECE]) for i in range(0, len(clip), PIECE))


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_seed_decides(kind, voice):
    first, again = (DEGRADATIONS[kind](voice, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first, again) and first.dtype == np.float32
