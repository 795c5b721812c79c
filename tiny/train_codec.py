"""The toy setup's XCodec2: its architecture with 3.7 M parameters, trained from scratch on the corpus.

Its codes come from the log-mel branch (the semantic encoder) alone: codes that see the waveform carry its phase, which
is not heard and which a small policy cannot predict. So the weights that join the acoustic encoder to the codes are 0,
and that encoder is as small as it can be.

Two stages. First encoder and decoder together, on log-mel distances at several resolutions and on the harmonics below
1.6 kHz; gradients reach the encoder through the straight-through latents (`Xcodec2Model.forward` would decode from the
integer codes). Then the codes are fixed, and the decoder alone goes on, on longer crops, since at inference it decodes
whole clips.

The nets are so small that launching kernels would take a GPU a third of the time: there, a step is recorded once as a
CUDA graph, and crops are cut by index from a corpus that lies on the GPU.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model
from transformers.audio_utils import mel_filter_bank

from speech.tokens import HOP_LENGTH, SAMPLE_RATE

logger = logging.getLogger(__name__)

HIDDEN, SEMANTIC = 224, 128
ENCODER_HIDDEN = 1  # channels of the unused acoustic encoder at 16 kHz
LEVELS = [4] * 6
NUM_CODES = 4**6  # 4,096, where XCodec2 has 4**8
CROP_CODES = 50  # 1 s
LONG_CROP_CODES = 80  # 1.6 s
# Mel bands by n_fft; where the window is long enough, so many that a voice's harmonics are told apart
RESOLUTIONS = {256: 40, 512: 64, 1024: 100, 2048: 160}
# Inputs of the quantizer of this mean and deviation fall into the four levels of a dimension equally often: it bounds
# them by tanh twice, and its levels meet at -0.81, -0.24 and 0.41.
INPUT_MEAN, INPUT_STD = -0.22, 0.9
SPREAD_WEIGHT = 0.05
HARMONIC_BINS, HARMONIC_WEIGHT = 102, 0.6  # of 15.6 Hz each, so up to 1.6 kHz
WARMUP = 0.03  # of the steps
LOG_STEPS = 200


class Frames(NamedTuple):
    """Clips one after the other, a row for each code.

    Attributes:
        wavs: (codes, HOP_LENGTH), float32.
        features: (codes, 160), float32: what the semantic encoder takes.
        lengths: of the clips, in codes.
    """

    wavs: torch.Tensor
    features: torch.Tensor
    lengths: list[int]


def frames_of(wavs: list[np.ndarray], features: list[np.ndarray], device: torch.device) -> Frames:
    """wavs: each padded to a whole number of codes."""
    return Frames(
        torch.tensor(np.concatenate(wavs), device=device).float().view(-1, HOP_LENGTH),
        torch.tensor(np.concatenate(features), device=device).float(),
        [len(rows) for rows in features],
    )


def crop_starts(lengths: list[int], crop: int, device: torch.device) -> torch.Tensor:
    """The rows of Frames where a crop of `crop` codes may begin and not leave its clip."""
    ends = np.cumsum(lengths)
    starts = [np.arange(end - length, end - crop + 1) for length, end in zip(lengths, ends, strict=True)]
    return torch.tensor(np.concatenate(starts), device=device)


def new_codec(seed: int) -> Xcodec2Model:
    """A small XCodec2 with random weights that can be trained.

    With transformers' init all codes are equal and the output is exactly 0: it is too small for the quantizer and the
    exponential of the ISTFT head. So: torch's own init, and log magnitudes that start at −3. Of the quantizer's first
    layer, `spread_codes` sets the weights. The semantic encoder is trained in place of the acoustic one.
    """
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
        num_attention_heads=HIDDEN // 32,
        num_key_value_heads=HIDDEN // 32,
        head_dim=32,
        encoder_hidden_size=ENCODER_HIDDEN,
        downsampling_ratios=[8, 8, 5],
        quantization_levels=LEVELS,
        quantization_dim=HIDDEN + SEMANTIC,
        activation_dropout=0.0,
        semantic_model_config=semantic,
    )
    torch.manual_seed(seed)
    codec = Xcodec2Model(config)
    for module in codec.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.LayerNorm):
            module.reset_parameters()
    with torch.no_grad():
        codec.acoustic_decoder.head.linear.bias[: codec.acoustic_decoder.head.n_fft // 2 + 1] = -3
        codec.fc_encoder.weight[:, SEMANTIC:] = 0
    codec.acoustic_encoder.requires_grad_(False)
    return codec


class MelLoss(torch.nn.Module):
    """Mean L1 distance of log-mel spectrograms over RESOLUTIONS."""

    def __init__(self):
        super().__init__()
        for n_fft, bands in RESOLUTIONS.items():
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
        distances = [(self.log_mel(wav, n_fft) - self.log_mel(target, n_fft)).abs().mean() for n_fft in RESOLUTIONS]
        return sum(distances) / len(distances)


class HarmonicLoss(torch.nn.Module):
    """Mean L1 distance of log magnitudes of single bins, where a low voice's harmonics are not blurred."""

    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(1024))

    def log_magnitudes(self, wav: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(wav, 1024, 256, window=self.window, return_complex=True)[:, :HARMONIC_BINS]
        power = torch.view_as_real(spectrum).square().sum(-1) + 1e-9
        return power.sqrt().clamp(min=1e-3).log()

    def forward(self, wav: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """wav, target: (batch, samples)."""
        return (self.log_magnitudes(wav) - self.log_magnitudes(target)).abs().mean()


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a CPU, where a step takes 60 % of its time so; a recorded step of a GPU stays as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cpu")


def encode(codec: Xcodec2Model, features: torch.Tensor) -> torch.Tensor:
    """`Xcodec2Model.encode` up to the quantizer, with gradients for the semantic encoder, without the acoustic one.

    Args:
        features: (batch, codes, 160).
    Returns:
        (batch, codes, quantization_dim).
    """
    semantic = codec.semantic_adapter(codec.semantic_encoder(features).last_hidden_state.transpose(1, 2))
    acoustic = semantic.new_zeros(len(semantic), codec.fc_encoder.in_features - SEMANTIC, semantic.shape[2])
    return codec.fc_encoder(torch.cat([semantic, acoustic], dim=1).transpose(1, 2)).float()


def spread_codes(codec: Xcodec2Model, hidden: torch.Tensor) -> None:
    """Set the quantizer's first layer so that it starts from the principal components, and uses all codes.

    Args:
        hidden: outputs of `encode`.
    """
    rows = hidden.detach().flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    first = vectors[:, -len(LEVELS) :] * INPUT_STD / values[-len(LEVELS) :].sqrt()
    project_in = codec.quantizer.project_in
    with torch.no_grad():
        project_in.weight.copy_(first.T)
        project_in.bias.copy_(INPUT_MEAN - rows.mean(dim=0) @ first)


def spread_loss(inputs: torch.Tensor) -> torch.Tensor:
    """How far the quantizer's inputs are from independent dimensions of INPUT_MEAN and INPUT_STD; 0 at best.

    Args:
        inputs: (batch, codes, dimensions).
    """
    rows = (inputs.flatten(0, 1) - INPUT_MEAN) / INPUT_STD
    moments = rows.T @ rows / len(rows)
    return rows.mean(dim=0).square().mean() + (moments - torch.eye(len(moments), device=rows.device)).square().mean()


def new_optimizer(weights: list[torch.Tensor]) -> torch.optim.AdamW:
    """The learning rate is a tensor, so that a recorded step reads it anew."""
    device = weights[0].device
    rate = torch.tensor(0.0, device=device)
    return torch.optim.AdamW(
        weights, lr=rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=True, capturable=device.type == "cuda"
    )


def update(optimizer: torch.optim.AdamW, loss: torch.Tensor) -> None:
    weights = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=weights)
    torch.nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
    optimizer.step()


def set_fast_kernels(fast: bool) -> None:
    """On a GPU: TF32 and the fastest convolutions for training; exact float32 for codes that equal a CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast
    torch.backends.cudnn.benchmark = fast


def recorded(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return losses

    return replay


def fit(
    name: str,
    step: Callable[[], torch.Tensor],
    optimizer: torch.optim.AdamW,
    learning_rate: float,
    steps: int,
    max_seconds: float = math.inf,
) -> None:
    """Run `step`, with a warm-up of the learning rate and a cosine to 0 over `steps` or `max_seconds`.

    Args:
        name: of the log lines.
        step: one update; returns the losses to log, shape (n,).
    """
    rate = optimizer.param_groups[0]["lr"]
    on_gpu = rate.is_cuda
    set_fast_kernels(True)
    run = recorded(step) if on_gpu else step
    start, logged, total, progress, number = time.monotonic(), 0, 0, 0.0, 0
    while progress < 1:
        cosine = (1 + math.cos(math.pi * progress)) / 2
        rate.fill_(learning_rate * min(1, progress / WARMUP) * cosine)
        total = total + run()
        number += 1
        if number % 20 == 0 and on_gpu:
            torch.cuda.synchronize()  # steps are queued otherwise, and the clock would know nothing of them
        seconds = time.monotonic() - start
        progress = max(number / steps, seconds / max_seconds)
        if number - logged == LOG_STEPS or progress >= 1:
            losses = " ".join(f"{loss:.3f}" for loss in (total / (number - logged)).tolist())
            logger.info("%s step %d: %s, %.0f s", name, number, losses, seconds)
            logged, total = number, 0
    set_fast_kernels(False)


def train_codec(
    codec: Xcodec2Model,
    frames: Frames,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    max_seconds: float = math.inf,
) -> None:
    """Train encoder and decoder together, in place; the losses logged are mel, harmonic and spread."""
    torch.manual_seed(seed)
    device = frames.wavs.device
    mel, harmonic = MelLoss().to(device), HarmonicLoss().to(device)
    starts, crop = crop_starts(frames.lengths, CROP_CODES, device), torch.arange(CROP_CODES, device=device)
    codec.to(device).train()
    weights = [weight for weight in codec.parameters() if weight.requires_grad]
    optimizer = new_optimizer(weights)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        rows = starts[torch.randint(len(starts), (batch_size, 1), device=device)] + crop
        return frames.wavs[rows].flatten(1), frames.features[rows]

    def step() -> torch.Tensor:
        wavs, features = batch()
        with half_precision(device):
            hidden = encode(codec, features)
        latents, _ = codec.quantizer(hidden)
        spread = spread_loss(codec.quantizer.project_in(hidden))
        with half_precision(device):
            decoded = codec.acoustic_decoder(latents)[:, 0].float()
        loss, distance = mel(decoded, wavs), harmonic(decoded, wavs)
        update(optimizer, loss + HARMONIC_WEIGHT * distance + SPREAD_WEIGHT * spread)
        return torch.stack([loss, distance, spread]).detach()

    with torch.no_grad():
        spread_codes(codec, encode(codec, batch()[1]))
    fit("codec", step, optimizer, learning_rate, steps, max_seconds)
    codec.eval()


def train_decoder(
    codec: Xcodec2Model,
    frames: Frames,
    codes: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    max_seconds: float = math.inf,
) -> None:
    """Train the decoder alone, in place; the losses logged are mel and harmonic.

    Args:
        codes: of all frames, shape (codes,).
    """
    torch.manual_seed(seed)
    device = frames.wavs.device
    mel, harmonic = MelLoss().to(device), HarmonicLoss().to(device)
    starts, crop = crop_starts(frames.lengths, LONG_CROP_CODES, device), torch.arange(LONG_CROP_CODES, device=device)
    codec.to(device).train()
    optimizer = new_optimizer([*codec.quantizer.project_out.parameters(), *codec.acoustic_decoder.parameters()])

    def step() -> torch.Tensor:
        rows = starts[torch.randint(len(starts), (batch_size, 1), device=device)] + crop
        wavs = frames.wavs[rows].flatten(1)
        with half_precision(device):
            decoded = codec.acoustic_decoder(codec.quantizer.from_codes(codes[rows][..., None]))[:, 0].float()
        loss, distance = mel(decoded, wavs), harmonic(decoded, wavs)
        update(optimizer, loss + HARMONIC_WEIGHT * distance)
        return torch.stack([loss, distance]).detach()

    fit("decoder", step, optimizer, learning_rate, steps, max_seconds)
    codec.eval()
