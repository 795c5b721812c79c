"""The melody of a text by a known rule. Whether a clip has it, tiny/judge_melody.py tells.

A neutral clip becomes a question by a rise of F0 at its end, and one of its words is emphasised by a higher F0, a
longer duration and a higher level; both by Praat's overlap-add (Moulines & Charpentier 1990). A statement stays as it
was spoken.
"""

from dataclasses import dataclass

import numpy as np
import parselmouth
from parselmouth.praat import call

from speech.melody_edits import analysed, pitch_range, resynthesized, set_f0
from speech.tokens import SAMPLE_RATE

# The rule
QUESTION_F0 = 1.7  # F0 at the end of a question, relative to the clip's median
QUESTION_RISE_S = 0.35  # duration of the rise; it ends with the last voiced sound
EMPHASIS_F0 = 1.45  # factor, 6.4 semitones
EMPHASIS_LENGTH = 1.25  # factor
EMPHASIS_LEVEL_DB = 4.0
RAMP_S = 0.03  # from neutral to emphasised at the edges of the word, and back

# Random melodies
SHIFT_ST, WOBBLE_ST = 2.5, 3.0  # deviations of a clip's shift, and of each knot's around it
WOBBLE_RANGE_ST = (-5.0, 6.0)
KNOT_S = 0.3
F0_RANGE_HZ = (60.0, 450.0)

# F0
MIN_STRETCH_S, MAX_BELOW_DB = 0.05, 16.0  # a voiced stretch's length, and its loudest frame below the clip's
FRAME_S = 0.01
OCTAVE_JUMP_COST = 0.7  # twice Praat's default: joe's F0 sinks to the floor at the end of a sentence


@dataclass(frozen=True)
class Word:
    """A word of a clip: its spelling, start and end in s."""

    text: str
    start_s: float
    end_s: float


def with_question(wav: np.ndarray) -> np.ndarray:
    """The clip with a rise of F0 over the last QUESTION_RISE_S of its voiced sound, to QUESTION_F0 times its median.

    Args:
        wav: float32 mono at 16 kHz, shape (n_samples,); a clip without a voice is returned as it is.
    """
    voiced, _ = f0_track(wav)
    manipulation, times, f0 = analysed(wav)
    if len(voiced) == 0 or len(times) == 0:
        return wav
    end_s, top = voiced[-1], QUESTION_F0 * np.median(f0)
    start_s = max(times[0], end_s - QUESTION_RISE_S)
    before = times < start_s
    bottom = f0[before][-1] if before.any() else f0[0]
    progress = np.clip((times - start_s) / max(end_s - start_s, FRAME_S), 0, 1)
    risen = np.where(before, f0, bottom * (top / bottom) ** progress)
    set_f0(manipulation, times, risen)
    return resynthesized(manipulation)


def with_emphasis(wav: np.ndarray, start_s: float, end_s: float) -> tuple[np.ndarray, float]:
    """The clip with the word from `start_s` to `end_s` higher, longer and louder; and the word's new end in s."""
    ramp = [start_s, start_s + RAMP_S, max(start_s + RAMP_S, end_s - RAMP_S), end_s]
    time_s = np.arange(len(wav)) / SAMPLE_RATE
    louder = wav * 10 ** (EMPHASIS_LEVEL_DB / 20 * np.interp(time_s, ramp, [0, 1, 1, 0]))
    manipulation, times, f0 = analysed(louder)
    if len(times):
        set_f0(manipulation, times, f0 * EMPHASIS_F0 ** np.interp(times, ramp, [0, 1, 1, 0]))
    durations = call("Create DurationTier", "durations", 0, len(wav) / SAMPLE_RATE)
    edge = 0.001  # the tier is piecewise linear
    for time, factor in [(start_s - edge, 1), (start_s, EMPHASIS_LENGTH), (end_s, EMPHASIS_LENGTH), (end_s + edge, 1)]:
        call(durations, "Add point", time, factor)
    call([manipulation, durations], "Replace duration tier")
    return resynthesized(manipulation), start_s + (end_s - start_s) * EMPHASIS_LENGTH


def with_random_melody(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip at another pitch and with another F0 contour, piecewise linear in semitones around its own.

    A codec that learns from recordings alone lowers the few high ones to the usual F0 of their sounds.
    """
    manipulation, times, f0 = analysed(wav)
    if len(times) == 0:
        return wav
    knots = np.arange(0, len(wav) / SAMPLE_RATE + KNOT_S, KNOT_S)
    wobble = rng.normal(0, WOBBLE_ST, len(knots)).clip(*WOBBLE_RANGE_ST)
    moved_st = rng.normal(0, SHIFT_ST) + np.interp(times, knots, wobble)
    set_f0(manipulation, times, (f0 * 2 ** (moved_st / 12)).clip(*F0_RANGE_HZ))
    return resynthesized(manipulation)


def f0_track(wav: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times in s of the voiced frames, 10 ms apart, and their F0 in semitones above 1 Hz.

    Stretches that are short or far below the loudest are left out: Praat finds a voice in breath and creak, too.
    """
    sound = parselmouth.Sound(wav.astype(np.float64), SAMPLE_RATE)
    floor, ceiling = pitch_range(sound)
    pitch = sound.to_pitch_ac(
        time_step=FRAME_S, pitch_floor=floor, pitch_ceiling=ceiling, octave_jump_cost=OCTAVE_JUMP_COST
    )
    f0 = pitch.selected_array["frequency"]
    times, f0 = pitch.xs()[f0 > 0], f0[f0 > 0]
    level = np.array([frame_level_db(wav, time) for time in times])
    kept = np.zeros(len(times), bool)
    for stretch in np.split(np.arange(len(times)), np.flatnonzero(np.diff(times) > 1.5 * FRAME_S) + 1):
        long_enough = len(stretch) * FRAME_S >= MIN_STRETCH_S
        kept[stretch] = long_enough and level[stretch].max() > level.max() - MAX_BELOW_DB
    return times[kept], 12 * np.log2(f0[kept])


def frame_level_db(wav: np.ndarray, time_s: float) -> float:
    """RMS level in dB of 25 ms around a time."""
    middle, half = int(time_s * SAMPLE_RATE), int(0.0125 * SAMPLE_RATE)
    frame = wav[max(0, middle - half) : middle + half]
    return 10 * np.log10(np.mean(frame**2) + 1e-12)
