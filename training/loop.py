"""What the trainers of reward models share: batches of similar length, held-out texts, and one checkpoint file."""

import argparse
from pathlib import Path

import numpy as np
import torch

from common.cli import InputError, write_whole

POOL_BATCHES = 50  # the rows of so many batches are sorted by length, so that little is padded
CHECKPOINT = "checkpoint.pt"  # in the output folder during training
# Arguments that a resumed run may change
FREE_ARGUMENTS = ("output_dir", "device", "logging_steps", "save_steps", "resume_from_checkpoint", "debug")


def drawn_texts(texts: list[str], heldout_frac: float, seed: int) -> set[str]:
    """The texts to hold out, drawn from the distinct ones.

    Args:
        heldout_frac: fraction of the distinct texts, at least one text.
    Raises:
        InputError: no text is left to train on.
    """
    distinct = sorted(set(texts))
    count = max(1, round(heldout_frac * len(distinct)))
    if count == len(distinct):
        raise InputError(
            f"--heldout_frac: must leave texts to train on (got {heldout_frac} of {len(distinct)} "
            "distinct texts). Lower it, add texts, or hold out a file of its own"
        )
    return {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:count]}


def epoch_batches(lengths: list[int], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """The row numbers of each batch of an epoch, every row once; the rows of a batch have similar lengths."""
    order = rng.permutation(len(lengths))
    pool_size = POOL_BATCHES * batch_size
    batches = []
    for first in range(0, len(order), pool_size):
        by_length = sorted(order[first : first + pool_size].tolist(), key=lambda i: lengths[i])
        batches += [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def save_checkpoint(
    path: Path, args: argparse.Namespace, stateful: dict, rng: np.random.Generator, progress: tuple[int, list, list]
) -> None:
    """Write all that the remaining steps depend on, atomically.

    Args:
        stateful: objects with a state_dict, by name.
        progress: last step, batches still to come in this epoch, losses since the last line of the log.
    """
    checkpoint = {
        "args": vars(args),
        "stateful": {name: part.state_dict() for name, part in stateful.items()},
        "numpy": rng.bit_generator.state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty without a GPU
        "progress": progress,
    }
    write_whole(path, lambda temporary: torch.save(checkpoint, temporary))


def load_checkpoint(path: Path, stateful: dict, rng: np.random.Generator) -> tuple[int, list, list]:
    """Restore `stateful` and all random generators; returns the `progress` of `save_checkpoint`."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in stateful.items():
        part.load_state_dict(checkpoint["stateful"][name])
    rng.bit_generator.state = checkpoint["numpy"]
    torch.set_rng_state(checkpoint["torch"])
    torch.cuda.set_rng_state_all(checkpoint["cuda"])
    return checkpoint["progress"]


def check_resumable(args: argparse.Namespace, weights_file: str) -> None:
    """Raises InputError where --output_dir has a checkpoint that is not to be resumed, or of other settings.

    Args:
        weights_file: of the finished model.
    """
    path = Path(args.output_dir) / CHECKPOINT
    if not path.exists():
        if (Path(args.output_dir) / weights_file).exists():
            raise InputError(
                f"--output_dir: {args.output_dir} holds a finished model. Use another folder, or delete it"
            )
        return
    if args.resume_from_checkpoint == "false":
        raise InputError(
            f"--output_dir: {path} is the checkpoint of an interrupted run. Resume it with --resume_from_checkpoint "
            "true, or use another folder"
        )
    before = torch.load(path, map_location="cpu", weights_only=True)["args"]
    changed = [name for name, value in vars(args).items() if name not in FREE_ARGUMENTS and before.get(name) != value]
    if changed:
        changes = ", ".join(f"--{name} {before.get(name)} before, {getattr(args, name)} now" for name in changed)
        raise InputError(
            f"--output_dir: {path} is of a run with other settings ({changes}). Use the same ones, or another folder"
        )
