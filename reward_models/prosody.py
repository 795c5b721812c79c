"""Rewards that keep prosody alive beside an intelligibility reward (arXiv 2509.18569, R2 and R3).

A policy rewarded for being understood learns to speak slowly and flatly (arXiv 2509.18531 saw pitch collapse
with the WER + NLL reward on this very model).
"""

import numpy as np
import parselmouth

from speech_tokens import SAMPLE_RATE

PITCH_FLOOR, PITCH_CEILING = 65.0, 400.0  # Hz: a low man's voice to a high woman's
MIN_VOICED_FRAMES = 10  # of 10 ms
MIN_SECONDS = 3 / PITCH_FLOOR  # Praat's window; a shorter clip has no pitch to speak of


def log_f0_std(wav: np.ndarray) -> float:
    """Standard deviation of ln F0 over voiced frames, by Praat's autocorrelation; NaN without a voice.

    Natural-log units: 0.12 is two semitones (12 · 0.12 / ln 2 = 2.08).

    Args:
        wav: float32 mono at 16 kHz, finite.
    """
    if len(wav) <= MIN_SECONDS * SAMPLE_RATE:
        return float("nan")
    sound = parselmouth.Sound(wav.astype(np.float64), SAMPLE_RATE)
    pitch = sound.to_pitch_ac(time_step=0.01, pitch_floor=PITCH_FLOOR, pitch_ceiling=PITCH_CEILING)
    f0 = pitch.selected_array["frequency"]
    voiced = f0[f0 > 0]
    return float(np.log(voiced).std()) if len(voiced) >= MIN_VOICED_FRAMES else float("nan")


def duration_reward(lengths: np.ndarray) -> np.ndarray:
    """R2_i = −| |o_i| − T_m | / T_m, T_m the median length of the group, in (−∞, 0] (arXiv 2509.18569, §3.2).

    Lengths 40, 50, 60: T_m = 50, rewards −0.2, 0, −0.2. A group whose median is 0 said nothing: all −1.

    Args:
        lengths: codes per rollout, shape (prompts, group_size).
    Returns:
        the same shape.
    """
    median = np.median(lengths, axis=1, keepdims=True)
    return np.where(median > 0, -np.abs(lengths - median) / np.maximum(median, 1), -1.0)


class DurationReward:
    """`duration_reward` of the number of codes: keeps the policy from slowing down or rushing."""

    __name__ = "duration"
    needs = ()

    def __init__(self, listener):
        self.listener = listener

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.listener.hear(completion_ids, text, language, log_metric)
        lengths = rollouts.grouped([len(codes) for codes in rollouts.codes])
        return duration_reward(lengths).flatten().tolist()


class LogF0SpreadReward:
    """Spread of ln F0, the second term of R3: min(std, ceiling), 0 without a voice or where the rollout failed.

    Args:
        ceiling: natural-log units. Read speech lies at 0.15 to 0.3; beyond that the spread is octave
            errors and breaks of the voice, which must not be worth anything.
    """

    __name__ = "log_f0_spread"
    needs = ("codec",)

    def __init__(self, listener, ceiling: float = 0.3):
        if ceiling <= 0:
            raise ValueError(f"ceiling must be above 0, got {ceiling}")
        self.listener, self.ceiling = listener, ceiling

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.listener.hear(completion_ids, text, language, log_metric)
        return [
            0.0 if failure or np.isnan(std) else min(std, self.ceiling)
            for std, failure in zip(rollouts.log_f0_stds, rollouts.failures, strict=True)
        ]
