"""ASR data of the toy setup: speech codes and their reference texts.

    python -m tiny.build --stage asr_data

Most clips are short, some are several sentences long, some noisy, some without speech (noise or silence), and some have
names that are rare in the supervised training.
"""

import random
from dataclasses import dataclass, field

import datasets
import numpy as np
from tqdm import tqdm

from speech.codec import SpeechCodec
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE
from tiny.corpus import SPEAKERS, speak_all

RARE_NAMES = "Victoria Edward Barbara Thomas Angela Frederick".split()  # the keywords of RL and evaluation
PAUSE_S = 0.12  # between the sentences of a long clip
SNR_DB = (10.0, 30.0)  # range of the signal-to-noise ratio; below it, the codec loses most of the speech
FRAC_NOISY = 0.6


@dataclass(frozen=True)
class Mix:
    """Composition of a set of clips.

    Attributes:
        long: fraction of the clips with 3 or 4 sentences instead of one.
        rare: fraction of the sentences whose name is one of RARE_NAMES.
        non_speech: fraction of the clips of noise or silence.
    """

    long: float
    rare: float
    non_speech: float = 0.0


@dataclass
class Clip:
    """One clip before it is synthesized.

    Attributes:
        sentences: none in a clip without speech.
        snr_db: signal-to-noise ratio; None without noise.
        keywords: those of RARE_NAMES in the sentences.
    """

    sentences: list[str] = field(default_factory=list)
    speaker: str = "slt"
    snr_db: float | None = None
    keywords: list[str] = field(default_factory=list)


def clips_of(sentences: list[str], count: int, mix: Mix, seed: int) -> list[Clip]:
    """`count` clips; they take their sentences from the front of `sentences`."""
    rng, texts = random.Random(seed), iter(sentences)
    clips = []
    for _ in range(count):
        snr_db = rng.uniform(*SNR_DB) if rng.random() < FRAC_NOISY else None
        clip = Clip(speaker=rng.choice(list(SPEAKERS)), snr_db=snr_db)
        if rng.random() >= mix.non_speech:
            clip.sentences = [next(texts) for _ in range(rng.choice([3, 4]) if rng.random() < mix.long else 1)]
        for i, sentence in enumerate(clip.sentences):
            if rng.random() < mix.rare:
                name = rng.choice(RARE_NAMES)
                clip.sentences[i] = f"{name} {sentence.split(' ', 1)[1]}"
                clip.keywords.append(name)
        clips.append(clip)
    return clips


def record(clips: list[Clip], seed: int) -> list[np.ndarray]:
    """Waveforms of the clips, float32 at 16 kHz; without sentences, 1 to 2 s of noise or silence."""
    sentences = [sentence for clip in clips for sentence in clip.sentences]
    speakers = [clip.speaker for clip in clips for _ in clip.sentences]
    recordings = iter(speak_all(sentences, speakers))
    rng = np.random.default_rng(seed)
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    wavs = []
    for clip in clips:
        parts = [part for _ in clip.sentences for part in (next(recordings), pause)][:-1]
        wav = np.concatenate(parts) if parts else np.zeros(int(rng.uniform(1, 2) * SAMPLE_RATE), np.float32)
        wavs.append(wav + noise(rng, wav, clip.snr_db))
    return wavs


def noise(rng: np.random.Generator, wav: np.ndarray, snr_db: float | None) -> np.ndarray:
    """Pink noise at `snr_db` below the waveform, or below speech of a typical level where the waveform is silent."""
    if snr_db is None:
        return np.zeros_like(wav)
    white = np.fft.rfft(rng.standard_normal(len(wav)))
    pink = np.fft.irfft(white / np.sqrt(np.arange(len(white)) + 1), len(wav))
    level = wav.std() if wav.any() else 0.1
    return (pink / pink.std() * level * 10 ** (-snr_db / 20)).astype(np.float32)


def rows_of(clips: list[Clip], codec: SpeechCodec, seed: int, chunk: int = 64) -> datasets.Dataset:
    """Rows as create_dataset.py writes them, with the columns `keywords` and `snr_db`."""
    wavs = record(clips, seed)
    codes = []
    for start in tqdm(range(0, len(wavs), chunk), desc="encode", disable=None):
        codes += codec.encode(wavs[start : start + chunk])
    return datasets.Dataset.from_dict(
        {
            "text": [" ".join(clip.sentences) for clip in clips],
            "audio_codes": codes,
            "speaker": [clip.speaker for clip in clips],
            "language": ["en"] * len(clips),
            "duration_s": [len(ids) / CODES_PER_SECOND for ids in codes],
            "sampling_rate": [SAMPLE_RATE] * len(clips),
            "keywords": [clip.keywords for clip in clips],
            "snr_db": [clip.snr_db for clip in clips],
        }
    )
