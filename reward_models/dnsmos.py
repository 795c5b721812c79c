"""The quality of a rollout's sound, as listeners would judge it: DNSMOS."""

from speech.dnsmos import MosScores


def quality_reward(mos: MosScores) -> float:
    """(OVRL − 1) / 4, at least 0 and at most 1: the scale of opinions, 1 to 5, as 0 to 1.

    OVRL is a polynomial of the model's own score, 3.93 where that is 5: a clip earns hardly more than 0.73.

    >>> quality_reward(MosScores(ovrl=3.0, sig=3.4, bak=4.0))  # clean speech
    0.5
    >>> quality_reward(MosScores(ovrl=0.9, sig=1.1, bak=1.1))
    0.0
    """
    return min(max((mos.ovrl - 1) / 4, 0.0), 1.0)


class DnsmosReward:
    """`quality_reward` of each rollout. A failed one earns 0: truncated, without codes, silent, or with NaN in it.

    How it is hacked: DNSMOS knows no text and was made to judge noise, so clear babble, or a few drawn-out clean
    sounds, may earn as much as speech. It needs an intelligibility reward beside it, `whisper`, of a larger weight.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec and DNSMOS.
    """

    __name__ = "dnsmos"
    needs = ("codec", "dnsmos")

    def __init__(self, rollout_scorer):
        self.rollout_scorer = rollout_scorer

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        return [
            0.0 if failure else quality_reward(mos)
            for mos, failure in zip(rollouts.mos_scores, rollouts.failures, strict=True)
        ]
