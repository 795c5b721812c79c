"""The voice of a rollout against the voice prompt of its row."""

import math

from common.averages import mean_of_known
from common.cli import InputError

MAX_WER = 0.5


def similarity_reward(cosine: float, wer: float, max_wer: float = MAX_WER) -> float:
    """max(cosine, 0) where the WER is at most `max_wer`, else 0; in [0, 1].

    Of another voice the cosine may be negative, and so worse than none: it counts as 0, like a clip without a voice.

    >>> similarity_reward(0.8, wer=0.25), similarity_reward(0.8, wer=0.6), similarity_reward(-0.1, wer=0.0)
    (0.8, 0.0, 0.0)
    >>> similarity_reward(math.nan, wer=0.0)  # too short to have a voice
    0.0
    """
    return 0.0 if wer > max_wer or math.isnan(cosine) else max(cosine, 0.0)


class SpeakerSimilarityReward:
    """`similarity_reward` of the cosine between the speaker embeddings of a rollout and of its voice prompt.

    The prompt is heard as the codec decodes its codes (`ref_codes`), as the rollout is: a difference of recording and
    codec is none of voices. A failed rollout earns 0: truncated, without codes, silent, or with NaN in its audio.

    How it is hacked: the surest way to the prompt's voice is to repeat the prompt, whose words are not the text's.
    Hence the gate, `max_wer`.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec, Whisper and a speaker encoder.
        max_wer: WER above which the voice earns nothing.
    Raises:
        InputError: `max_wer` is negative.
    """

    __name__ = "speaker_similarity"
    needs = ("codec", "whisper", "speaker_encoder")
    needs_voice_prompt = True

    def __init__(self, rollout_scorer, max_wer: float = MAX_WER):
        if not max_wer >= 0:
            raise InputError(f"max_wer: must be >= 0 (got {max_wer})")
        self.rollout_scorer, self.max_wer = rollout_scorer, max_wer

    def __call__(self, completion_ids, text, ref_codes, language=None, log_metric=None, **_) -> list[float]:
        """Args: ref_codes: the codes of each rollout's voice prompt."""
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        similarities = self.rollout_scorer.speaker_similarities(rollouts, ref_codes)
        if log_metric is not None:
            log_metric("speaker_cosine", mean_of_known(similarities))
        return [
            0.0 if failure else similarity_reward(similarity, score.wer, self.max_wer)
            for similarity, score, failure in zip(similarities, rollouts.scores, rollouts.failures, strict=True)
        ]
