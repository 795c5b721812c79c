"""Copies of a clip that are plainly worse than it: the attention checks of a listening test."""

from collections.abc import Callable

import numpy as np
import parselmouth

from speech.measures import PITCH_CEILING, PITCH_FLOOR
from speech.tokens import SAMPLE_RATE

HURRY = 2.2  # times the pace: few syllables are left whole
PIECE = SAMPLE_RATE // 8  # samples, 125 ms: shorter than a syllable
MIN_DURATION_S = 1.0  # of a clip to copy: eight pieces


def hurried(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip at `HURRY` times its pace and its own pitch, by Praat's overlap-add: 2.2 s become 1 s."""
    # Praat draws the periods of unvoiced stretches from a generator of its own
    parselmouth.praat.run(f"random_initializeWithSeedUnsafelyButPredictably ({rng.integers(2**31)})")
    sound = parselmouth.Sound(wav.astype(np.float64), SAMPLE_RATE)
    shorter = parselmouth.praat.call(sound, "Lengthen (overlap-add)", PITCH_FLOOR, PITCH_CEILING, 1 / HURRY)
    return shorter.values[0].astype(np.float32)


def noisy(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise as loud as the clip is added: 0 dB signal-to-noise ratio."""
    return (wav + rng.normal(0, wav.std(), len(wav))).astype(np.float32)


def garbled(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip's pieces of 125 ms in a random order, none in its place: each has a sound of speech, no word is left."""
    pieces = np.array_split(wav, max(2, len(wav) // PIECE))
    order = rng.permutation(len(pieces))
    next_of = np.roll(order, 1)  # a permutation that is one cycle leaves nothing where it was
    places = dict(zip(order.tolist(), next_of.tolist(), strict=True))
    return np.concatenate([pieces[places[i]] for i in range(len(pieces))])


DEGRADATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "hurried": hurried,
    "noisy": noisy,
    "garbled": garbled,
}
