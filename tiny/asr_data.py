"""ASR data of the toy setup: recordings alone or in a row, some with noise, and clips without speech.

    python -m tiny.build --stage asr_rows

Some names are rare in the supervised training of speech recognition: they are the keywords of RL and evaluation. (That
of text to speech, from which it starts, has them all.)
"""

import random
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm

from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.text_marks import plain_text
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE

RARE_NAMES = "Rebecca Jessica Benjamin Samuel Julia Oliver".split()
FRAC_RARE = 0.03  # of their sentences that the supervised training of speech recognition has
FRAC_LONG = 0.12
MAX_SECONDS = 7.5  # of a long clip: 375 codes, beside which prompt and text fit into the policy's 512 tokens
PAUSE_S = 0.2  # between the sentences of a long clip
NON_SPEECH_S = (1.0, 3.0)
SNR_DB = (10.0, 30.0)  # range of the signal-to-noise ratio; below it, the codec loses most of the speech
FRAC_NOISY = 0.6


@dataclass(frozen=True)
class ClipPlan:
    """A clip before it is put together.

    Attributes:
        rows: of its recordings, of one voice; none in a clip without speech.
        snr_db: signal-to-noise ratio; None without noise.
    """

    rows: tuple[dict, ...]
    snr_db: float | None

    @property
    def text(self) -> str:
        return plain_text(" ".join(row["text"] for row in self.rows))

    @property
    def keywords(self) -> list[str]:
        return [name for name in self.text.replace(".", "").replace("?", "").split() if name in RARE_NAMES]


def with_few_rare_names(rows: list[dict], seed: int) -> list[dict]:
    """The rows without most of those that have one of RARE_NAMES."""
    rng = random.Random(seed)
    return [row for row in rows if not ClipPlan((row,), None).keywords or rng.random() < FRAC_RARE]


def clips_of(rows: list[dict], seed: int) -> list[ClipPlan]:
    """Clips of all rows: FRAC_LONG of them of two or three of a voice, as MAX_SECONDS allows, the rest of one."""
    rng = random.Random(seed)
    speakers = list(dict.fromkeys(row["speaker"] for row in rows))
    left = {name: [row for row in rows if row["speaker"] == name] for name in speakers}
    clips = []
    for name in speakers:
        while left[name]:
            count = rng.choice([2, 3]) if rng.random() < FRAC_LONG else 1
            while count > 1 and seconds(left[name][:count]) > MAX_SECONDS:
                count -= 1
            clips.append(ClipPlan(tuple(left[name][:count]), snr_db(rng)))
            left[name] = left[name][count:]
    rng.shuffle(clips)
    return clips


def seconds(rows: list[dict]) -> float:
    return sum(row["duration_s"] for row in rows) + PAUSE_S * (len(rows) - 1)


def snr_db(rng: random.Random) -> float | None:
    return rng.uniform(*SNR_DB) if rng.random() < FRAC_NOISY else None


def clips_without_speech(count: int, seed: int) -> list[ClipPlan]:
    rng = random.Random(seed)
    return [ClipPlan((), snr_db(rng)) for _ in range(count)]


def mix_clip(clip: ClipPlan, folder: Path, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple]]:
    """The clip, float32 at 16 kHz, and its words: (word, start in s, end in s).

    Args:
        folder: of `<id>.flac`, the rows' recordings.
    """
    if not clip.rows:
        silence = np.zeros(int(rng.uniform(*NON_SPEECH_S) * SAMPLE_RATE), np.float32)
        return silence + noise(rng, silence, clip.snr_db), []
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    parts, words, start_s = [], [], 0.0
    for row in clip.rows:
        parts += [load_audio(folder / f"{row['id']}.flac"), pause]
        words += [(word, start_s + begin, start_s + end) for word, begin, end in row["words"]]
        start_s += (len(parts[-2]) + len(pause)) / SAMPLE_RATE
    wav = np.concatenate(parts[:-1])
    return wav + noise(rng, wav, clip.snr_db), words


def noise(rng: np.random.Generator, wav: np.ndarray, snr_db: float | None) -> np.ndarray:
    """Pink noise at `snr_db` below the waveform, or below speech of a typical level where the waveform is silent."""
    if snr_db is None:
        return np.zeros_like(wav)
    white = np.fft.rfft(rng.standard_normal(len(wav)))
    pink = np.fft.irfft(white / np.sqrt(np.arange(len(white)) + 1), len(wav))
    level = wav.std() if wav.any() else 0.1
    return (pink / pink.std() * level * 10 ** (-snr_db / 20)).astype(np.float32)


def rows_of(
    name: str, clips: list[ClipPlan], folder: Path, codec: SpeechCodec, seed: int, chunk: int = 256
) -> tuple[datasets.Dataset, dict[str, list]]:
    """Rows as create_dataset.py writes them, with the columns `id`, `keywords` and `snr_db`; and by id the words.

    Args:
        name: with which the ids begin.
        folder: see `mix_clip`.
    """
    rng = np.random.default_rng(seed)
    codes, words = [], []
    for start in tqdm(range(0, len(clips), chunk), desc="encode", disable=None):
        mixed = [mix_clip(clip, folder, rng) for clip in clips[start : start + chunk]]
        codes += codec.encode([wav for wav, _ in mixed])
        words += [times for _, times in mixed]
    ids = [f"{name}_{number:05d}" for number in range(len(clips))]
    rows = {
        "id": ids,
        "text": [clip.text for clip in clips],
        "audio_codes": codes,
        "speaker": [clip.rows[0]["speaker"] if clip.rows else None for clip in clips],
        "language": ["en"] * len(clips),
        "duration_s": [len(of_clip) / CODES_PER_SECOND for of_clip in codes],
        "sampling_rate": [SAMPLE_RATE] * len(clips),
        "keywords": [clip.keywords for clip in clips],
        "snr_db": [clip.snr_db for clip in clips],
    }
    return datasets.Dataset.from_dict(rows), dict(zip(ids, words, strict=True))
