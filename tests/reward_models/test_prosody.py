"""Duration and spread of F0: formulas by hand, stated scores for failures."""

import math

import numpy as np
import pytest
from fake_rollouts import call, ids, speech_scorer

from common.cli import InputError
from reward_models.prosody import DurationReward, LogF0SpreadReward, check_ceiling, duration_reward


def test_duration_reward_by_hand():
    # T_m = 50: -10/50, 0, -10/50;  T_m = (20+30)/2 = 25: -15/25, -5/25, -5/25, -75/25
    assert duration_reward(np.array([[40, 50, 60]]))[0].tolist() == [-0.2, 0.0, -0.2]
    assert duration_reward(np.array([[10, 20, 30, 100]]))[0] == pytest.approx([-0.6, -0.2, -0.2, -3.0])
    assert duration_reward(np.array([[0, 0, 9]]))[0].tolist() == [-1.0, -1.0, -1.0]


def test_duration_reward_is_per_group():
    batch = [ids([1] * n) for n in (10, 30, 7, 7)]
    assert call(DurationReward(speech_scorer()), batch) == [-0.5, -0.5, 0.0, 0.0]


def test_log_f0_spread_reward():
    scorer = speech_scorer()
    swinging = [int(30 + 12 * math.sin(i / 5)) for i in range(60)]
    batch = [ids(swinging), ids([30] * 60), ids(swinging, truncated=True), ids([])]
    rewards = call(LogF0SpreadReward(scorer, ceiling=0.3), batch)
    assert rewards[0] > rewards[1] + 0.03
    assert rewards[2:] == [0.0, 0.0]
    assert call(LogF0SpreadReward(scorer, ceiling=0.01), batch)[0] == 0.01


@pytest.mark.parametrize("ceiling", [0.0, -0.3, math.nan, math.inf])
def test_bad_ceilings(ceiling):
    with pytest.raises(InputError, match="ceiling: must be finite and > 0"):
        check_ceiling(ceiling)
    with pytest.raises(InputError, match="ceiling: must be finite and > 0"):
        LogF0SpreadReward(None, ceiling)
