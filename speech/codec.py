"""XCodec2 (arXiv 2502.04128): waveforms to speech codes and back, batches equal to items done alone.

The model is transformers' native `Xcodec2Model`. Two checkpoint layouts are read: the native one
(`HKUSTAudio/xcodec2-hf`, or a folder written by `save_pretrained`) and the one of the `xcodec2`
package (`HKUSTAudio/xcodec2`), whose weights are renamed onto the native model.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from transformers import SeamlessM4TFeatureExtractor, Xcodec2Model

from common.cli import InputError
from speech.codec_batching import decode_ragged
from speech.codec_checkpoint import load_model
from speech.tokens import HOP_LENGTH, SAMPLE_RATE, SpeechTokens

# How clips are put into forward passes, from the shortest to the longest: the next one joins if the pass stays within
# BATCH_CODES and the padding this adds within PADDING_CODES. Both are in codes (50 a second), and padding counts.
# Joining saves what a pass costs besides its codes, so PADDING_CODES must be worth less than that.
#   CPU: a pass costs some 15 codes besides, less the cost of masks: on tiny/codec an unequal pair with 5 codes of
#   padding takes as long as its two items alone, with 10 up to 7 % longer. Above 300 codes (6 s) joining gains
#   nothing, and what falls out of the caches loses: clips of 4 s are encoded 1.6 times slower in 80 s than alone.
#   GPU: an estimate. Some 600 kernels of 5 us, against 6 us a code (0.37 GFLOP at 60 TFLOP/s), make a pass cost 500;
#   4,000 (80 s) bounds memory, most of which the encoder takes: 0.8 MB a code in float32.
BATCH_CODES = {"cpu": 300, "gpu": 4_000}
PADDING_CODES = {"cpu": 5, "gpu": 500}


class EncoderInputs(NamedTuple):
    """A clip as the two encoders of XCodec2 take it.

    Attributes:
        wav: float32, shape (n_samples,), mono at 16 kHz.
        features: float32, shape (n_codes, 160): the log-mel features of w2v-bert-2.0, 50 frames a second.
    """

    wav: np.ndarray
    features: np.ndarray


def encoder_inputs(wav: np.ndarray, name: str = "wav") -> EncoderInputs:
    """The part of encoding that needs neither the codec nor a GPU: NumPy, some 50 ms of one core for a clip of 10 s.

    Args:
        wav: mono at 16 kHz, shape (n_samples,), nominally in [-1, 1].
        name: of the clip, for the error.
    Raises:
        ValueError: empty, not one-dimensional, or NaN/inf samples.
    """
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1 or len(wav) == 0:
        raise ValueError(f"{name} has shape {wav.shape}; accepted: mono, (n_samples,) with n_samples > 0")
    if not np.isfinite(wav).all():
        raise ValueError(f"{name} holds NaN or infinity; drop it or repair the recording")
    # Half a hop on both sides makes the semantic frames as many as the acoustic ones.
    centred = np.pad(whole_codes(wav), HOP_LENGTH // 2)
    features = _feature_extractor()([centred], sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]
    return EncoderInputs(wav, features)


def whole_codes(wav: np.ndarray) -> np.ndarray:
    """With 1 to 320 zeros appended, as in the original: a clip of a whole number of codes gets one more."""
    return np.pad(wav, (0, HOP_LENGTH - len(wav) % HOP_LENGTH))


@functools.cache
def _feature_extractor() -> SeamlessM4TFeatureExtractor:
    return SeamlessM4TFeatureExtractor()


@contextlib.contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions in float32 on a GPU too, where PyTorch's default is TF32.

    That has 10 bits of mantissa, as float16: some codes would differ between GPUs, and from a CPU's.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class SpeechCodec:
    """XCodec2 with ragged lists in and out, in the caller's order.

    Attributes:
        model: the `Xcodec2Model`, in eval mode.
        device: where it runs.
        codebook_size: number of codes; 65,536 for the published model.
        batch_codes, padding_codes: BATCH_CODES and PADDING_CODES of the device.
    """

    def __init__(self, model: Xcodec2Model):
        config = model.config
        if (config.sampling_rate, config.hop_length) != (SAMPLE_RATE, HOP_LENGTH):
            raise InputError(
                f"codec of {config.sampling_rate} Hz with {config.hop_length} samples per code; "
                f"accepted: {SAMPLE_RATE} Hz with {HOP_LENGTH} samples per code"
            )
        self.model = model.eval()
        self.device = model.device
        kind = "cpu" if self.device.type == "cpu" else "gpu"
        self.batch_codes, self.padding_codes = BATCH_CODES[kind], PADDING_CODES[kind]
        self.codebook_size = int(np.prod(config.quantization_levels))
        # A window rounded to half precision would be audible; the head works in float32 anyway.
        head = model.acoustic_decoder.head
        head.window = torch.hann_window(head.n_fft, device=self.device)

    @classmethod
    def from_pretrained(cls, id_or_path: str, device: str | torch.device = "cpu", dtype=torch.float32) -> "SpeechCodec":
        """Load a native or an original checkpoint; config.json tells which it is.

        Args:
            id_or_path: a folder, or a model id on the Hugging Face hub.
            dtype: of the weights; audio is float32 with any. Half precision moves some codes across a rounding
                boundary: encode data sets in float32.
        Raises:
            InputError: no such folder or hub model, not an XCodec2, a broken file, or weights that do not fit.
        """
        return cls(load_model(id_or_path, dtype).to(device))

    def drop_encoder(self) -> None:
        """Free the weights that only `encode` needs: 442 M of the published model's 629 M."""
        for name in ("semantic_encoder", "semantic_adapter", "acoustic_encoder", "fc_encoder"):
            delattr(self.model, name)

    def encode(self, wavs: list[np.ndarray]) -> list[list[int]]:
        """Waveforms to codec ids, one list per item; equal to encoding each alone.

        The last code of an item is completed with 1 to 320 zeros.

        Args:
            wavs: ragged, mono at 16 kHz, shape (n_samples,) each, nominally in [-1, 1].
        Returns:
            ids in [0, codebook_size), n_samples // 320 + 1 each, 50 per second.
        Raises:
            ValueError: an item is empty, not one-dimensional, or holds NaN or infinity.
        """
        return self.encode_inputs([encoder_inputs(wav, f"wavs[{index}]") for index, wav in enumerate(wavs)])

    @float32_convolutions()
    @torch.inference_mode()
    def encode_inputs(self, clips: list[EncoderInputs]) -> list[list[int]]:
        """As `encode`, for clips whose inputs were computed before, e.g. in another process.

        A batch holds clips of one length: padding cannot be made exact at a fair price. The semantic encoder takes
        a mask, and its features are normalised clip by clip; but the acoustic encoder pads by replication twice in
        each of its 36 anti-aliased activations and with zeros in 22 of its convolutions, at up to 32,000 steps a
        second, so that before each of them what follows a clip's end would have to be filled anew.
        """
        codes = [None] * len(clips)
        for batch in _batches([len(clip.features) for clip in clips], self.batch_codes, 0):
            wavs = torch.from_numpy(np.stack([whole_codes(clips[i].wav) for i in batch]))[:, None]
            features = torch.from_numpy(np.stack([clips[i].features for i in batch]))
            output = self.model.encode(
                wavs.to(self.device, self.model.dtype),
                features.to(self.device, self.model.dtype),
            )
            for i, ids in zip(batch, output.audio_codes[:, 0].tolist(), strict=True):
                codes[i] = ids
        return codes

    @torch.inference_mode()
    def decode(self, codes: list[list[int]]) -> list[np.ndarray]:
        """Codec ids to waveforms, one per item; equal to decoding each alone.

        Args:
            codes: ragged, ids in [0, codebook_size), 50 per second.
        Returns:
            float32 mono at 16 kHz, shape (len(ids) * 320,) each; nominally in [-1, 1], not clipped.
        Raises:
            ValueError: an item is empty (the caller decides what silence is worth), or an id is out
                of range.
        """
        for index, ids in enumerate(codes):
            if len(ids) == 0:
                raise ValueError(f"codes[{index}] is empty; drop it, or decide what silence is worth")
            low, high = min(ids), max(ids)
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"codes[{index}] holds {low if low < 0 else high}; accepted: 0 to "
                    f"{self.codebook_size - 1}. speech/tokens.py turns token ids into codes"
                )
        wavs = [None] * len(codes)
        for batch in _batches([len(ids) for ids in codes], self.batch_codes, self.padding_codes):
            audio = decode_ragged(self.model, [codes[i] for i in batch])
            for i, wav in zip(batch, audio.float().cpu().numpy(), strict=True):
                wavs[i] = wav[: len(codes[i]) * HOP_LENGTH]
        return wavs


