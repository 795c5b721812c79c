"""The toy setup's XCodec2: its architecture with 3 M parameters, trained on flite's two voices.

The loss is the L1 distance of log-mel spectrograms at several resolutions; there is no adversarial loss, so the audio
is a little buzzy, but intelligible. Gradients reach the encoder through the straight-through latents
(`Xcodec2Model.forward` would decode from the integer codes).
"""

import logging
import time

import numpy as np
import torch
from tqdm import tqdm
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model
from transformers.audio_utils import mel_filter_bank

from speech.tokens import HOP_LENGTH, SAMPLE_RATE

logger = logging.getLogger(__name__)

HIDDEN, SEMANTIC = 192, 128
LEVELS = [4] * 6
NUM_CODES = 4**6  # 4,096, where XCodec2 has 4**8
CROP_CODES = 32  # 0.64 s: long enough for a word, short enough for two cores
LONG_CROP_CODES = 56  # 1.1 s: nearly a clip
RESOLUTIONS = ((256, 40), (512, 64), (1024, 80), (2048, 80))  # (n_fft, mel bands)


def new_codec(seed: int) -> Xcodec2Model:
    """A small XCodec2 with random weights that can be trained.

    With transformers' init all codes are equal and the output is exactly 0: it is too small for the quantizer and the
    exponential of the ISTFT head. So: torch's own init, a larger `project_in`, and log magnitudes that start at −3.
    """
    torch.manual_seed(seed)
    semantic = Wav2Vec2BertConfig(
        hidden_size=SEMANTIC,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=2 * SEMANTIC,
        feature_projection_input_dim=160,
        add_adapter=False,
        apply_spec_augment=False,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        conformer_conv_dropout=0.0,
        layerdrop=0.0,
        conv_depthwise_kernel_size=7,
    )
    config = Xcodec2Config(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=HIDDEN // 6,
        encoder_hidden_size=4,
        downsampling_ratios=[8, 8, 5],
        quantization_levels=LEVELS,
        quantization_dim=HIDDEN + SEMANTIC,
        activation_dropout=0.0,
        semantic_model_config=semantic,
    )
    codec = Xcodec2Model(config)
    for module in codec.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.LayerNorm):
            module.reset_parameters()
    with torch.no_grad():
        codec.quantizer.project_in.weight.mul_(4)
        codec.acoustic_decoder.head.linear.bias[: codec.acoustic_decoder.head.n_fft // 2 + 1] = -3
    codec.semantic_encoder.requires_grad_(False)
    return codec


class MelLoss(torch.nn.Module):
    """Mean L1 distance of log-mel spectrograms over RESOLUTIONS."""

    def __init__(self):
        super().__init__()
        for n_fft, bands in RESOLUTIONS:
            mel = mel_filter_bank(n_fft // 2 + 1, bands, 0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney")
            self.register_buffer(f"mel_{n_fft}", torch.tensor(mel, dtype=torch.float32).T)
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft))

    def log_mel(self, wav: torch.Tensor, n_fft: int) -> torch.Tensor:
        window = getattr(self, f"window_{n_fft}")
        spectrum = torch.stft(wav, n_fft, n_fft // 4, window=window, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1) + 1e-9
        return (getattr(self, f"mel_{n_fft}") @ power.sqrt()).clamp(min=1e-4).log()

    def forward(self, wav: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """wav, target: (batch, samples)."""
        return sum(
            (self.log_mel(wav, n_fft) - self.log_mel(target, n_fft)).abs().mean() for n_fft, _ in RESOLUTIONS
        ) / len(RESOLUTIONS)


def encode_latents(codec: Xcodec2Model, wavs: torch.Tensor, semantic: torch.Tensor) -> torch.Tensor:
    """`Xcodec2Model.encode` behind the frozen semantic encoder: wavs (batch, samples), semantic (batch, codes, dim)."""
    hidden = torch.cat([codec.semantic_adapter(semantic.transpose(1, 2)), codec.acoustic_encoder(wavs[:, None])], dim=1)
    latents, _ = codec.quantizer(codec.fc_encoder(hidden.transpose(1, 2)))
    return latents


def fit(codec: Xcodec2Model, weights: list, batch, steps: int, learning_rate: float, name: str) -> None:
    """Minimize the mel loss.

    Args:
        weights: the parameters to train.
        batch: returns (decoded, target), each (batch, samples).
        name: of the log lines.
    """
    loss_of = MelLoss()
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.8, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    codec.train()
    start, recent = time.time(), []
    for step in tqdm(range(1, steps + 1), desc=name, disable=None):
        loss = loss_of(*batch())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 200 == 0:
            logger.info("%s step %d: log-mel L1 %.3f, %.0f s", name, step, np.mean(recent[-200:]), time.time() - start)
    codec.eval()


def crop(
    rng: np.random.Generator, clips: list[tuple[np.ndarray, ...]], batch_size: int, length: int
) -> list[np.ndarray]:
    """Random crops of `length` codes from clips of (wav, per-code array), stacked."""
    wavs, rows = [], []
    for i in rng.integers(len(clips), size=batch_size):
        wav, per_code = clips[i]
        first = rng.integers(len(per_code) - length + 1)
        wavs.append(wav[first * HOP_LENGTH : (first + length) * HOP_LENGTH])
        rows.append(per_code[first : first + length])
    return [np.stack(wavs), np.stack(rows)]


def train_codec(
    wavs: list[np.ndarray],
    states: list[np.ndarray],
    codec: Xcodec2Model,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train encoder and decoder together, in place, on short crops, since the encoder is most of the cost.

    Args:
        wavs: clips, each padded to a whole number of codes.
        states: the frozen semantic encoder's output for each, shape (codes, SEMANTIC).
    """
    rng, clips = np.random.default_rng(seed), list(zip(wavs, states, strict=True))

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        wav, state = map(torch.tensor, crop(rng, clips, batch_size, CROP_CODES))
        return codec.acoustic_decoder(encode_latents(codec, wav, state.float()))[:, 0], wav

    weights = [p for p in codec.parameters() if p.requires_grad]
    fit(codec, weights, batch, steps, learning_rate, "codec")


def train_decoder(
    wavs: list[np.ndarray],
    codes: list[np.ndarray],
    codec: Xcodec2Model,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train the decoder alone, in place, on crops of nearly a clip, since at inference it decodes whole clips.

    Args:
        wavs: clips, each padded to a whole number of codes.
        codes: of each clip.
    """
    rng = np.random.default_rng(seed)
    clips = [clip for clip in zip(wavs, codes, strict=True) if len(clip[1]) >= LONG_CROP_CODES]
    weights = [*codec.quantizer.project_out.parameters(), *codec.acoustic_decoder.parameters()]

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        wav, ids = map(torch.tensor, crop(rng, clips, batch_size, LONG_CROP_CODES))
        return codec.acoustic_decoder(codec.quantizer.from_codes(ids[..., None]))[:, 0], wav

    fit(codec, weights, batch, steps, learning_rate, "decoder")
