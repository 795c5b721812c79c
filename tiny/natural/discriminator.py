"""Discriminators of the natural toy codec's adversarial training; they do not ship.

Multi-resolution STFT discriminators as in EnCodec (arXiv 2210.13438): 2-D convolutions over the real and imaginary
parts of a spectrogram, hinge losses, and feature matching.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

N_FFTS = (512, 1024, 2048)  # 32, 64 and 128 ms
CHANNELS = 24


class STFTDiscriminator(nn.Module):
    def __init__(self, n_fft: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft))
        shapes = [(2, (3, 9), (1, 2)), *[(CHANNELS, (3, 9), (1, 2))] * 3, (CHANNELS, (3, 3), (1, 1))]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(inputs, CHANNELS, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2)))
            for inputs, kernel, stride in shapes
        )
        self.output = weight_norm(nn.Conv2d(CHANNELS, 1, (3, 3), padding=1))

    def forward(self, wavs: torch.Tensor) -> list[torch.Tensor]:
        """wavs: (batch, samples). Returns the features of every layer, and the scores last."""
        with torch.autocast(wavs.device.type, enabled=False):
            spectrum = torch.stft(
                wavs.float(), self.n_fft, self.n_fft // 4, window=self.window, normalized=True, return_complex=True
            )
            x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (batch, real and imaginary, frames, bins)
        outputs = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            outputs.append(x)
        return [*outputs, self.output(x)]


class Discriminators(nn.Module):
    """One discriminator per resolution."""

    def __init__(self):
        super().__init__()
        self.each = nn.ModuleList(map(STFTDiscriminator, N_FFTS))

    def forward(self, wavs: torch.Tensor) -> list[list[torch.Tensor]]:
        # bfloat16 halves the memory traffic, which is most of the cost on a GPU
        with torch.autocast(wavs.device.type, torch.bfloat16, enabled=wavs.is_cuda):
            return [discriminator(wavs) for discriminator in self.each]


def discriminator_loss(real: list[list[torch.Tensor]], decoded: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge: scores above 1 for recordings, below -1 for decoded audio; 2 where nothing is told apart."""
    losses = [
        F.relu(1 - r[-1].float()).mean() + F.relu(1 + d[-1].float()).mean() for r, d in zip(real, decoded, strict=True)
    ]
    return sum(losses) / len(losses)


def generator_losses(
    real: list[list[torch.Tensor]], decoded: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hinge loss of the decoder, and the L1 distance of features relative to the recordings' own."""
    adversarial = sum(-d[-1].float().mean() for d in decoded) / len(decoded)
    distances = [
        (x.float() - y.detach().float()).abs().mean() / y.detach().float().abs().mean().clamp(min=1e-3)
        for r, d in zip(real, decoded, strict=True)
        for y, x in zip(r[:-1], d[:-1], strict=True)
    ]
    return adversarial, sum(distances) / len(distances)
