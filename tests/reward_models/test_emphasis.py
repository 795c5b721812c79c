"""Emphasis: rewards of a hum with a higher word; stated scores for failures."""

import pytest
from fake_rollouts import HummingCodec, call, ids, speech_scorer

from reward_models.emphasis import EmphasisReward
from speech.melody import marked_word_scores
from speech.pitch import pitch_track
from speech.whisper_scorer import Score
from speech.word_times import Word

TEXT = "He *will* go."
WORDS = (Word("He", 0.0, 0.4), Word("will", 0.4, 0.8), Word("go.", 0.8, 1.2))
PLAIN = [20] * 60  # 140 Hz for 1.2 s
EMPHASISED = [20] * 20 + [50] * 20 + [20] * 20  # 200 Hz on "will", 6.17 semitones higher


class TimedScorer:
    """A Whisper that gives every clip the same words."""

    def __init__(self, hyp_text: str = "He will go.", words=WORDS):
        self.hyp_text, self.words = hyp_text, words

    def score(self, wavs, texts, languages, word_times=False, features=False):
        assert word_times
        return [Score(self.hyp_text, 0.0, 0.3, 0, 3, words=self.words) for _ in texts]


def emphasis_reward(batch, text: str = TEXT, **scorer) -> list[float | None]:
    rollout_scorer = speech_scorer(len(batch), word_times=True)
    rollout_scorer.whisper = TimedScorer(**scorer)
    return call(EmphasisReward(rollout_scorer), batch, text=[text] * len(batch), language=["en"] * len(batch))


def test_emphasis_reward():
    batch = [ids(EMPHASISED), ids(PLAIN), ids(EMPHASISED, truncated=True), ids([])]
    high, plain, *failed = emphasis_reward(batch)
    assert high == pytest.approx(0.8, abs=0.03) and plain == pytest.approx(0.5, abs=0.01) and failed == [0, 0]
    unsaid, _, *_ = emphasis_reward(batch, text="*He* will go.")
    assert unsaid < 0.5  # another word is the higher one


def test_a_word_that_is_not_heard_earns_no_more_than_a_plain_one():
    assert emphasis_reward([ids(EMPHASISED)], hyp_text="He go.") == [0.5]
    assert emphasis_reward([ids(EMPHASISED)], text="*He* will go.", hyp_text="Will go.")[0] < 0.5
    assert emphasis_reward([ids(EMPHASISED)], words=None) == [0]


def test_several_marked_words_earn_their_mean():
    text = "*He* *will* go."
    track = pitch_track(HummingCodec().decode([EMPHASISED])[0])
    low, high = marked_word_scores(track, WORDS, text, "He will go.", "en")
    assert low == pytest.approx(0.5, abs=0.1) and high > 0.7
    assert emphasis_reward([ids(EMPHASISED)], text=text) == [pytest.approx((low + high) / 2)]


@pytest.mark.parametrize("text", ["He will go.", "*Go*!", "*He* *will* *go*.", "He 2*3*4 go."])
def test_other_texts_have_no_reward(text):
    assert emphasis_reward([ids(EMPHASISED), ids([])], text=text) == [None, None]
