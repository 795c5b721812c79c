"""Pauses: rewards of a hum with gaps, matched with the best of several patterns."""

import pytest
from fake_rollouts import call, ids, speech_scorer

from common.cli import InputError
from reward_models.pauses import PausesReward
from speech.whisper_scorer import Score
from speech.word_times import Word

TEXT = "Well, my dear."
HUM = [30] * 20  # 0.4 s
WORDS = tuple(Word(word, 0.5 * n, 0.5 * n + 0.5) for n, word in enumerate(TEXT.split()))


class TimedScorer:
    """A Whisper that gives every clip the same words."""

    def score(self, wavs, texts, languages, word_times=False, features=False):
        assert word_times
        return [Score(text, 0.0, 0.3, 0, 4, words=WORDS) for text in texts]


def pauses_reward(batch, **columns) -> list[float | None]:
    scorer = speech_scorer(len(batch), word_times=True)
    scorer.whisper = TimedScorer()
    return call(PausesReward(scorer), batch, **columns)


def test_pauses_reward():
    first = HUM + [0] * 10 + HUM * 2  # a pause after "Well,"
    second = HUM * 2 + [0] * 10 + HUM  # after "my"
    batch = [ids(first), ids(second), ids(first, truncated=True), ids([])]
    assert pauses_reward(batch, text=[TEXT] * 4) == [1, 0, 0, 0]
    patterns = [["Well, | my dear.", "Well, my | dear."]] * 4
    assert pauses_reward(batch, text=[TEXT] * 4, pauses=patterns) == [1, 1, 0, 0]
    assert pauses_reward(batch, text=[TEXT] * 4, pauses=[["Well, my dear."]] * 4) == [0, 0, 0, 0]


def test_a_text_without_pauses_has_no_reward():
    batch = [ids(HUM * 3), ids([])]
    assert pauses_reward(batch, text=["Well my dear."] * 2, pauses=[[], None]) == [None, None]
    with pytest.raises(InputError, match="expected a list of patterns per row"):
        pauses_reward(batch, text=[TEXT] * 2, pauses=[TEXT] * 2)
