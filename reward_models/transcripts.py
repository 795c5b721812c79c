"""One batch of ASR completions, scored once for all rewards."""

import math
from dataclasses import dataclass

from reward_models.asr_rules import RULES, hallucination, transcript_errors
from speech.error_rate import ErrorRate, sum_errors
from speech.tokens import written_text


@dataclass(frozen=True)
class Transcripts:
    """A batch of completions as text, each list in the batch's order.

    Attributes:
        ref_texts: the reference texts.
        hyp_texts: the policy's transcripts, without END and what follows it.
        truncated: whether the transcript was cut off before END.
        errors: edits against the reference texts.
        rules: the violated one of RULES (truncation is checked first), or None.
    """

    ref_texts: list[str]
    hyp_texts: list[str]
    truncated: list[bool]
    errors: list[ErrorRate]
    rules: list[str | None]

    def edits_and_ref_length(self) -> tuple[int, int]:
        """Of the whole batch, in words (or characters)."""
        total = sum_errors(self.errors)
        return total.edits, total.ref_length

    def metrics(self) -> dict[str, float]:
        """The batch's metrics besides its rewards.

        `wer` and its three parts are all edits of the batch over all its reference words, as in the paper's table
        (NaN for a batch without speech); the fractions are of rollouts.
        """
        total = sum_errors(self.errors)
        ref_length = total.ref_length or math.nan
        num_rollouts = len(self.rules)
        return {
            "wer": total.rate,
            "substitutions": total.substitutions / ref_length,
            "deletions": total.deletions / ref_length,
            "insertions": total.insertions / ref_length,
            "frac_exact": sum(errors.edits == 0 for errors in self.errors) / num_rollouts,
            "frac_hallucination": 1 - self.rules.count(None) / num_rollouts,
            **{f"frac_{rule}": self.rules.count(rule) / num_rollouts for rule in RULES},
        }


class TranscriptScorer:
    """A tokenizer, and the batch of transcripts that was scored last.

    TRL calls every reward function of a batch with the same list of completions: the first call computes the
    `Transcripts` (and logs their metrics), the others reuse them.

    Args:
        tokenizer: the policy's.
        end_id: id of the token that ends a transcript, Llasa's <|TEXT_GENERATION_END|>.
    """

    def __init__(self, tokenizer, end_id: int):
        self.tokenizer, self.end_id = tokenizer, end_id
        self.transcripts: Transcripts | None = None
        self._completion_ids = None

    def score(
        self, completion_ids: list[list[int]], text: list[str], language: list[str] | None = None, log_metric=None
    ) -> Transcripts:
        """The scored batch; arguments as for `rollouts.SpeechRolloutScorer.score`."""
        if completion_ids is not self._completion_ids:
            self.transcripts = self._transcripts(completion_ids, text, language or ["en"] * len(text))
            self._completion_ids = completion_ids
            if log_metric is not None:
                for name, value in self.transcripts.metrics().items():
                    log_metric(name, value)
        return self.transcripts

    def score_held_out(
        self, completion_ids: list[list[int]], text: list[str], language: list[str] | None = None
    ) -> tuple[Transcripts, dict[str, float]]:
        """One completion of each prompt and their metrics; the batch of the rewards stays the one scored last."""
        transcripts = self._transcripts(completion_ids, text, language or ["en"] * len(text))
        return transcripts, transcripts.metrics()

    def _transcripts(self, completion_ids: list[list[int]], texts: list[str], languages: list[str]) -> Transcripts:
        decoded = [written_text(self.tokenizer, ids, self.end_id) for ids in completion_ids]
        hyps = [hyp for hyp, _ in decoded]
        truncated = [cut for _, cut in decoded]
        errors, rules = [], []
        for ref, hyp, cut, language in zip(texts, hyps, truncated, languages, strict=True):
            errors.append(transcript_errors(ref, hyp, language))
            rules.append("truncated" if cut else hallucination(ref, hyp, language, errors[-1]))
        return Transcripts(texts, hyps, truncated, errors, rules)

    def last_samples(self, count: int) -> list[tuple[dict, None]]:
        """The first transcripts of the batch scored last: a record of each, and no waveform."""
        transcripts = self.transcripts
        if transcripts is None:
            return []
        samples = []
        for i in range(min(count, len(transcripts.hyp_texts))):
            record = {
                "rollout": i,
                "text": transcripts.ref_texts[i],
                "transcript": transcripts.hyp_texts[i],
                "wer": transcripts.errors[i].rate,
                "failure": transcripts.rules[i],
            }
            samples.append((record, None))
        return samples
