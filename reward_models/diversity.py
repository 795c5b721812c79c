"""R3 of arXiv 2509.18569: diversity of a group's code sequences, plus the spread of F0."""

import numpy as np
from rapidfuzz.distance import Levenshtein

from reward_models.prosody import LOG_F0_STD_CEILING, check_ceiling, log_f0_rewards


def group_distances(group: list[list[int]]) -> list[float]:
    """(1/G) Σ_j dist(o_i, o_j) / |o_i| of each code sequence in a group; dist is the edit distance, j = i included.

    Of [1, 2, 3, 4], [1, 2, 3] and [1, 2, 3, 4]: the first is 0, 1 and 0 edits away, 1/3 · 1/4 = 0.0833; the second 1,
    0 and 1, 1/3 · 2/3 = 0.2222. A sequence without codes has no |o_i| to divide by: 0.
    """
    distances = np.zeros((len(group), len(group)))
    for i, codes in enumerate(group):
        for j in range(i):
            distance = Levenshtein.distance(codes, group[j])
            distances[i, j] = distance
            distances[j, i] = distance
    lengths = np.asarray([len(codes) for codes in group])
    return (distances.mean(axis=1) / np.maximum(lengths, 1) * (lengths > 0)).tolist()


class DiversityReward:
    """R3_i = min((1/G) Σ_j dist(o_i, o_j) / |o_i|, 1) + min(std of ln F0, ceiling); 0 where the rollout failed.

    In the paper nothing bounds the distance: a rollout of 50 codes among rollouts of 100 has more than 0.88, and one
    of 10 codes more than 7.9, so a short rollout would pay. Hence the 1, which rollouts of equal length never exceed.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec, which the F0 needs.
        ceiling: upper bound of the second term; see `prosody.LogF0SpreadReward`.
    Raises:
        InputError: a ceiling that is not above 0.
    """

    __name__ = "diversity"
    needs = ("codec",)

    def __init__(self, rollout_scorer, ceiling: float = LOG_F0_STD_CEILING):
        check_ceiling(ceiling)
        self.rollout_scorer, self.ceiling = rollout_scorer, ceiling

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        spreads = log_f0_rewards(rollouts, self.ceiling)
        size = rollouts.group_size
        groups = [rollouts.codes[first : first + size] for first in range(0, len(rollouts.codes), size)]
        distances = [distance for group in groups for distance in group_distances(group)]
        return [
            0.0 if failure else min(distance, 1.0) + spread
            for distance, spread, failure in zip(distances, spreads, rollouts.failures, strict=True)
        ]
