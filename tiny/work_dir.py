"""What the stages of the toy setup's build write to --work_dir and read from it: recordings and codes."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.cli import InputError, pick_device
from speech.audio import load_audio

SEED = 0
DEVICE = pick_device()


def clip_rows(work_dir: Path, name: str = "speech") -> list[dict]:
    """Of the recordings: id, text, speaker, form, melody, split, duration_s, words; InputError before the stage speech.

    Args:
        name: of the folder, "speech" or "random".
    """
    metadata = made(work_dir / name / "metadata.jsonl", "speech")
    return [json.loads(line) for line in metadata.read_text().splitlines()]


def recordings(work_dir: Path, rows: list[dict], name: str = "speech") -> list[np.ndarray]:
    """Waveforms of the rows, float32 at 16 kHz; `name` as in `clip_rows`."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(load_audio, (work_dir / name / f"{row['id']}.flac" for row in rows)))


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


def heldout_clips(work_dir: Path) -> tuple[list[dict], list[np.ndarray], list[list[int]]]:
    """Rows, recordings and codes of the held-out split."""
    rows, codes = of_split("heldout", clip_rows(work_dir), load_codes(work_dir))
    return rows, recordings(work_dir, rows), codes
