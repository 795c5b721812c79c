"""The toy setup's Whisper: openai-whisper's own classes and tokenizer, a 2.56 s window, five layers.

The corpus uses some 150 of the tokenizer's 51,865 tokens. All others share one row of the embedding: training has a
vocabulary of the used tokens and that one row (its logit raised by the logarithm of the number of tokens that share
it), which is exactly the full softmax with tied rows, at a three-hundredth of the cost.
"""

import logging
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from tqdm import tqdm
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from speech.tokens import SAMPLE_RATE

logger = logging.getLogger(__name__)

MEL_FRAMES_PER_SECOND = 100
WINDOW_FRAMES = 256  # 2.56 s; Whisper's encoder halves them
DIMENSIONS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=WINDOW_FRAMES // 2,
    n_audio_state=96,
    n_audio_head=3,
    n_audio_layer=3,
    n_vocab=51_865,
    n_text_ctx=128,
    n_text_state=96,
    n_text_head=3,
    n_text_layer=2,
)
MAX_SHIFT_FRAMES = 40  # a rollout may begin with more silence than any training clip


def mel(wav: np.ndarray) -> np.ndarray:
    """Whisper's log-mel spectrogram of a clip, padded to the window: (80, WINDOW_FRAMES), float16."""
    padded = whisper.pad_or_trim(wav, WINDOW_FRAMES * SAMPLE_RATE // MEL_FRAMES_PER_SECOND)
    return whisper.log_mel_spectrogram(padded).numpy().astype(np.float16)


class CompactVocabulary:
    """Token ids ↔ rows of the small embedding; its last row is that of every unused token."""

    def __init__(self, texts: list[str]):
        tokenizer = get_tokenizer(multilingual=True, language="en", task="transcribe")
        self.prefix = list(tokenizer.sot_sequence_including_notimestamps)
        self.targets = [[*tokenizer.encode(" " + text), tokenizer.eot] for text in texts]
        self.used = sorted({*self.prefix, *(token for target in self.targets for token in target)})
        self.row = {token: row for row, token in enumerate(self.used)}
        self.log_unused = math.log(DIMENSIONS.n_vocab - len(self.used))

    def rows(self, tokens: list[int]) -> list[int]:
        return [self.row[token] for token in tokens]

    def compact(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `expand`, in single precision; the state may be of another vocabulary."""
        small = state["decoder.token_embedding.weight"][[*self.used, -1]]  # the last, a time stamp, is in no text
        return {k: v.float() for k, v in (state | {"decoder.token_embedding.weight": small}).items()}

    def expand(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trained state dict with the full embedding, in half precision."""
        small = state["decoder.token_embedding.weight"]
        full = small[-1].repeat(DIMENSIONS.n_vocab, 1)
        full[self.used] = small[:-1]
        return {k: v.half() for k, v in (state | {"decoder.token_embedding.weight": full}).items()}


def augment(rng: np.random.Generator, mels: np.ndarray) -> np.ndarray:
    """Shift in time, mask spans of time and frequency, add noise. In place; (batch, 80, frames)."""
    for spectrogram in mels:
        spectrogram[:] = np.roll(spectrogram, rng.integers(MAX_SHIFT_FRAMES), axis=1)
        floor = spectrogram.min()
        for _ in range(2):
            width = rng.integers(12)
            first = rng.integers(WINDOW_FRAMES - 12)
            spectrogram[:, first : first + width] = floor
        width = rng.integers(12)
        first = rng.integers(80 - 12)
        spectrogram[first : first + width] = floor
    return mels + rng.normal(0, 0.05, mels.shape).astype(np.float32)


def train_whisper(
    mels: list[np.ndarray], texts: list[str], steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict:
    """Train on (mel, text) pairs.

    Returns:
        A checkpoint as `whisper.load_model` reads it: {"dims", "model_state_dict"}.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vocabulary = CompactVocabulary(texts)
    dimensions = ModelDimensions(**{**vars(DIMENSIONS), "n_vocab": len(vocabulary.used) + 1})
    model = Whisper(dimensions)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.02)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)  # torch.empty otherwise
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    prefix = vocabulary.rows(vocabulary.prefix)
    start, recent = time.time(), []
    for step in tqdm(range(1, steps + 1), desc="whisper", disable=None):
        picked = rng.integers(len(texts), size=batch_size)
        batch = augment(rng, np.stack([mels[i] for i in picked]).astype(np.float32))
        rows = [vocabulary.rows(vocabulary.targets[i]) for i in picked]
        longest = max(map(len, rows))
        inputs = torch.tensor([prefix + row[:-1] + [0] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        logits = model.decoder(inputs, model.encoder(torch.from_numpy(batch)))[:, len(prefix) - 1 :]
        logits = logits + F.pad(torch.zeros(len(vocabulary.used)), (0, 1), value=vocabulary.log_unused)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 200 == 0:
            logger.info("whisper step %d: NLL %.3f, %.0f s", step, np.mean(recent[-200:]), time.time() - start)
    return {"dims": vars(DIMENSIONS), "model_state_dict": vocabulary.expand(model.state_dict())}
