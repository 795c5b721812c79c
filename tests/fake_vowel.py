"""A signal like a sung vowel, for tests of melody without a voice."""

import numpy as np

SAMPLE_RATE = 16_000
FORMANTS_HZ = (500.0, 1500.0, 2500.0)


def vowel(f0_hz: np.ndarray) -> np.ndarray:
    """Harmonics of a fundamental frequency given for every sample, shaped by three formants, peak at 0.5."""
    phase = 2 * np.pi * np.cumsum(f0_hz) / SAMPLE_RATE
    wav = np.zeros(len(f0_hz))
    for harmonic in range(1, 25):
        frequency = harmonic * f0_hz
        level = sum(np.exp(-(((frequency - formant) / 200) ** 2)) for formant in FORMANTS_HZ) + 0.05
        wav += level * np.sin(harmonic * phase)
    return (0.5 * wav / np.abs(wav).max()).astype(np.float32)


def falling(seconds: float, first_hz: float, last_hz: float) -> np.ndarray:
    """A vowel whose F0 falls linearly."""
    return vowel(np.linspace(first_hz, last_hz, int(seconds * SAMPLE_RATE)))