def decode_rollouts(codec: SpeechCodec, codes: list[list[int]]) -> list[np.ndarray]:
    """As `SpeechCodec.decode`, for rollouts that may have no codes: these give no samples, shape (0,)."""
    with_codes = [i for i, ids in enumerate(codes) if ids]
    wavs = [np.zeros(0, np.float32)] * len(codes)
    for i, wav in zip(with_codes, codec.decode([codes[i] for i in with_codes]), strict=True):
        wavs[i] = wav
    return wavs


def check_codebook(codec: SpeechCodec, tokens: SpeechTokens) -> None:
    if codec.codebook_size != tokens.num_codes:
        raise InputError(
            f"the codec has {codec.codebook_size} codes and the policy has {tokens.num_codes}. "
            "Use the policy's own codec (--codec_id)"
        )


def _batches(lengths: list[int], batch_codes: int, padding_codes: int) -> list[list[int]]:
    """Indices of items, put together from the shortest to the longest, by the rule at BATCH_CODES.

    Args:
        lengths: of the items, in codes.
        batch_codes: most codes of a batch, padding included; a longer item is a batch of its own.
        padding_codes: most padding that an item may bring into a batch; 0 leaves only equal lengths together.
    """
    batches, longest = [], 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        joined = len(batches[-1]) if batches else 0
        if joined and (joined + 1) * length <= batch_codes and joined * (length - longest) <= padding_codes:
            batches[-1].append(index)
        else:
            batches.append([index])
        longest = length
    return batches
