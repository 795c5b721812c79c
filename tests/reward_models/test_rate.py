"""Speaking rate: syllables, the dead zone by hand, the two targets."""

import math

import pytest
from fake_rollouts import call, ids, speech_scorer

from common.cli import InputError
from reward_models.rate import RateReward, rate_reward


def test_rate_reward_by_hand():
    # 1 - ln(1.5 / 1.15) / ln(2 / 1.15) = 1 - 0.2657 / 0.5534 = 0.5199, above and below alike
    assert rate_reward(6, 4) == pytest.approx(0.5199, abs=1e-4)
    assert rate_reward(4, 6) == pytest.approx(0.5199, abs=1e-4)
    assert rate_reward(4.5, 4) == 1
    assert rate_reward(8, 4) == rate_reward(20, 4) == rate_reward(1, 4) == 0
    assert rate_reward(4.5, 4, dead_zone=1.0) < 1


def test_target_is_the_median_of_the_group_that_was_spoken():
    # Lengths 50, 50, 75 and two failures: the median rate is that of 50 codes, and 75 are 1.5 times slower. The failure
    # of 50 codes would earn 1, were it spoken.
    batch = [ids([30] * 50), ids([30] * 50), ids([30] * 75), ids([30] * 50, truncated=True), ids([])]
    assert call(RateReward(speech_scorer(5)), batch) == pytest.approx([1, 1, 0.5199, 0, 0], abs=1e-4)


def test_target_is_the_voice_prompts():
    # "one two" in 25 codes: 4 syllables/s; "hello" (2) in 50 codes: 2/s, half; in 25 codes the same rate
    batch = [ids([30] * 50), ids([30] * 25)]
    prompt = {"ref_text": ["one two"] * 2, "ref_codes": [[1] * 25] * 2}
    assert call(RateReward(speech_scorer()), batch, **prompt) == [0, 1]
    assert call(RateReward(speech_scorer()), batch, ref_text=[""] * 2, ref_codes=[[]] * 2) != [0, 1]


def test_each_group_has_its_own_text_and_target():
    """2 syllables in 1 s, twice; 4 in 2 s and in 1 s. The median of the second group is 3 a second, from which 4 is
    ln(4 / 3) = 0.2877 off: 1 - (0.2877 - 0.1398) / 0.5534 = 0.7327. Its voice prompt has 4, that of the first 2."""
    batch = [ids([30] * 50), ids([30] * 50), ids([30] * 100), ids([30] * 50)]
    texts = ["hello"] * 2 + ["one two three four"] * 2
    assert call(RateReward(speech_scorer()), batch, text=texts) == pytest.approx([1, 1, 0.5199, 0.7327], abs=1e-4)
    prompts = {"ref_text": ["one two"] * 2 + ["one two three four"] * 2, "ref_codes": [[1] * 50] * 2 + [[1] * 50] * 2}
    assert call(RateReward(speech_scorer()), batch, text=texts, **prompts) == [1, 1, 0, 1]
    prompts = {"ref_text": [""] * 2 + prompts["ref_text"][2:], "ref_codes": [[]] * 2 + [[1] * 50] * 2}
    assert call(RateReward(speech_scorer()), batch, text=texts, **prompts) == [1, 1, 0, 1]


def test_a_target_of_its_own():
    # "hello" (2) in 50 codes: 2 syllables/s; the target is neither the group's nor the prompt's
    batch = [ids([30] * 50), ids([30] * 75), ids([])]
    metrics = {}
    assert call(RateReward(speech_scorer(3), target=2), batch, metrics) == pytest.approx([1, 0.5199, 0], abs=1e-4)
    assert metrics["syllable_rate"] == pytest.approx((2 + 2 / 1.5) / 2)
    prompt = {"ref_text": ["one two"] * 3, "ref_codes": [[1] * 25] * 3}
    assert call(RateReward(speech_scorer(3), target=2), batch, **prompt)[0] == 1


@pytest.mark.parametrize("target", [0, -3, math.nan])
def test_bad_target(target):
    with pytest.raises(InputError, match="target: must be > 0"):
        RateReward(None, target=target)


def test_a_group_that_failed_earns_nothing():
    assert call(RateReward(speech_scorer()), [ids([]), ids([])]) == [0, 0]


@pytest.mark.parametrize("dead_zone", [0.9, 2.0, math.nan])
def test_bad_dead_zone(dead_zone):
    with pytest.raises(InputError, match="dead_zone: must be >= 1 and < 2"):
        RateReward(None, dead_zone)
