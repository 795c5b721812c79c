"""What the trainers of reward models share: loop, batches of similar length, held-out texts, one checkpoint file."""

import argparse
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from common.cli import InputError, first_line, settings_of, write_whole
from speech.checkpoint_files import UNREADABLE, load_pickle
from speech.text_marks import plain_text
from training.gradients import check_gradient

POOL_BATCHES = 50  # the rows of so many batches are sorted by length, so that little is padded
CHECKPOINT = "checkpoint.pt"  # in the output folder during training
# Arguments that a resumed run may change
FREE_ARGUMENTS = ("output_dir", "features_dir", "device", "debug")
FREE_ARGUMENTS += ("logging_steps", "save_steps", "resume_from_checkpoint")


def text_key(text: str) -> str:
    """What tells a text from another one: its words, and whether it asks; without marks, case, spaces, punctuation.

    >>> text_key(" I *never*  said so."), text_key("I never said so"), text_key("So?")
    ('i never said so', 'i never said so', 'so?')
    """
    return " ".join(re.sub(r"[^\w\s?]", "", plain_text(text).casefold()).split())


def drawn_texts(texts: list[str], heldout_frac: float, seed: int) -> set[str]:
    """The `text_key`s of the texts to hold out, drawn from the distinct ones.

    Args:
        heldout_frac: fraction of the distinct texts, at least one text.
    Raises:
        InputError: no text is left to train on.
    """
    spellings = {text_key(text): text for text in sorted(set(texts), reverse=True)}
    distinct = sorted(spellings, key=spellings.get)
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


def train(
    name: str,
    model: torch.nn.Module,
    lengths: list[int],
    losses_of: Callable[[list[int], np.random.Generator], dict[str, torch.Tensor]],
    weights: dict[str, float],
    args: argparse.Namespace,
    device: str | torch.device,
    logger: logging.Logger,
    rows_digest: str,
    checkpoint: dict | None,
    evaluated: Callable[[], str] | None = None,
) -> dict[str, float]:
    """Train a model in place.

    Args:
        name: of the progress bar.
        lengths: of the rows.
        losses_of: the losses of a batch, scalars by name, of the numbers of its rows.
        weights: of the losses, by name.
        args: learning_rate, steps, batch_size, logging_steps, save_steps, output_dir and seed of the run.
        rows_digest: of what is trained on and held out, for `check_same_rows` of a resumed run.
        checkpoint: to resume from, of `checkpoint_to_resume`.
        evaluated: what to log of the model at every checkpoint.
    Returns:
        The means of the losses that were logged last.
    """
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = 0.1 if args.steps > 10 else 0.0  # of 10 steps a tenth would be a phase without a length
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.steps, pct_start=warm_up, cycle_momentum=False
    )
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    start_time = time.time()
    last_step = 0
    batches: list[list[int]] = []  # of this epoch, still to come
    recent: list[dict[str, float]] = []  # losses of the steps since the last line of the log
    means: dict[str, float] = {}
    if checkpoint is not None:
        last_step, batches, recent = restore(checkpoint, stateful, rng)
        logger.info("resuming after step %d", last_step)
    steps = range(last_step + 1, args.steps + 1)
    for step in tqdm(steps, name, initial=last_step, total=args.steps, mininterval=30, disable=None):
        if not batches:
            batches = epoch_batches(lengths, args.batch_size, rng)
        losses = losses_of(batches.pop(0), rng)
        optimizer.zero_grad()
        sum(weights[name] * loss for name, loss in losses.items()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        recent.append({name: loss.item() for name, loss in losses.items()})
        check_gradient(norm, step, f"whose losses are {recent[-1]}")
        optimizer.step()
        schedule.step()
        if step % args.logging_steps == 0 or step == args.steps:
            means = {name: float(np.mean([values[name] for values in recent])) for name in losses}
            shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            logger.info("step %d/%d  losses: %s  %.0f s", step, args.steps, shown, time.time() - start_time)
            recent.clear()
        if step % args.save_steps == 0 and step < args.steps:
            if evaluated is not None:
                logger.info("step %d/%d  held out: %s", step, args.steps, evaluated())
                model.train()
            save_checkpoint(
                Path(args.output_dir) / CHECKPOINT, args, rows_digest, stateful, rng, (step, batches, recent)
            )
    return means


def save_checkpoint(
    path: Path,
    args: argparse.Namespace,
    rows_digest: str,
    stateful: dict,
    rng: np.random.Generator,
    progress: tuple[int, list, list],
) -> None:
    """Write all that the remaining steps depend on, atomically.

    Args:
        rows_digest: see `train`.
        stateful: objects with a state_dict, by name.
        progress: last step, batches still to come in this epoch, losses since the last line of the log.
    """
    checkpoint = {
        "args": vars(args),
        "rows": rows_digest,
        "stateful": {name: part.state_dict() for name, part in stateful.items()},
        "numpy": rng.bit_generator.state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty without a GPU
        "progress": progress,
    }
    write_whole(path, lambda temporary: torch.save(checkpoint, temporary))


def restore(checkpoint: dict, stateful: dict, rng: np.random.Generator) -> tuple[int, list, list]:
    """Restore `stateful` and all random generators; returns the `progress` of `save_checkpoint`."""
    for name, part in stateful.items():
        part.load_state_dict(checkpoint["stateful"][name])
    rng.bit_generator.state = checkpoint["numpy"]
    torch.set_rng_state(checkpoint["torch"])
    torch.cuda.set_rng_state_all(checkpoint["cuda"][: torch.cuda.device_count()])  # fewer GPUs may be seen by now
    return checkpoint["progress"]


def checkpoint_to_resume(args: argparse.Namespace, weights_file: str) -> dict | None:
    """What `save_checkpoint` has written into --output_dir; None where nothing is there.

    Args:
        weights_file: of the finished model.
    Raises:
        InputError: a checkpoint that is not to be resumed, or of other settings; a finished model.
    """
    path = Path(args.output_dir) / CHECKPOINT
    if not path.exists():
        if (Path(args.output_dir) / weights_file).exists():
            raise InputError(
                f"--output_dir: {args.output_dir} holds a finished model. Use another folder, or delete it"
            )
        return None
    if args.resume_from_checkpoint == "false":
        raise InputError(
            f"--output_dir: {path} is the checkpoint of an interrupted run. Resume it with --resume_from_checkpoint "
            "true, or use another folder"
        )
    try:
        checkpoint = load_pickle(path)
    except UNREADABLE as error:
        raise InputError(
            f"--output_dir: {path} cannot be read ({first_line(error)}). If it is broken, delete it to start anew"
        ) from error
    before = checkpoint["args"]
    changed = [name for name, value in settings_of(args, FREE_ARGUMENTS).items() if before.get(name) != value]
    if changed:
        changes = ", ".join(f"--{name} {before.get(name)} before, {getattr(args, name)} now" for name in changed)
        raise InputError(
            f"--output_dir: {path} is of a run with other settings ({changes}). Use the same ones, or another folder"
        )
    return checkpoint


def check_same_rows(args: argparse.Namespace, checkpoint: dict | None, rows_digest: str) -> None:
    """Raises InputError where the checkpoint to resume from is of a run with other rows, or held-out rows.

    Args:
        rows_digest: see `train`.
    """
    before = checkpoint.get("rows") if checkpoint else None
    if before not in (None, rows_digest):  # None: of an older version
        raise InputError(
            f"--output_dir: {args.output_dir} has a checkpoint of a run on other data: its files have changed since. "
            "Use another folder"
        )
