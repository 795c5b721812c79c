"""Change the F0 of a clip by Praat's overlap-add (Moulines & Charpentier 1990), and three ways to spoil its melody.

A resynthesis is not the recording: it has Praat's sound, and a peak of PEAK. Two clips that are to differ in melody
alone must both be one.
"""

import numpy as np
import parselmouth
from parselmouth.praat import call

from speech.measures import PITCH_FLOOR
from speech.pitch import STEP_S, VOICE_RANGE, voice_range
from speech.tokens import SAMPLE_RATE

PEAK = 0.5
MIN_VOICED = 20  # frames of 10 ms: with less voice a clip has no melody to speak of

FLATTENED = (0.0, 0.3)  # of the distance to the clip's median, what is left
SHIFTED = (0.25, 0.75)  # of the voiced frames, by which a contour comes too late


def analysed(wav: np.ndarray) -> tuple[parselmouth.Data, np.ndarray, np.ndarray]:
    """Praat's Manipulation object, and the times in s and the F0 in Hz of its voiced frames.

    Args:
        wav: float mono at 16 kHz, shape (n_samples,), long enough for Praat's analysis (`speech.measures.MIN_SECONDS`).
    """
    sound = parselmouth.Sound(wav.astype(np.float64), SAMPLE_RATE)
    manipulation = call(sound, "To Manipulation", STEP_S, *pitch_range(sound))
    tier = call(manipulation, "Extract pitch tier")
    count = call(tier, "Get number of points")
    times = np.array([call(tier, "Get time from index", i + 1) for i in range(count)])
    f0 = np.array([call(tier, "Get value at index", i + 1) for i in range(count)])
    return manipulation, times, f0


def pitch_range(sound: parselmouth.Sound) -> tuple[float, float]:
    """Lowest and highest F0 in Hz to look for in a clip; otherwise creak is an octave off."""
    return voice_range(sound) or (PITCH_FLOOR, VOICE_RANGE[1] * PITCH_FLOOR)


def set_f0(manipulation: parselmouth.Data, times: np.ndarray, f0: np.ndarray) -> None:
    """Give the voiced frames at these times in s this F0 in Hz, linear in between."""
    tier = call(manipulation, "Extract pitch tier")
    call(tier, "Remove points between", 0, times[-1] + 1)
    for time, value in zip(times, f0, strict=True):
        call(tier, "Add point", time, value)
    call([manipulation, tier], "Replace pitch tier")


def resynthesized(manipulation: parselmouth.Data) -> np.ndarray:
    """The clip with the F0 and the durations that it was given: float32 mono at 16 kHz, peak at PEAK."""
    wav = call(manipulation, "Get resynthesis (overlap-add)").values[0]
    return (wav * (PEAK / np.abs(wav).max())).astype(np.float32)


# --- Melodies ---------------------------------------------------------------------------------------------
# A melody is the F0 of a clip's voiced frames in semitones above 1 Hz, 12 log2 of the F0 in Hz: shape (frames,).


def with_melody(wav: np.ndarray, melody: np.ndarray) -> np.ndarray:
    """The clip with another F0 on its voiced frames, those of `melody_of(wav)`; resynthesized also for its own."""
    manipulation, times, _ = analysed(wav)
    set_f0(manipulation, times, 2 ** (melody / 12))
    return resynthesized(manipulation)


def melody_of(wav: np.ndarray) -> np.ndarray:
    return 12 * np.log2(analysed(wav)[2])


def flattened(melody: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The melody pressed towards its median; up to 0.3 of its movement is left."""
    return np.median(melody) + rng.uniform(*FLATTENED) * (melody - np.median(melody))


def swapped(melody: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The melody of another clip over the same frames, at this one's median."""
    places = np.linspace(0, len(other) - 1, len(melody))
    return np.interp(places, np.arange(len(other)), other) - np.median(other) + np.median(melody)


def mistimed(melody: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The melody from its end to its beginning, or a quarter to three quarters of it too late, its end in front."""
    if rng.random() < 0.5:
        return melody[::-1]
    return np.roll(melody, round(rng.uniform(*SHIFTED) * len(melody)))


def difference_st(one: np.ndarray, other: np.ndarray) -> float:
    """RMS difference of two melodies of as many frames, at the same mean, in semitones: 0 for a transposed one.

    >>> difference_st(np.array([1.0, 3.0, 1.0, 3.0]), np.array([10.0, 10.0, 10.0, 10.0]))
    1.0
    """
    return float(np.std(one - other))
