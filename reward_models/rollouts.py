"""What one batch of rollouts sounds like. All rewards of a batch look at the same `Rollouts`.

`Listener` holds the codec, the Whisper and the token-to-text model, or those of them that the rewards need;
`Rollouts` computes each thing at most once and only if a reward or a metric asks for it.
"""

from functools import cached_property

import numpy as np
import torch

from audio import audio_failure
from reward_models.prosody import log_f0_std
from reward_models.token2text import Token2Text
from reward_whisper import Score, WhisperScorer
from speech_codec import SpeechCodec, check_codebook, decode_rollouts
from speech_tokens import CODES_PER_SECOND, SpeechTokens

REPEATED_SPAN_S = 0.5  # longer than any held vowel or pause inside a sentence
LONGEST_PERIOD = 8  # codes: 0.16 s


def is_repetitive(codes: list[int]) -> bool:
    """True if half a second or more is one pattern of at most 0.16 s, over and over.

    The usual way a speech policy fails: it holds one code, or loops over a few.
    Example: 25 equal codes in a row are 0.5 s and repetitive; 24 are not.
    """
    ids = np.asarray(codes)
    span = int(REPEATED_SPAN_S * CODES_PER_SECOND)
    for period in range(1, LONGEST_PERIOD + 1):
        longest = run = 0
        for same in ids[period:] == ids[:-period]:
            run = run + 1 if same else 0
            longest = max(longest, run)
        if longest + period >= span and longest >= 2 * period:
            return True
    return False


class Rollouts:
    """A batch of completions, as codes, as sound, and as Whisper hears them.

    Args:
        completion_ids: sampled token ids, END included where it came, no padding.
        texts: what each was asked to say.
        languages: Whisper's language code of each text.
        group_size: rollouts of one prompt; they stand next to each other.
    Attributes (each a list in the batch's order, computed when first read):
        codes: ids in the codebook; `ended`: whether END came.
        wavs: float32 mono at 16 kHz; shape (0,) where there are no codes.
        scores: `reward_whisper.Score`.
        text_log_probs: mean log P per text token by the token-to-text model.
        failures: None, or why a rollout earns the lowest reward: "unended", "empty", "silent", "non_finite" (the last
            two only where a codec is there to hear them).
        log_f0_stds: natural-log units; NaN where there is no voice.
    """

    def __init__(self, listener: "Listener", completion_ids, texts: list[str], languages: list[str], group_size: int):
        if len(completion_ids) % group_size:
            raise ValueError(f"{len(completion_ids)} rollouts cannot be divided into groups of {group_size}")
        for first in range(0, len(texts), group_size):
            if len(set(texts[first : first + group_size])) != 1:
                raise ValueError(f"rollouts {first} to {first + group_size - 1} are not of one prompt")
        self.listener, self.texts, self.languages, self.group_size = listener, texts, languages, group_size
        parsed = [listener.tokens.codes(ids) for ids in completion_ids]
        self.codes = [codes for codes, _ in parsed]
        self.ended = [ended for _, ended in parsed]
        self._log_f0_seen: dict[int, float] = {}

    @cached_property
    def wavs(self) -> list[np.ndarray]:
        return decode_rollouts(self.listener.codec, self.codes)

    @cached_property
    def scores(self) -> list[Score]:
        return self.listener.scorer.score(self.wavs, self.texts, self.languages)

    @cached_property
    def text_log_probs(self) -> list[float]:
        return self.listener.token2text.score(self.codes, self.texts, self.languages)

    @cached_property
    def failures(self) -> list[str | None]:
        if self.listener.codec is None:
            inaudible = [None if codes else "empty" for codes in self.codes]
        else:
            inaudible = [audio_failure(wav) for wav in self.wavs]
        return [failure or (None if ended else "unended") for failure, ended in zip(inaudible, self.ended, strict=True)]

    @cached_property
    def log_f0_stds(self) -> list[float]:
        return [self._log_f0_std(i) for i in range(len(self.wavs))]

    def _log_f0_std(self, i: int) -> float:
        if i not in self._log_f0_seen:
            heard = audio_failure(self.wavs[i]) is None
            self._log_f0_seen[i] = log_f0_std(self.wavs[i]) if heard else float("nan")
        return self._log_f0_seen[i]

    def grouped(self, values: list[float]) -> np.ndarray:
        """(prompts, group_size)"""
        return np.asarray(values, dtype=np.float64).reshape(-1, self.group_size)

    def metrics(self) -> dict[str, float]:
        """What the log shows of a batch besides its rewards; means over the rollouts (F0: the first of each group)."""
        failures, listener = self.failures, self.listener
        found = {
            "duration_s": float(np.mean([len(codes) / CODES_PER_SECOND for codes in self.codes])),
            "share_truncated": 1 - float(np.mean(self.ended)),
            "share_empty": failures.count("empty") / len(failures),
            "share_repetitive": float(np.mean([is_repetitive(codes) for codes in self.codes])),
        }
        if listener.codec is not None:
            # Praat takes as long for a clip as the codec: one rollout of each prompt shows a collapse as well.
            f0 = np.asarray([self._log_f0_std(i) for i in range(0, len(self.codes), self.group_size)])
            found |= {
                "log_f0_std": float(np.nanmean(f0)) if np.isfinite(f0).any() else float("nan"),
                "share_silent": failures.count("silent") / len(failures),
                "share_non_finite": failures.count("non_finite") / len(failures),
            }
        if listener.scorer is not None:
            found |= {
                "wer": float(np.mean([score.wer for score in self.scores])),
                "nll": float(np.mean([score.nll for score in self.scores])),
            }
        if listener.token2text is not None:
            found |= {"text_log_prob": float(np.mean(self.text_log_probs))}
        return found


