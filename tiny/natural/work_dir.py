"""What the stages of the natural toy setup's build write to --work_dir and read from it: recordings and codes."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import InputError, pick_device
from speech.audio import load_audio

SEED = 0
DEVICE = pick_device()


class Clips(NamedTuple):
    """The recordings of the corpus.

    Attributes:
        rows: of speech/metadata.jsonl: id, text, speaker, form, melody, split, duration_s.
        wavs: float32 at 16 kHz.
    """

    rows: list[dict]
    wavs: list[np.ndarray]


def clips(work_dir: Path, name: str = "speech") -> Clips:
    rows = clip_rows(work_dir, name)
    with ThreadPoolExecutor() as pool:
        wavs = list(pool.map(load_audio, (work_dir / name / f"{row['id']}.flac" for row in rows)))
    return Clips(rows, wavs)


def clip_rows(work_dir: Path, name: str = "speech") -> list[dict]:
    """The rows alone; InputError before the stage speech."""
    metadata = made(work_dir / name / "metadata.jsonl", "speech")
    return [json.loads(line) for line in metadata.read_text().splitlines()]


def made(path: Path, stage: str) -> Path:
    """The path; InputError where the stage that writes it has not run."""
    if not path.exists():
        raise InputError(f"{path}: is missing. Run --stage {stage} first")
    return path


def of_split(split: str, rows: list[dict], *columns: list) -> list[list]:
    """The rows of the split, and what each of the other lists has in their places."""
    chosen = [i for i, row in enumerate(rows) if row["split"] == split]
    return [[column[i] for i in chosen] for column in (rows, *columns)]


def load_codes(work_dir: Path) -> list[list[int]]:
    """Of all clips, in the order of their rows."""
    return pickle.loads(made(work_dir / "codes.pkl", "codec").read_bytes())
