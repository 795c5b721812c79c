"""Reward of the variation of F0 and of energy: liveliness, against the voice prompt's or against a target.

VoiceTTA (arXiv 2606.26534) adapts to a voice with |CV(F0) − CV(F0 of the prompt)| and the same of the energy, beside
speaker similarity and Whisper's WER; it publishes no code. Here the difference is bounded.
"""

import math

import numpy as np

from common.averages import mean_of_known
from common.cli import InputError
from speech.measures import MIN_VOICED_FRAMES
from speech.pitch import PitchTrack

SMALLEST_TARGET = 0.05  # a flatter voice prompt is a tone; a difference is then not divided by next to nothing


def coefficient_of_variation(values: np.ndarray) -> float:
    """CV: standard deviation / mean. Of small variation it is the standard deviation of the logarithm.

    Of 90, 100 and 110 Hz: √(200 / 3) / 100 = 0.0816.

    >>> round(coefficient_of_variation(np.array([90.0, 100.0, 110.0])), 4)
    0.0816
    """
    return float(values.std() / values.mean())


def variations(track: PitchTrack) -> tuple[float, float]:
    """CV of F0 in Hz and CV of the RMS level, over the voiced frames; NaN of a clip with less than 0.1 s of voice.

    Pauses are not in it: the longer they were, the more the energy would vary.
    """
    if len(track.f0) < MIN_VOICED_FRAMES:
        return math.nan, math.nan
    return coefficient_of_variation(2 ** (track.f0 / 12)), coefficient_of_variation(10 ** (track.level / 20))


def variation_reward(cv: float, target: float) -> float:
    """1 − |CV − target| / max(target, 0.05), at least 0: 1 at the target, 0 at twice as much and at none; 0 of NaN.

    0.15 where 0.20 is wanted: 1 − 0.05 / 0.20 = 0.75.

    >>> round(variation_reward(0.15, 0.20), 4), variation_reward(0.0, 0.2), variation_reward(0.5, 0.2)
    (0.75, 0.0, 0.0)
    """
    return 0.0 if math.isnan(cv) else max(0.0, 1 - abs(cv - target) / max(target, SMALLEST_TARGET))


class VariationReward:
    """The mean of `variation_reward` of F0 and of energy, in [0, 1].

    Without targets both are the voice prompt's, as the codec decodes its codes. With targets only those count that are
    given, and voice prompts play no part. A failed rollout and one without a voice earn 0; a row whose voice prompt has
    no voice has no reward (None, which TRL leaves out).

    How it is hacked: a wobble, or one squeaking or loud vowel, varies as much as a melody; two voices in one clip more.
    More than the target earns less, `speech.pitch` keeps F0 to 0.6 to 2 times the clip's median, `whisper` holds the
    words. A wobble within these bounds is not stopped: listen.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec.
        f0_cv, energy_cv: target CVs. Read speech has F0 of 0.15 to 0.3.
    Raises:
        InputError: a target that is not above 0.
    """

    __name__ = "variation"
    needs = ("codec",)

    def __init__(self, rollout_scorer, f0_cv: float | None = None, energy_cv: float | None = None):
        for name, target in (("f0_cv", f0_cv), ("energy_cv", energy_cv)):
            if target is not None and not target > 0:
                raise InputError(f"{name}: must be > 0, standard deviation / mean (got {target})")
        self.rollout_scorer = rollout_scorer
        self.targets = (f0_cv, energy_cv)
        self.needs_voice_prompt = f0_cv is None and energy_cv is None

    def __call__(self, completion_ids, text, ref_codes=None, language=None, log_metric=None, **_) -> list[float | None]:
        """Args: ref_codes: the codes of each rollout's voice prompt; not used with targets."""
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        if self.needs_voice_prompt:
            targets = [variations(track) for track in self.rollout_scorer.prompt_pitch_tracks(ref_codes)]
        else:
            targets = [self.targets] * len(text)
        nothing = (math.nan, math.nan)
        found = [
            nothing if failure else variations(rollouts.pitch_track(i)) for i, failure in enumerate(rollouts.failures)
        ]
        if log_metric is not None:
            for name, values in zip(("f0_cv", "energy_cv"), zip(*found, strict=True), strict=True):
                log_metric(name, mean_of_known(values))
        return [mean_reward(cvs, wanted) for cvs, wanted in zip(found, targets, strict=True)]


def mean_reward(cvs: tuple[float, float], targets: tuple[float | None, float | None]) -> float | None:
    """Mean of `variation_reward` over the targets that are given; None where the voice prompt has no voice.

    F0 0.15 of 0.20 and energy 0.40 of 0.40: (0.75 + 1) / 2 = 0.875; without the energy's target 0.75.

    >>> round(mean_reward((0.15, 0.40), (0.20, 0.40)), 4), round(mean_reward((0.15, 0.40), (0.20, None)), 4)
    (0.875, 0.75)
    """
    wanted = [(cv, target) for cv, target in zip(cvs, targets, strict=True) if target is not None]
    if any(math.isnan(target) for _, target in wanted):
        return None
    return float(np.mean([variation_reward(cv, target) for cv, target in wanted]))
