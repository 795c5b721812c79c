"""A small random Whisper, and noise to score with it."""

from pathlib import Path

import numpy as np
import torch
import whisper

from speech.tokens import SAMPLE_RATE

TEXTS = ["Hello there.", "One, two, three, four, five, six!", "Yes.", "The cat sat on the mat.", "今天天气很好。"]


def babble(duration_s: float, seed: int, level: float = 0.1) -> np.ndarray:
    """Low-pass noise, float32, shape (n_samples,)."""
    noise = np.random.default_rng(seed).standard_normal(round(duration_s * SAMPLE_RATE))
    return (level * np.convolve(noise, np.ones(4) / 2, mode="same")).astype(np.float32)


def save_random_whisper(path: Path, n_vocab: int = 51_865) -> Path:
    """Write a checkpoint of two layers with a window of 1.28 s; 51,864 tokens are an English-only model."""
    dims = whisper.ModelDimensions(
        n_mels=80,
        n_audio_ctx=64,
        n_audio_state=32,
        n_audio_head=2,
        n_audio_layer=1,
        n_vocab=n_vocab,
        n_text_ctx=64,
        n_text_state=32,
        n_text_head=2,
        n_text_layer=1,
    )
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding)
    # Enough for the audio to matter, not so much that every NLL is clamped
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.1)
    model.decoder.blocks[0].cross_attn.out.weight.data *= 10
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)
    return path
