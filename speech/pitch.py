"""F0 and level of a clip over time: what the rewards of melody measure with."""

from dataclasses import dataclass

import numpy as np
import parselmouth

from speech.measures import MIN_SECONDS, PITCH_CEILING, PITCH_FLOOR
from speech.tokens import SAMPLE_RATE

STEP_S = 0.01
VOICE_RANGE = (0.6, 2.0)  # F0 of a clip, around its median; what is outside is an octave error
OCTAVE_JUMP_COST = 0.7  # twice Praat's default: at the end of a sentence a low voice jumps between octaves
MIN_STRETCH = 5  # frames; Praat finds a voice in shorter bits of noise
MAX_BELOW_DB = 16.0  # of a stretch below the clip's loudest frame; creak and breath lie lower
SILENCE_BELOW_DB = 25.0  # of a frame below the clip's loudest


@dataclass(frozen=True)
class PitchTrack:
    """The voiced frames of a clip.

    Attributes (arrays of one value a frame):
        times: s.
        f0: semitones above 1 Hz, 12 log2 of the F0 in Hz.
        level: RMS of 25 ms, dB.
    """

    times: np.ndarray
    f0: np.ndarray
    level: np.ndarray

    def between(self, start_s: float, end_s: float) -> np.ndarray:
        """Which frames lie in a stretch of time, bool."""
        return (self.times >= start_s) & (self.times < end_s)


def pitch_track(wav: np.ndarray) -> PitchTrack:
    """Voiced frames 10 ms apart, by Praat's autocorrelation in the range of this voice; none in a clip without voice.

    Args:
        wav: float32 mono at 16 kHz, shape (n_samples,), finite.
    """
    nothing = np.zeros(0)
    if len(wav) <= MIN_SECONDS * SAMPLE_RATE:
        return PitchTrack(nothing, nothing, nothing)
    sound = parselmouth.Sound(wav.astype(np.float64), SAMPLE_RATE)
    searched = voice_range(sound)
    if searched is None or len(wav) <= 3 / searched[0] * SAMPLE_RATE:
        return PitchTrack(nothing, nothing, nothing)
    floor, ceiling = searched
    pitch = sound.to_pitch_ac(
        time_step=STEP_S, pitch_floor=floor, pitch_ceiling=ceiling, octave_jump_cost=OCTAVE_JUMP_COST
    )
    f0 = pitch.selected_array["frequency"]
    times, f0 = pitch.xs()[f0 > 0], f0[f0 > 0]
    level = levels_db(wav, times)
    kept = np.zeros(len(times), bool)
    for stretch in np.split(np.arange(len(times)), np.flatnonzero(np.diff(times) > 1.5 * STEP_S) + 1):
        if len(stretch) >= MIN_STRETCH:
            kept[stretch] = level[stretch].max() > level.max() - MAX_BELOW_DB
    return PitchTrack(times[kept], 12 * np.log2(f0[kept]), level[kept])


def voice_range(sound: parselmouth.Sound) -> tuple[float, float] | None:
    """Lowest and highest F0 in Hz to look for in a clip, around its median; None without voice."""
    pitch = sound.to_pitch_ac(time_step=STEP_S, pitch_floor=PITCH_FLOOR, pitch_ceiling=PITCH_CEILING)
    f0 = pitch.selected_array["frequency"]
    if not (f0 > 0).any():
        return None
    median = np.median(f0[f0 > 0])
    return max(PITCH_FLOOR, VOICE_RANGE[0] * median), min(PITCH_CEILING, VOICE_RANGE[1] * median)


def levels_db(wav: np.ndarray, times: np.ndarray) -> np.ndarray:
    """RMS level in dB of the 25 ms around each time in s; a sine of amplitude 1 has −3.01."""
    half = int(0.0125 * SAMPLE_RATE)
    squares = np.concatenate([[0.0], np.cumsum(np.square(wav, dtype=np.float64))])
    middles = (np.asarray(times) * SAMPLE_RATE).astype(int)
    first, after = np.clip(middles - half, 0, len(wav)), np.clip(middles + half, 0, len(wav))
    return 10 * np.log10((squares[after] - squares[first]) / np.maximum(after - first, 1) + 1e-12)


def silences(wav: np.ndarray, min_s: float) -> list[tuple[float, float]]:
    """Start and end in s of the stretches of at least `min_s` that are 25 dB or more below the clip's loudest frame."""
    times = np.arange(STEP_S / 2, len(wav) / SAMPLE_RATE, STEP_S)
    if len(times) == 0:
        return []
    level = levels_db(wav, times)
    quiet = np.concatenate([[False], level < level.max() - SILENCE_BELOW_DB, [False]])
    edges = np.flatnonzero(np.diff(quiet)) * STEP_S
    return [(float(a), float(b)) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= min_s - 1e-9]
