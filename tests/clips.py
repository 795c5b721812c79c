"""Short clips on disk, for tests of the listening page."""

import json
from pathlib import Path

import numpy as np

from speech.audio import save_audio
from speech.tokens import SAMPLE_RATE


def tone(path: Path, duration_s: float = 0.3, hz: float = 220.0) -> str:
    """A tone that fades in, so that no piece of it is like another."""
    t = np.arange(int(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
    save_audio(path, 0.3 * np.sin(2 * np.pi * hz * t) * (0.1 + t / duration_s))
    return path.name


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
