"""Audio files, silence and pauses: float32 mono at 16 kHz in memory, 16-bit PCM WAV on disk."""

import io
import math
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

from common.cli import InputError
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE

SILENCE_DBFS = -60.0  # RMS about the mean; speech lies near -25, 16-bit rounding noise near -101
FRAME = SAMPLE_RATE // 50  # 20 ms: the step at which a pause is sought
PAUSE_FRAMES = 5  # 100 ms: longer than the closure of a stop consonant
MAX_PEAK = 10.0  # 20 dB over full scale: no overshoot of a float recording, but integers saved as floats
MP3_HEAD = 4_096  # bytes at the start of an MP3 in which encoders put their header
MP3_MISSING_S = 0.1  # that an MP3 may lack of its header's length: some encoders count the header as a frame


class TooLongError(InputError):
    """The recording is longer than `load_audio` was allowed to read."""


def load_audio(path_or_bytes: str | os.PathLike | bytes, max_duration_s: float = math.inf) -> np.ndarray:
    """Decode WAV, FLAC, OGG or MP3, mix down to mono and resample to 16 kHz.

    Args:
        path_or_bytes: a file, or the bytes of one.
        max_duration_s: longest recording that is accepted; of a longer one no more than this is read.
    Returns:
        float32 mono at 16 kHz, shape (n_samples,), nominally in [-1, 1].
    Raises:
        TooLongError: longer than `max_duration_s`.
        InputError: no such file, not audio, an MP3 that is cut off, no samples, NaN/inf samples, or samples far
            above full scale.
    """
    if isinstance(path_or_bytes, (bytes, bytearray)):
        source, name = io.BytesIO(path_or_bytes), f"{len(path_or_bytes)} bytes of audio"
    else:
        source = name = os.fspath(path_or_bytes)
        if not Path(source).is_file():
            raise InputError(f"{name}: no such audio file. Use the path of a WAV, FLAC, OGG or MP3 file")
    try:
        with soundfile.SoundFile(source) as file:
            sample_rate, declared = file.samplerate, file.frames
            # A second more than allowed, for the resampler's rounding: what is just over is measured below.
            most = -1 if max_duration_s == math.inf else math.ceil((max_duration_s + 1) * sample_rate)
            channels = file.read(most, dtype="float32", always_2d=True)
            expected = declared if most < 0 else min(most, declared)
            missing_s = (expected - len(channels)) / sample_rate
            cut_off = file.format == "MP3" and missing_s > MP3_MISSING_S and _declares_length(path_or_bytes)
    except soundfile.SoundFileError as error:
        raise InputError(f"{name}: cannot read as audio: {error}. Use a WAV, FLAC, OGG or MP3 file") from error
    if len(channels) == 0:
        raise InputError(f"{name}: no samples in the file. Use a longer recording")
    if cut_off:
        raise InputError(
            f"{name}: the MP3 ends before the {declared / sample_rate:.2f} s of its header. Copy or export it again"
        )
    if not np.isfinite(channels).all():
        raise InputError(f"{name}: NaN or infinite samples. Export the recording again")
    peak = np.abs(channels).max()
    if peak > MAX_PEAK:
        raise InputError(f"{name}: samples up to {peak:.3g}, full scale is 1. Export the recording again")
    wav = channels.mean(axis=1)
    if sample_rate != SAMPLE_RATE:
        wav = soxr.resample(wav, sample_rate, SAMPLE_RATE)
        if len(wav) == 0:  # a few samples at a high rate
            raise InputError(f"{name}: too short, no samples are left at {SAMPLE_RATE} Hz. Use a longer recording")
    if len(wav) / SAMPLE_RATE > max_duration_s:
        duration_s = max(len(wav) / SAMPLE_RATE, declared / sample_rate)
        raise TooLongError(f"{name}: {duration_s:.2f} s is over {max_duration_s:g} s. Use a shorter recording")
    return wav.astype(np.float32)


def load_short_audio(path_or_bytes: str | bytes, max_length: int) -> np.ndarray:
    """A clip whose codes are at most `max_length` tokens; InputError for a longer one, of which no more is read."""
    try:
        return load_audio(path_or_bytes, max_duration_s=max_length / CODES_PER_SECOND)
    except TooLongError as error:
        raise InputError(f"{error}, or raise --max_length {max_length} as far as the model's context goes") from error


def _declares_length(path_or_bytes: str | os.PathLike | bytes) -> bool:
    """Whether an MP3 says how long it is; of others libsndfile guesses the length from the first frame's bit rate."""
    if isinstance(path_or_bytes, (bytes, bytearray)):
        head = path_or_bytes[:MP3_HEAD]
    else:
        with open(path_or_bytes, "rb") as file:
            head = file.read(MP3_HEAD)
    return b"Xing" in head or b"Info" in head


def save_audio(path: str | os.PathLike, wav: np.ndarray) -> None:
    """Write a mono waveform as 16-bit PCM WAV at 16 kHz, creating parent folders.

    Args:
        path: the file to write.
        wav: float, shape (n_samples,), clipped to [-1, 1].
    Raises:
        ValueError: not one-dimensional, or NaN/inf samples.
    """
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1:
        raise ValueError(f"{path}: expected a mono waveform of shape (n_samples,), got {wav.shape}")
    if not np.isfinite(wav).all():
        raise ValueError(f"{path}: the waveform holds NaN or infinite samples")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(wav_bytes(wav))  # not by libsndfile, which calls a full disk "System error"


def wav_bytes(wav: np.ndarray) -> bytes:
    """A mono waveform at 16 kHz as a WAV file of 16-bit PCM, clipped to [-1, 1]."""
    file = io.BytesIO()
    soundfile.write(file, wav.clip(-1.0, 1.0), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def audio_failure(wav: np.ndarray) -> str | None:
    """Why a waveform is not worth transcribing: 'empty', 'non_finite', 'silent', or None if it is."""
    if len(wav) == 0:
        return "empty"
    if not np.isfinite(wav).all():
        return "non_finite"
    # About the mean: a constant offset is inaudible.
    return "silent" if wav.std(dtype=np.float64) < 10 ** (SILENCE_DBFS / 20) else None


def split_at_pauses(wav: np.ndarray, window: int) -> list[np.ndarray]:
    """Cut a waveform into pieces of at most `window` samples at the quietest 100 ms in reach; drop silent pieces.

    A cut lies in the last fifth of its window; the last two pieces share what is left, so that none is a sliver.

    Args:
        wav: float, shape (n_samples,).
        window: samples, at least 10 frames of 20 ms.
    Returns:
        At least one piece.
    """
    return [piece for _, piece in cut_at_pauses(wav, window)]


def cut_at_pauses(wav: np.ndarray, window: int) -> list[tuple[int, np.ndarray]]:
    """The pieces of `split_at_pauses`, each with its first sample's place in the waveform."""
    pieces, start = [], 0
    while len(wav) > window:
        if len(wav) > 1.6 * window:
            low, high = int(0.8 * window), window
        else:
            low, high = int(0.4 * len(wav)), int(0.6 * len(wav))
        frames = wav[low : high - (high - low) % FRAME].reshape(-1, FRAME)
        width = min(PAUSE_FRAMES, len(frames))
        energy = np.convolve(np.square(frames, dtype=np.float64).sum(axis=1), np.ones(width), mode="valid")
        cut = low + int((energy.argmin() + width / 2) * FRAME)
        pieces.append((start, wav[:cut]))
        wav, start = wav[cut:], start + cut
    pieces.append((start, wav))
    return [(start, piece) for start, piece in pieces if audio_failure(piece) is None] or pieces[:1]
