"""Speaker embeddings by any x-vector model of transformers; a batch gives what each clip alone gives.

The models are those that `AutoModelForAudioXVector` knows and that take waveforms: microsoft/wavlm-base-plus-sv and
others of WavLM, Wav2Vec2, Wav2Vec2-Conformer, UniSpeech-SAT and Data2Vec-Audio.
"""

import warnings

import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioXVector
from transformers.utils import logging as transformers_logging

from common.cli import InputError, library_errors_are_input
from speech.audio import audio_failure
from speech.checkpoint_files import UNREADABLE
from speech.tokens import SAMPLE_RATE
from speech.weights import check_finite

DEFAULT_SPEAKER_ENCODER = "microsoft/wavlm-base-plus-sv"
MIN_SECONDS = 0.5  # of speech that has a voice to tell; the x-vector layers themselves need 0.3 s
# Seconds of audio in one pass, padding included. The first layer has 512 numbers every 5 samples: 6.6 MB a second.
BATCH_SECONDS = {"cpu": 8, "gpu": 60}
# Whose layers keep the padding to itself. The convolutions of the others mix it in: there a batch has one length.
PADDED_EXACTLY = ("wavlm", "wav2vec2", "unispeech-sat")


class SpeakerEncoder:
    """An x-vector model with ragged lists in and out, in the caller's order.

    Args:
        model: of `AutoModelForAudioXVector`, with waveforms as its input.
        feature_extractor: the model's own; scales a waveform.
    Attributes:
        device: where it runs.
    """

    def __init__(self, model, feature_extractor):
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        self.device = model.device
        self.batch_seconds = BATCH_SECONDS["cpu" if self.device.type == "cpu" else "gpu"]
        first_layer = self.model.base_model.feature_extractor.conv_layers[0]
        if isinstance(getattr(first_layer, "layer_norm", None), torch.nn.GroupNorm):
            first_layer.layer_norm = self._norm = MaskedGroupNorm(first_layer.layer_norm)
        else:
            self._norm = None
        self.model._get_tdnn_output_lengths = self._tdnn_lengths

    @classmethod
    def from_pretrained(
        cls, id_or_path: str = DEFAULT_SPEAKER_ENCODER, device: str | torch.device = "cpu"
    ) -> "SpeakerEncoder":
        """Load a model in transformers' format.

        Args:
            id_or_path: a folder with config.json, preprocessor_config.json and weights, or a hub id.
        Raises:
            InputError: no such model, none with an x-vector head, not for waveforms at 16 kHz, or broken weights.
        """
        accepted = f"Use an x-vector model of transformers for waveforms at 16 kHz, such as {DEFAULT_SPEAKER_ENCODER}"
        with library_errors_are_input(
            f"speaker encoder {id_or_path}: cannot be loaded. {accepted}, or a folder of one", *UNREADABLE
        ):
            config = AutoConfig.from_pretrained(id_or_path)
            # Of a model without the head, transformers would fill the head with random weights.
            architecture = (config.architectures or ["none"])[0]
            if not architecture.endswith("ForXVector") or not hasattr(config, "conv_stride"):
                raise InputError(f"speaker encoder {id_or_path}: is no such model (got {architecture}). {accepted}")
            extractor = AutoFeatureExtractor.from_pretrained(id_or_path)
            verbosity = transformers_logging.get_verbosity()
            transformers_logging.set_verbosity_error()  # its report of missing weights has a line a weight
            try:
                model, info = AutoModelForAudioXVector.from_pretrained(
                    id_or_path, output_loading_info=True, dtype=torch.float32
                )
            finally:
                transformers_logging.set_verbosity(verbosity)
        if extractor.sampling_rate != SAMPLE_RATE:
            raise InputError(f"speaker encoder {id_or_path}: is for {extractor.sampling_rate} Hz. {accepted}")
        # The loss's own weights serve training alone
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("objective."))
        if missing:
            raise InputError(
                f"speaker encoder {id_or_path}: its weights lack {len(missing)} of the model's: "
                f"{', '.join(missing[:3])} …. Download or save it again"
            )
        check_finite(id_or_path, model)
        return cls(model.to(device), extractor)

    def embed(self, wavs: list[np.ndarray]) -> np.ndarray:
        """Unit-length embeddings, equal (to float32's rounding) to embedding each clip alone.

        Args:
            wavs: ragged, mono at 16 kHz, shape (n_samples,) each.
        Returns:
            float32, shape (len(wavs), dim); NaN for a clip without a voice to tell: silent, not finite, or shorter
            than MIN_SECONDS.
        """
        embeddings = np.full((len(wavs), self.model.config.xvector_output_dim), np.nan, dtype=np.float32)
        has_voice = [i for i, wav in enumerate(wavs) if is_long_enough(wav) and audio_failure(wav) is None]
        for batch in self._batches(sorted(has_voice, key=lambda i: len(wavs[i])), wavs):
            embeddings[batch] = self._embed_batch([wavs[i] for i in batch])
        return embeddings

    def _batches(self, indices: list[int], wavs: list[np.ndarray]) -> list[list[int]]:
        """In the order given, from the shortest to the longest, as many a batch as BATCH_SECONDS allow."""
        pads, most = self.model.config.model_type in PADDED_EXACTLY, self.batch_seconds * SAMPLE_RATE
        batches = []
        for i in indices:
            fits = bool(batches) and (len(batches[-1]) + 1) * len(wavs[i]) <= most
            if fits and (pads or len(wavs[i]) == len(wavs[batches[-1][0]])):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    @torch.no_grad()
    def _embed_batch(self, wavs: list[np.ndarray]) -> np.ndarray:
        inputs = [self.feature_extractor(wav, sampling_rate=SAMPLE_RATE).input_values[0] for wav in wavs]
        lengths = torch.tensor([len(values) for values in inputs], device=self.device)
        padded = torch.zeros(len(inputs), int(lengths.max()), device=self.device)
        for row, values in zip(padded, inputs, strict=True):
            row[: len(values)] = torch.as_tensor(values, dtype=torch.float32)
        mask = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        if self._norm is not None:
            config = self.model.config
            self._norm.lengths = (lengths - config.conv_kernel[0]) // config.conv_stride[0] + 1
        with warnings.catch_warnings(), torch.autocast(self.device.type, enabled=False):
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # of WavLM's attention
            embeddings = self.model(padded, attention_mask=mask.long()).embeddings.float()
        return torch.nn.functional.normalize(embeddings, dim=-1).cpu().numpy()

    def _tdnn_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Frames of each clip after the x-vector layers.

        transformers 5.23 leaves the dilation out, and so pools frames of the padding with those of the clip.
        """
        config = self.model.config
        for kernel, dilation in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True):
            lengths = lengths - dilation * (kernel - 1)
        return lengths


class MaskedGroupNorm(torch.nn.Module):
    """A GroupNorm of one channel a group whose mean and variance leave out the padding at the end.

    The first layer of most of these models normalises each channel over time; with padding inside its mean, a clip's
    embedding would hang on the clips beside it.

    Attributes:
        lengths: frames of each clip, int64, shape (batch,); to be set before a pass.
    """

    def __init__(self, norm: torch.nn.GroupNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.lengths = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: float32, shape (batch, channels, frames)."""
        mask = (torch.arange(x.shape[-1], device=x.device) < self.lengths[:, None])[:, None]
        count = self.lengths[:, None, None]
        mean = (x * mask).sum(-1, keepdim=True) / count
        centred = (x - mean) * mask
        variance = centred.square().sum(-1, keepdim=True) / count
        return centred * torch.rsqrt(variance + self.eps) * self.weight[:, None] + self.bias[:, None]


def is_long_enough(wav: np.ndarray) -> bool:
    return len(wav) >= MIN_SECONDS * SAMPLE_RATE


def cosines(embeddings: np.ndarray, references: np.ndarray) -> list[float]:
    """Cosine of each pair of unit-length embeddings, in [−1, 1]; NaN where one of them is.

    [0.6, 0.8] and [1, 0]: 0.6 · 1 + 0.8 · 0 = 0.6.
    """
    return (embeddings.astype(np.float64) * references).sum(axis=1).clip(-1, 1).tolist()
