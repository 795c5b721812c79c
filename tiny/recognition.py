"""The small world's recognition data: speech codes and what is said in them, for the same model the other way round.

    python -m tiny.build --stage recognition

Speech as it comes: mostly short, at times several sentences long, at times under noise, at times nothing but
noise or silence, and names that supervised training hardly saw.
"""

import random
from dataclasses import dataclass, field

import datasets
import numpy as np
from tqdm import tqdm

from speech.codec import SpeechCodec
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE
from tiny.corpus import SPEAKERS, speak_all

RARE_NAMES = "Victoria Edward Barbara Thomas Angela Frederick".split()  # the keywords
PAUSE_S = 0.12  # between the sentences of a long clip
SNR_DB = (10.0, 30.0)  # of the noise; below, little of the speech survives the codec
NOISY_SHARE = 0.6


@dataclass(frozen=True)
class Mix:
    """What a set of clips is made of; shares of the clips.

    Attributes:
        long: of 3 or 4 sentences instead of one.
        rare: sentences whose name is one of RARE_NAMES.
        nothing: noise, or silence, without a word.
    """

    long: float
    rare: float
    nothing: float = 0.0


@dataclass
class Clip:
    sentences: list[str] = field(default_factory=list)
    speaker: str = "slt"
    snr_db: float | None = None
    keywords: list[str] = field(default_factory=list)


def clips_of(sentences: list[str], count: int, mix: Mix, seed: int) -> list[Clip]:
    """`count` clips that use up `sentences` from the front."""
    rng, texts = random.Random(seed), iter(sentences)
    clips = []
    for _ in range(count):
        snr_db = rng.uniform(*SNR_DB) if rng.random() < NOISY_SHARE else None
        clip = Clip(speaker=rng.choice(list(SPEAKERS)), snr_db=snr_db)
        if rng.random() >= mix.nothing:
            clip.sentences = [next(texts) for _ in range(rng.choice([3, 4]) if rng.random() < mix.long else 1)]
        for i, sentence in enumerate(clip.sentences):
            if rng.random() < mix.rare:
                name = rng.choice(RARE_NAMES)
                clip.sentences[i] = f"{name} {sentence.split(' ', 1)[1]}"
                clip.keywords.append(name)
        clips.append(clip)
    return clips


def record(clips: list[Clip], seed: int) -> list[np.ndarray]:
    """The clips as sound, float32 at 16 kHz; without sentences one to two seconds of noise, or of silence."""
    said = [(sentence, clip.speaker) for clip in clips for sentence in clip.sentences]
    spoken = iter(speak_all([sentence for sentence, _ in said], [speaker for _, speaker in said]))
    rng = np.random.default_rng(seed)
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    wavs = []
    for clip in clips:
        parts = [part for _ in clip.sentences for part in (next(spoken), pause)][:-1]
        wav = np.concatenate(parts) if parts else np.zeros(int(rng.uniform(1, 2) * SAMPLE_RATE), np.float32)
        wavs.append(wav + noise(rng, wav, clip.snr_db))
    return wavs


def noise(rng: np.random.Generator, wav: np.ndarray, snr_db: float | None) -> np.ndarray:
    """Noise with as much power in every octave; beside silence as loud as beside speech."""
    if snr_db is None:
        return np.zeros_like(wav)
    white = np.fft.rfft(rng.standard_normal(len(wav)))
    pink = np.fft.irfft(white / np.sqrt(np.arange(len(white)) + 1), len(wav))
    level = wav.std() if wav.any() else 0.1
    return (pink / pink.std() * level * 10 ** (-snr_db / 20)).astype(np.float32)


def rows_of(clips: list[Clip], codec: SpeechCodec, seed: int, chunk: int = 64) -> datasets.Dataset:
    """Codes, texts and what the clips are, as create_dataset.py writes them."""
    wavs = record(clips, seed)
    codes = [
        one
        for start in tqdm(range(0, len(wavs), chunk), desc="encode", mininterval=30)
        for one in codec.encode(wavs[start : start + chunk])
    ]
    return datasets.Dataset.from_dict(
        {
            "text": [" ".join(clip.sentences) for clip in clips],
            "audio_codes": codes,
            "speaker": [clip.speaker for clip in clips],
            "language": ["en"] * len(clips),
            "duration_s": [len(one) / CODES_PER_SECOND for one in codes],
            "sampling_rate": [SAMPLE_RATE] * len(clips),
            "keywords": [clip.keywords for clip in clips],
            "snr_db": [clip.snr_db for clip in clips],
        }
    )
