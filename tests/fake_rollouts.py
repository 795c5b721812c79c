"""Rollouts without a policy or a model, and the call of a reward as TRL makes it."""

from dataclasses import dataclass, field

import numpy as np
import torch

from reward_models.rollouts import SpeechRolloutScorer
from reward_models.transcripts import TranscriptScorer
from speech.audio import audio_failure
from speech.tokens import HOP_LENGTH, SAMPLE_RATE, SpeechTokens
from speech.whisper_scorer import MAX_NLL, Score

TOKENS = SpeechTokens(start_id=0, end_id=1, first_code_id=10, num_codes=64, num_text_ids=0, text_end_id=2)


@dataclass
class HummingCodec:
    """A code is 20 ms of a tone; code 0 is silence and code 63 breaks the decoder."""

    codebook_size: int = 64
    decoded: list = field(default_factory=list)
    device: torch.device = torch.device("cpu")

    def decode(self, codes):
        self.decoded.append(len(codes))
        return [self._hum(np.array(ids)) for ids in codes]

    def _hum(self, ids: np.ndarray) -> np.ndarray:
        f0 = np.repeat(100.0 + 2 * ids, HOP_LENGTH)
        wav = 0.3 * np.sin(2 * np.pi * np.cumsum(f0) / SAMPLE_RATE) * np.repeat(ids > 0, HOP_LENGTH)
        wav[np.repeat(ids == 63, HOP_LENGTH)] = np.nan
        return wav.astype(np.float32)


class PerfectScorer:
    """A Whisper with a perfect transcript of every clip, and none of a clip that failed."""

    def __init__(self):
        self.calls = 0

    def score(self, wavs, texts, languages, word_times=False, features=False):
        self.calls += 1
        failures = [audio_failure(wav) for wav in wavs]
        return [
            Score("", 1.0, MAX_NLL, 4, 4, failure) if failure else Score(text, 0.0, 0.3, 0, 4)
            for text, failure in zip(texts, failures, strict=True)
        ]


class Moved:
    """Stands for a model: remembers the devices it was moved to."""

    def __init__(self):
        self.devices = []

    def to(self, device):
        self.devices.append(device.type)


def speech_scorer(group_size: int = 2, **options) -> SpeechRolloutScorer:
    """A codec and a Whisper that need no checkpoint."""
    return SpeechRolloutScorer(TOKENS, HummingCodec(), PerfectScorer(), group_size, **options)


def ids(codes: list[int], truncated: bool = False) -> list[int]:
    """A completion: the codes' token ids, and END unless truncated."""
    return TOKENS.ids(codes) + ([] if truncated else [TOKENS.end_id])


class WordTokenizer:
    """Token n is the n-th word; 0 is END."""

    def __init__(self):
        self.words = ["<END>"]
        self.decoded = 0

    def ids(self, text: str, truncated: bool = False) -> list[int]:
        words = text.split()
        self.words += [word for word in words if word not in self.words]
        return [self.words.index(word) for word in words] + ([] if truncated else [0])

    def decode(self, ids, skip_special_tokens):
        self.decoded += 1
        return " ".join(self.words[i] for i in ids)


def transcript_scorer() -> TranscriptScorer:
    return TranscriptScorer(WordTokenizer(), end_id=0)


def call(reward, completion_ids, metrics=None, **columns) -> list[float]:
    """The rewards of completions; `metrics` (a dict) receives what is logged, the text is "hello" by default."""
    log = (metrics if metrics is not None else {}).__setitem__
    texts = columns.pop("text", ["hello"] * len(completion_ids))
    return reward(
        prompts=[],
        completions=[],
        completion_ids=completion_ids,
        text=texts,
        log_metric=log,
        log_extra=None,
        trainer_state=None,
        **columns,
    )
