"""The toy setup's speaker encoder: WavLM's x-vector architecture with 0.2 M parameters, for `speaker_similarity`.

It learns to tell speakers apart by the loss of additive margin (AM-softmax, arXiv 1801.05599) on the embeddings, whose
cosine the reward is. Three voices are few, so copies at other speeds, which change pitch and formants together, count
as other speakers (Yamamoto et al., Interspeech 2019). It hears what rewards hear: clips that the codec has decoded.
The judge of voices, tiny/judge_voice.py, is another model, trained on people.
"""

import logging
from pathlib import Path

import numpy as np
import soxr
import torch
from transformers import AutoModelForAudioXVector, PreTrainedModel, Wav2Vec2FeatureExtractor, WavLMConfig

from speech.tokens import SAMPLE_RATE
from tiny.train_codec import fit, new_optimizer, update

logger = logging.getLogger(__name__)

SPEEDS = (0.86, 0.93, 1.0, 1.07, 1.15)
CROP_SECONDS = (0.6, 1.6)  # of one batch, drawn anew for each; MIN_SECONDS of speech/speaker_encoder.py is the shortest
BATCH, LEARNING_RATE = 32, 1e-3
CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "tdnn_dim": [64, 64, 64, 64, 128],
    "xvector_output_dim": 64,
    "num_codevectors_per_group": 8,  # of WavLM's pre-training, which isn't done here
    "codevector_dim": 8,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


def with_speeds(wavs: list[np.ndarray], voices: list[str]) -> tuple[list[np.ndarray], list[int]]:
    """Each clip at each of SPEEDS, and its speaker's number.

    Args:
        wavs: ragged, mono at 16 kHz.
        voices: of each clip.
    Returns:
        Clips of speed 1 as they came; the speakers count from 0, len(SPEEDS) a voice.
    """
    number = {voice: i for i, voice in enumerate(sorted(set(voices)))}
    copies, speakers = [], []
    for wav, voice in zip(wavs, voices, strict=True):
        for i, speed in enumerate(SPEEDS):
            copies.append(wav if speed == 1 else soxr.resample(wav, SAMPLE_RATE * speed, SAMPLE_RATE))
            speakers.append(number[voice] * len(SPEEDS) + i)
    return copies, speakers


def train_speaker_encoder(wavs: list[np.ndarray], voices: list[str], folder: Path, steps: int, seed: int) -> None:
    """Train on random crops of the clips and save a checkpoint in transformers' format to `folder`.

    Args:
        wavs: ragged, mono at 16 kHz, as the codec decodes them.
        voices: of each clip.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    clips, speakers = with_speeds(wavs, voices)
    speakers = torch.tensor(speakers)
    model, extractor = new_speaker_encoder(int(speakers.max()) + 1), Wav2Vec2FeatureExtractor(do_normalize=True)
    optimizer = new_optimizer(list(model.parameters()))

    def step() -> torch.Tensor:
        batch = rng.integers(len(clips), size=BATCH)
        length = int(rng.uniform(*CROP_SECONDS) * SAMPLE_RATE)
        crops = [crop(clips[i], length, rng) for i in batch]
        values = extractor(crops, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        embeddings = model(values).embeddings
        loss = model.objective(embeddings, speakers[batch])
        update(optimizer, loss)
        return loss.detach()[None]

    fit("speaker encoder", step, optimizer, LEARNING_RATE, steps)
    model.half().save_pretrained(folder)
    extractor.save_pretrained(folder)


def new_speaker_encoder(speakers: int) -> PreTrainedModel:
    """With random weights; `objective` has a vector a speaker."""
    model = AutoModelForAudioXVector.from_config(WavLMConfig(**CONFIG, num_labels=speakers))
    for module in model.modules():  # WavLM's own start, meant for its size, is too small for this one to learn from
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)):
            module.reset_parameters()
    return model


def crop(wav: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """`length` samples from a random place; a shorter clip begins again."""
    if len(wav) < length:
        wav = np.tile(wav, -(-length // len(wav)))
    start = rng.integers(len(wav) - length + 1)
    return wav[start : start + length]
