"""Reward of the pitch height: the mean F0 against the voice prompt's, or against a frequency.

GLASS (arXiv 2606.05889) trains a LoRA a style axis by GRPO, one of them the mean F0; it publishes no code.
"""

import math

import numpy as np

from common.averages import mean_of_known
from common.cli import InputError
from speech.measures import MIN_VOICED_FRAMES
from speech.pitch import PitchTrack

FULL_WITHIN = 0.5  # semitones from the target; mean F0 of the same speaker varies as much from text to text
ZERO_AT = 6.0  # semitones from the target: half an octave


def mean_pitch(track: PitchTrack) -> float:
    """Mean F0 of the voiced frames, semitones above 1 Hz; NaN of a clip with less than 0.1 s of voice."""
    return float(track.f0.mean()) if len(track.f0) >= MIN_VOICED_FRAMES else math.nan


def height_reward(height: float, target: float) -> float:
    """1 within 0.5 semitones of the target, falling linearly to 0 at 6; 0 without a voice (NaN).

    Height 1, target 3: 2 off, of which 1.5 count, 1 − 1.5 / 5.5 = 0.7273.

    >>> round(height_reward(1.0, 3.0), 4), height_reward(3.4, 3.0), height_reward(-4.0, 3.0)
    (0.7273, 1.0, 0.0)
    >>> height_reward(math.nan, 3.0)
    0.0
    """
    if math.isnan(height):
        return 0.0
    return float(np.clip(1 - (abs(height - target) - FULL_WITHIN) / (ZERO_AT - FULL_WITHIN), 0, 1))


class PitchHeightReward:
    """`height_reward` of the mean F0 in semitones above (below: negative) the reference, in [0, 1].

    The reference is the voice prompt's mean F0, as the codec decodes its codes, or `reference_hz`. A failed rollout and
    one without a voice earn 0; a row whose voice prompt has no voice has no reward (None, which TRL leaves out).

    How it is hacked: with another voice, a higher one; with a single high vowel, all else devoiced; with octave errors
    of the tracker. `speaker_similarity` holds the voice, `whisper` the words, `speech.pitch` keeps F0 to 0.6 to 2 times
    the clip's median; and more than the target earns less.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec.
        target: semitones above the reference; 0 is the reference itself.
        reference_hz: F0, for policies of one voice without voice prompts; None: the voice prompt's.
    Raises:
        InputError: a reference that is not a frequency above 0.
    """

    __name__ = "pitch_height"
    needs = ("codec",)

    def __init__(self, rollout_scorer, target: float = 0.0, reference_hz: float | None = None):
        if reference_hz is not None and not reference_hz > 0:
            raise InputError(f"reference_hz: must be > 0, a mean F0 in Hz (got {reference_hz})")
        self.rollout_scorer, self.target, self.reference_hz = rollout_scorer, target, reference_hz
        self.needs_voice_prompt = reference_hz is None

    def __call__(self, completion_ids, text, ref_codes=None, language=None, log_metric=None, **_) -> list[float | None]:
        """Args: ref_codes: the codes of each rollout's voice prompt; not used with `reference_hz`."""
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        if self.reference_hz is not None:
            references = [12 * math.log2(self.reference_hz)] * len(text)
        else:
            references = [mean_pitch(track) for track in self.rollout_scorer.prompt_pitch_tracks(ref_codes)]
        heights = [
            math.nan if failure else mean_pitch(rollouts.pitch_track(i)) - reference
            for i, (failure, reference) in enumerate(zip(rollouts.failures, references, strict=True))
        ]
        if log_metric is not None:
            log_metric("pitch_height", mean_of_known(heights))
        return [
            None if math.isnan(reference) else height_reward(height, self.target)
            for height, reference in zip(heights, references, strict=True)
        ]
