"""Reward of the emphasis that a text marks (`*so*`): the word's F0, level and length beside those of the other words.

The cues are those of word-emphasis measures since Fry (1955): an emphasised word is higher, louder and longer than
the words around it. Word times come from the Whisper pass that scores the rollout anyway.
"""

import numpy as np

from reward_models.parts import Part
from speech.melody import marked_word_scores, words_to_emphasise

EDGE_S = 0.1  # around the word: its rise begins before it


class EmphasisReward:
    """Mean of `emphasis_score` over a text's marked words, in [0, 1].

    A text without a mark, or with nothing but marked words, has no reward (None, which TRL leaves out). A failed
    rollout earns 0, and a marked word that Whisper does not hear counts at most what a plain one does.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec and Whisper.
    """

    __name__ = "emphasis"
    needs = ("codec", "whisper", "word_times")

    def __init__(self, rollout_scorer):
        self.rollout_scorer = rollout_scorer

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float | None]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        return [self._reward(rollouts, i) for i in range(len(text))]

    def _reward(self, rollouts, i: int) -> float | None:
        if not words_to_emphasise(rollouts.texts[i]):
            return None
        score = rollouts.scores[i]
        if rollouts.failures[i] or score.words is None:
            return 0.0
        return float(np.mean(scores_of(rollouts, i)))

    def parts(self, rollouts, i: int) -> dict[int, Part] | None:
        """The marked words with their scores. None where they have no times."""
        marked, score = words_to_emphasise(rollouts.texts[i]), rollouts.scores[i]
        if not marked or rollouts.failures[i] or score.words is None:
            return None
        return {
            index: Part(value, score.words[index].start_s - EDGE_S, score.words[index].end_s + EDGE_S)
            for index, value in zip(marked, scores_of(rollouts, i), strict=True)
        }


def scores_of(rollouts, i: int) -> list[float]:
    """`marked_word_scores` of a rollout whose words have times."""
    score, text, language = rollouts.scores[i], rollouts.texts[i], rollouts.languages[i]
    return marked_word_scores(rollouts.pitch_track(i), score.words, text, score.hyp_text, language)