class Listener:
    """Codec, Whisper and token-to-text model, and the rollouts that were heard last.

    TRL calls every reward function of a batch with the same list of completions: the first call makes the
    `Rollouts` (and logs their metrics), the others find it here.

    Args:
        codec, scorer, token2text: None where no reward needs it; Whisper needs the codec.
        offload: keep codec and Whisper on the CPU, and on their device only while they listen; each way they take
            a copy of all their weights.
    """

    def __init__(
        self,
        tokens: SpeechTokens,
        codec: SpeechCodec | None,
        scorer: WhisperScorer | None,
        group_size: int,
        offload: bool = False,
        token2text: Token2Text | None = None,
    ):
        if codec is None and scorer is not None:
            raise ValueError("Whisper hears what the codec decodes; give a codec too, or no Whisper")
        if codec is not None:
            check_codebook(codec, tokens)
        if token2text is not None:
            token2text.check_codebook(tokens.num_codes)
        self.tokens, self.codec, self.scorer, self.token2text = tokens, codec, scorer, token2text
        self.group_size = group_size
        self.rollouts: Rollouts | None = None
        self._completion_ids = None
        self.device, self.offload = codec.device if codec else torch.device("cpu"), offload
        if offload:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for part in filter(None, (self.codec, self.scorer)):
            part.model.to(device)
            part.device = device
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # a freed block may be too small or too split for what the policy asks for

    def hear(
        self, completion_ids: list[list[int]], text: list[str], language: list[str] | None, log_metric
    ) -> Rollouts:
        if completion_ids is not self._completion_ids:
            languages = language or ["en"] * len(text)
            self.rollouts = Rollouts(self, completion_ids, text, languages, self.group_size)
            self._completion_ids = completion_ids
            if self.offload:
                self._move(self.device)
            metrics = self.rollouts.metrics()  # asks for all that codec and Whisper have to say
            if self.offload:
                self._move(torch.device("cpu"))
            for name, value in metrics.items():
                log_metric(name, value)
        return self.rollouts

    def last_samples(self, count: int) -> list[tuple[dict, np.ndarray | None]]:
        """The first rollouts of the batch that was heard last: what is known of each, and its sound if it has one."""
        rollouts, samples = self.rollouts, []
        for i in range(min(count, len(rollouts.codes)) if rollouts else 0):
            record = {"rollout": i, "text": rollouts.texts[i], "failure": rollouts.failures[i]}
            if self.scorer is not None:
                score = rollouts.scores[i]
                record |= {"heard": score.hyp_text, "wer": score.wer, "nll": score.nll}
            if self.token2text is not None:
                record["text_log_prob"] = rollouts.text_log_probs[i]
            audible = self.codec is not None and rollouts.failures[i] not in ("empty", "non_finite")
            samples.append((record, rollouts.wavs[i] if audible else None))
        return samples
