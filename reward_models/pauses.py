"""Reward of the pauses: where the punctuation, or a row's pattern, has them, and nowhere else.

arXiv 2511.21270 has several plausible pause patterns of a text written by an LLM, reads the realised one off
Whisper's time stamps, and rewards an exact match with any of them. Here the match is by degrees (F1).
"""

from speech.pauses import expected_pauses, pause_match, realised_pauses


class PausesReward:
    """The best `pause_match` with a row's patterns, or with its punctuation, in [0, 1].

    A row without a pattern and without punctuation inside has no reward (None, which TRL leaves out). A failed
    rollout earns 0.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec and Whisper.
    """

    __name__ = "pauses"
    needs = ("codec", "whisper", "word_times")

    def __init__(self, rollout_scorer):
        self.rollout_scorer = rollout_scorer

    def __call__(self, completion_ids, text, language=None, pauses=None, log_metric=None, **_) -> list[float | None]:
        """The rewards.

        Args:
            text, language, pauses: the dataset's columns; `pauses` a list of patterns per row, or None.
        Raises:
            InputError: a pattern whose words are not the text's.
        """
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        rewards = []
        for i, patterns in enumerate(pauses or [None] * len(text)):
            expected = expected_pauses(text[i], patterns)
            words = rollouts.scores[i].words
            if expected is None:
                rewards.append(None)
            elif rollouts.failures[i] or words is None:
                rewards.append(0.0)
            else:
                realised = realised_pauses(rollouts.wavs[i], words)
                rewards.append(max(pause_match(realised, pattern) for pattern in expected))
        return rewards
