"""A small random preference model, and pairs that a micro model learns from in seconds."""

from pathlib import Path

import numpy as np
import torch
from clips import write_rows
from fake_vowel import falling

from reward_models.preference import MELODY, MELODY_WIDTH, PreferenceModel
from speech.audio import save_audio

NAMES = "anna peter susan tom mary ben eva max".split()
VOICES = {"low": 100.0, "high": 200.0}  # Hz, where the melody begins


def small_config(width: int = 32, whisper: str = "any", speakers: tuple[str, ...] = ()) -> dict:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
    return {"width": width, "whisper": whisper, "melody": MELODY, "speakers": list(speakers), **sizes}


def small_model(**config) -> PreferenceModel:
    torch.manual_seed(0)
    return PreferenceModel(small_config(**config)).eval()


def random_features(lengths: list[int], width: int = 32 + MELODY_WIDTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, width, generator=generator) for length in lengths]


def save_melody_pairs(folder: Path) -> Path:
    """Of a question the rising clip is the better one, of a statement the falling one: 32 pairs of the same clips.

    Whoever does not look at the text is right in half of them.
    """
    for voice, hz in VOICES.items():
        for number, name in enumerate(NAMES):
            start = hz * (1 + 0.02 * number)
            save_audio(folder / f"{voice}_{name}_up.wav", falling(0.5, start, 1.6 * start))
            save_audio(folder / f"{voice}_{name}_down.wav", falling(0.5, 1.6 * start, start))
    rows = []
    for voice in VOICES:
        for name in NAMES:
            up, down = f"{voice}_{name}_up.wav", f"{voice}_{name}_down.wav"
            for mark, chosen, rejected in (("?", up, down), (".", down, up)):
                row = {"id": f"{voice}_{name}{mark}", "text": f"{name}{mark}", "speaker": voice}
                row |= {"chosen_audio": chosen, "rejected_audio": rejected}
                rows.append(row | {"source": "made", "kind": "question" if mark == "?" else "statement"})
    return Path(write_rows(folder / "pairs.jsonl", rows))


def array_files(folder: Path, arrays: list[np.ndarray]) -> list[Path]:
    """Features on disk, as the trainer keeps them."""
    paths = []
    for number, array in enumerate(arrays):
        paths.append(folder / f"{number}.npy")
        np.save(paths[-1], array)
    return paths
