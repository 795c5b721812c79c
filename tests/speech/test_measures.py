"""The spread of F0 of known contours, and repetition by hand."""

import math

import numpy as np
import pytest

from speech.measures import is_repetitive, log_f0_std, longest_periodic_stretch
from speech.tokens import SAMPLE_RATE


def test_log_f0_std_of_known_contours():
    """A tone that swings evenly by ±20 % in ln F0 has a standard deviation of 0.2 / √2 = 0.1414."""
    t = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    for swing in (0.0, 0.2):
        f0 = 150 * np.exp(swing * np.sin(2 * np.pi * t))
        phase = 2 * np.pi * np.cumsum(f0) / SAMPLE_RATE
        wav = sum(np.sin(k * phase) / k for k in range(1, 6)) * 0.1
        assert log_f0_std(wav.astype(np.float32)) == pytest.approx(swing / math.sqrt(2), abs=0.01)
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
    assert math.isnan(log_f0_std(np.zeros(SAMPLE_RATE, np.float32)))
    assert math.isnan(log_f0_std(noise[:100]))


def test_longest_periodic_stretch_by_hand():
    assert longest_periodic_stretch("a b a b a c".split(), 2) == 3  # its third to its fifth unit
    assert longest_periodic_stretch("a b a b a c".split(), 1) == 0
    assert longest_periodic_stretch("xaaaay", 1) == 3
    assert longest_periodic_stretch([5] * 4 + [6] + [5] * 6, 1) == 5  # the longer of two
    assert longest_periodic_stretch([], 1) == longest_periodic_stretch([1, 2], 4) == 0


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([5] * 25, True),
        ([5] * 24, False),
        ([1, 2, 3] * 9, True),
        ([1, 2, 3] * 8, False),
        ([*range(8)] * 4, True),
        ([*range(9)] * 4, False),  # 0.18 s may be two syllables
        (list(range(60)), False),
        ([], False),
        ([1], False),
        (list(range(20)) + [7] * 25, True),
    ],
)
def test_repetition(codes, expected):
    assert is_repetitive(codes) is expected
