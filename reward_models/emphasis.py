"""Reward of the emphasis that a text marks (`*so*`): the word's F0, level and length beside those of the other words.

The cues are those of word-emphasis measures since Fry (1955): an emphasised word is higher, louder and longer than
the words around it. Word times come from the Whisper pass that scores the rollout anyway.
"""

import numpy as np

from reward_models.rate import syllables
from speech.error_rate import normalize_text
from speech.pitch import PitchTrack
from speech.text_marks import marked_words
from speech.word_times import Word

# A cue this large is an emphasis that nobody misses, and earns all that it can.
FULL_F0_ST, FULL_LEVEL_DB, FULL_LENGTH = 6.0, 6.0, 1.5
PLAIN = 0.5  # the score of a word like the others
WEIGHT_F0, WEIGHT_LEVEL, WEIGHT_LENGTH = 0.6, 0.2, 0.2
DECLINATION_ST_PER_S = 2.0  # F0 falls in the course of a sentence; without it, a first word would seem emphasised


def emphasis_cues(track: PitchTrack, words: list[Word], index: int, others: list[int]) -> tuple[float, float, float]:
    """A word beside other words: F0 in semitones, level in dB, and log2 of the ratio of durations per syllable.

    A word at 200 Hz for 0.3 s, others at 150 Hz for 0.2 s, all of one syllable and with their middles at the same
    time: 12 log2(200 / 150) = 4.98 semitones and log2(0.3 / 0.2) = 0.585. The F0 is corrected for declination. F0 and
    level are 0, no cue, where the word or the others have no voice.
    """
    inside = track.between(words[index].start_s, words[index].end_s)
    outside = np.zeros(len(inside), bool)
    for other in others:
        outside |= track.between(words[other].start_s, words[other].end_s)
    outside &= ~inside
    f0_st = level_db = 0.0
    if inside.any() and outside.any():
        later_s = track.times[inside].mean() - track.times[outside].mean()
        f0_st = track.f0[inside].mean() - track.f0[outside].mean() + DECLINATION_ST_PER_S * later_s
        level_db = track.level[inside].mean() - track.level[outside].mean()
    ratio = _syllable_s([words[index]]) / _syllable_s([words[other] for other in others])
    return float(f0_st), float(level_db), float(np.log2(ratio))


def _syllable_s(words: list[Word]) -> float:
    """Mean duration of a syllable, at least 1 ms."""
    total = sum(word.end_s - word.start_s for word in words)
    return max(total / sum(syllables(word.text) for word in words), 0.001)


def emphasis_score(f0_st: float, level_db: float, length_log2: float) -> float:
    """0.5 + half the weighted mean of the cues, each at most ±1 of its full size: in [0, 1], 0.5 for a plain word.

    3 semitones, 3 dB and 1.5 times the length: 0.5 + 0.5 (0.6 · 3/6 + 0.2 · 3/6 + 0.2 · 1) = 0.8.

    >>> round(emphasis_score(3.0, 3.0, np.log2(1.5)), 4)
    0.8
    """
    cues = np.clip([f0_st / FULL_F0_ST, level_db / FULL_LEVEL_DB, length_log2 / np.log2(FULL_LENGTH)], -1, 1)
    return float(PLAIN + (1 - PLAIN) * np.dot(cues, [WEIGHT_F0, WEIGHT_LEVEL, WEIGHT_LENGTH]))


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
        marked = marked_words(rollouts.texts[i])
        others = [n for n in range(len(rollouts.texts[i].split())) if n not in marked]
        if not marked or not others:
            return None
        words = rollouts.scores[i].words
        if rollouts.failures[i] or words is None:
            return 0.0
        language = rollouts.languages[i]
        heard = normalize_text(rollouts.scores[i].hyp_text, language).split()
        scores = []
        for index in marked:
            parts = normalize_text(words[index].text, language).split()
            cues = emphasis_cues(rollouts.pitch_track(i), words, index, others)
            score = emphasis_score(*cues)
            scores.append(score if all(part in heard for part in parts) else min(score, PLAIN))
        return float(np.mean(scores))
