"""Pauses: read off the punctuation, a pattern and the audio; matched with the best of several patterns."""

import numpy as np
import pytest
from fake_rollouts import call, ids, speech_scorer

from common.cli import InputError
from reward_models.pauses import (
    PausesReward,
    pattern_pauses,
    pause_match,
    punctuation_pauses,
    realised_pauses,
)
from speech.whisper_scorer import Score
from speech.word_times import Word

TEXT = "Well, my dear."
HUM = [30] * 20  # 0.4 s
WORDS = tuple(Word(word, 0.5 * n, 0.5 * n + 0.5) for n, word in enumerate(TEXT.split()))


@pytest.mark.parametrize(
    ("text", "pauses"),
    [
        ("Well, my dear Tom, go.", {0, 3}),
        ('"Well," he *said*; "go!"', {0, 2}),
        ("No pause here.", set()),
        ("So — no", {1}),
        ("你好，世界。", set()),
    ],
)
def test_punctuation(text, pauses):
    assert punctuation_pauses(text) == pauses


def test_patterns():
    assert pattern_pauses("Well, my | dear.", TEXT) == {1}
    assert pattern_pauses("Well, my dear. |", TEXT) == set()
    assert pattern_pauses("Well, | *my* dear.", "Well, my *dear*.") == {0}
    with pytest.raises(InputError, match="column 'pauses': a pattern is the text with |"):
        pattern_pauses("Well | my dear.", TEXT)


def test_match_by_hand():
    assert pause_match({1, 4}, {1}) == pytest.approx(2 / 3)
    assert pause_match(set(), set()) == 1
    assert pause_match(set(), {1}) == pause_match({2}, set()) == pause_match({2}, {1}) == 0


def test_realised_pauses():
    [wav] = speech_scorer().codec.decode([HUM + [0] * 10 + HUM + [0] * 5 + HUM])  # silent from 0.4 to 0.6, 1.0 to 1.1
    assert realised_pauses(wav, list(WORDS)) == {0}
    [wav] = speech_scorer().codec.decode([[0] * 10 + HUM * 3 + [0] * 10])  # before the first word, after the last
    words = [Word("a", 0.2, 0.8), Word("b", 0.8, 1.4)]
    assert realised_pauses(wav, words) == set()
    assert realised_pauses(wav, words[:1]) == set()


class TimedScorer:
    """A Whisper that gives every clip the same words."""

    def score(self, wavs, texts, languages, word_times=False):
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


def test_silence_is_no_speech():
    assert realised_pauses(np.zeros(16_000, np.float32), list(WORDS)) == set()
