"""R3: edit distances by hand, stated scores for failures."""

import numpy as np
import pytest
from fake_rollouts import call, ids, speech_scorer

from common.cli import InputError
from reward_models.diversity import DiversityReward, group_distances
from speech.measures import log_f0_std


def test_distances_by_hand():
    # Distances 1 (a deletion), 0, 1: (0 + 1 + 0) / 3 / 4, (1 + 0 + 1) / 3 / 3, (0 + 1 + 0) / 3 / 4
    assert group_distances([[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]]) == pytest.approx([1 / 12, 2 / 9, 1 / 12])
    # Nothing in common: four substitutions of four codes, halved because j = i is 0
    assert group_distances([[1, 2, 3, 4], [5, 6, 7, 8]]) == pytest.approx([0.5, 0.5])
    # A shift by one is two edits, not four
    assert group_distances([[1, 2, 3, 4], [2, 3, 4, 5]]) == pytest.approx([2 / 4 / 2] * 2)


def test_distances_at_the_edges():
    assert group_distances([[1, 2], [1, 2]]) == [0.0, 0.0]
    assert group_distances([[], [1, 2]]) == pytest.approx([0.0, 2 / 2 / 2])
    assert group_distances([[], []]) == [0.0, 0.0]
    # (0 + 90 + 90) / 3 / 10 = 6: the formula has no bound
    assert group_distances([[1] * 10, [1] * 100, [1] * 100])[0] == pytest.approx(6)


def test_the_reward_adds_the_spread_of_f0_and_failures_earn_0():
    scorer = speech_scorer()
    up, down = list(range(20, 50)), list(range(50, 20, -1))
    batch = [ids(up), ids(down), ids(up), ids(up, truncated=True)]
    scores = call(DiversityReward(scorer), batch)
    spread = min(log_f0_std(scorer.codec.decode([up])[0]), 0.3)
    distance = group_distances([up, down])[0]
    assert 0 < distance < 1 and spread > 0.05
    assert scores[0] == pytest.approx(distance + spread)
    assert scores[2] == pytest.approx(spread)  # the other rollout of its group has the same codes
    assert scores[3] == 0.0
    assert call(DiversityReward(scorer, ceiling=0.01), batch)[2] == 0.01


def test_a_short_rollout_gains_no_more_than_1():
    long = [list(np.random.default_rng(i).integers(20, 50, 60)) for i in range(3)]
    batch = [ids(list(range(20, 30))), *map(ids, long)]
    scores = call(DiversityReward(speech_scorer(group_size=4)), batch)
    assert group_distances([list(range(20, 30)), *long])[0] > 2
    assert scores[0] <= 1.3


def test_bad_ceiling():
    with pytest.raises(InputError, match="ceiling: must be finite and > 0"):
        DiversityReward(None, ceiling=0.0)
