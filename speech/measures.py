"""Measures of a clip that need no model: the spread of F0, repetition."""

from collections.abc import Sequence

import numpy as np
import parselmouth

from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE

PITCH_FLOOR, PITCH_CEILING = 65.0, 400.0  # Hz: a low man's voice to a high woman's
MIN_VOICED_FRAMES = 10  # of 10 ms
MIN_SECONDS = 3 / PITCH_FLOOR  # Praat's window; a shorter clip has no pitch to speak of

REPEATED_SPAN_S = 0.5  # longer than any held vowel or pause inside a sentence
LONGEST_PERIOD = 8  # codes: 0.16 s; three times in REPEATED_SPAN_S, so that what fills it is a pattern


def log_f0_std(wav: np.ndarray) -> float:
    """Standard deviation of ln F0 over voiced frames, by Praat's autocorrelation; NaN without a voice.

    Natural-log units: 0.12 is two semitones (12 · 0.12 / ln 2 = 2.08).

    Args:
        wav: float32 mono at 16 kHz, shape (n_samples,), finite.
    """
    if len(wav) <= MIN_SECONDS * SAMPLE_RATE:
        return float("nan")
    # Praat shares the frames of a clip among the cores itself: worker processes would gain next to nothing.
    sound = parselmouth.Sound(wav.astype(np.float64), SAMPLE_RATE)
    pitch = sound.to_pitch_ac(time_step=0.01, pitch_floor=PITCH_FLOOR, pitch_ceiling=PITCH_CEILING)
    f0 = pitch.selected_array["frequency"]
    voiced = f0[f0 > 0]
    return float(np.log(voiced).std()) if len(voiced) >= MIN_VOICED_FRAMES else float("nan")


def longest_periodic_stretch(units: Sequence, period: int) -> int:
    """Length of the longest stretch in which every unit equals the one `period` places before it.

    'a b a b a c' has 3 for period 2, its third to its fifth unit, and 0 for period 1.
    """
    longest = 0
    stretch = 0
    for earlier, later in zip(units, units[period:], strict=False):
        stretch = stretch + 1 if earlier == later else 0
        longest = max(longest, stretch)
    return longest


def is_repetitive(codes: list[int]) -> bool:
    """True if half a second or more of the codes is one pattern of at most 0.16 s, over and over.

    The usual failure of a speech policy: it holds one code, or loops over a few.
    Example: 25 equal codes in a row are 0.5 s and repetitive; 24 are not.
    """
    span = int(REPEATED_SPAN_S * CODES_PER_SECOND)
    for period in range(1, LONGEST_PERIOD + 1):
        if longest_periodic_stretch(codes, period) + period >= span:
            return True
    return False
