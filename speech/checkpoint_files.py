"""The files of a checkpoint in transformers' format: a local folder, or a snapshot from the hub."""

import json
import pickle
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.cli import InputError, first_line

# One file, or the shards of one. Repositories also hold weights in other formats and precisions (the hub's
# openai/whisper-large-v3 has model.fp32-00001-of-00002.safetensors beside its model.safetensors).
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
# What the libraries raise for files that are missing, malformed, truncated, or of another model
UNREADABLE = (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError)


def find_checkpoint(id_or_path: str, accepted: str, other_files: tuple[str, ...] = ()) -> Path:
    """The local folder of a checkpoint, downloaded if it is a hub id.

    Args:
        accepted: what the user may give, for the error message.
        other_files: to download besides config.json and the weights, where there are any.
    Raises:
        InputError: no such folder, and the hub gave no such model; or it has no config.json.
    """
    folder = Path(id_or_path)
    if not folder.is_dir():
        try:
            # Only what is read: repositories also hold training checkpoints, samples, code.
            folder = Path(snapshot_download(id_or_path, allow_patterns=["config.json", *SAFETENSORS, *other_files]))
            if not _existing(folder, SAFETENSORS):
                snapshot_download(id_or_path, allow_patterns=list(PICKLES))
        except (OSError, ValueError) as error:  # offline, unknown, or malformed id
            raise InputError(
                f"{id_or_path}: no such folder, and the hub gave no such model "
                f"({type(error).__name__}). Accepted: {accepted}"
            ) from None
    if not (folder / "config.json").is_file():
        raise InputError(f"{id_or_path}: holds no config.json; is it the folder of a checkpoint?")
    return folder


def read_json(path: Path) -> dict:
    """The object in a .json file beside weights; InputError for one that is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({first_line(error)}). Download or save it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object (got {str(content)[:60]}). Download or save it again")
    return content


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, on the CPU; pickled ones only if there are no safetensors.

    Raises:
        InputError: there are none, or a file is broken.
    """
    safetensors = _existing(folder, SAFETENSORS)
    pickles = [] if safetensors else _existing(folder, PICKLES)
    if not safetensors and not pickles:
        raise InputError(f"{folder}: holds neither {SAFETENSORS[0]} nor {PICKLES[0]}, nor shards of them")
    state = {}
    for file in safetensors:
        state |= _load(file, load_file)
    for file in pickles:
        state |= _load(file, load_pickle)
    return state


def load_pickle(file: Path) -> dict:
    """What torch.save wrote, weights and plain Python values only: no code of it runs."""
    return torch.load(file, map_location="cpu", weights_only=True)


def _load(file: Path, load) -> dict[str, torch.Tensor]:
    try:
        state = load(file)
    except UNREADABLE as error:
        raise InputError(f"{file}: the weights are broken ({first_line(error)}). Download or save it again") from error
    if not isinstance(state, dict) or not all(isinstance(weight, torch.Tensor) for weight in state.values()):
        raise InputError(f"{file}: holds no weights by name (got {type(state).__name__}). Download or save it again")
    return state


def _existing(folder: Path, patterns: tuple[str, str]) -> list[Path]:
    """The one file, or else its shards."""
    whole, shards = patterns
    return [folder / whole] if (folder / whole).is_file() else sorted(folder.glob(shards))
