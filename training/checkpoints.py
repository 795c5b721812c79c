"""Find the checkpoint that a run resumes from, and check that it can."""

import json
import logging
import re
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel, Trainer, TrainingArguments

from common.cli import InputError

logger = logging.getLogger("train")

TRAINED_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# Of one process, of FSDP's shards, of DeepSpeed
CHECKPOINT_WEIGHTS = ("*.safetensors", "pytorch_model_fsdp_*", "global_step*")


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint of --resume_from_checkpoint: a folder, or true for the last complete one; None to start anew.

    Raises:
        InputError: no such checkpoint, or the run would overwrite an earlier one's.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted in (None, False, "false", "False"):
        if last_complete_checkpoint(training_args.output_dir):
            raise InputError(
                f"--output_dir {training_args.output_dir}: holds checkpoints of an earlier run. Resume it with "
                "--resume_from_checkpoint true, or use another --output_dir"
            )
        check_no_model(training_args.output_dir)
        return None
    if wanted in ("true", "True", True):
        last = last_complete_checkpoint(training_args.output_dir)
        if last:
            logger.info("resuming from %s", last)
            warn_of_other_processes(Path(last), training_args.world_size)
        else:
            check_no_model(training_args.output_dir)
        return last
    if not is_complete(Path(wanted)):
        raise InputError(
            f"--resume_from_checkpoint {wanted}: no complete checkpoint there. Use a checkpoint-N folder, or true"
        )
    warn_of_other_processes(Path(wanted), training_args.world_size)
    return wanted


def check_same_shapes(checkpoint: str | None, model: PreTrainedModel) -> None:
    """Raises InputError where a checkpoint's weights have not the shapes of `model`'s, or none of its names.

    Of what one process wrote; FSDP's and DeepSpeed's shards are left to the library.
    """
    if checkpoint is None:
        return
    expected = {name.replace(".default", ""): list(weight.shape) for name, weight in model.named_parameters()}
    stored = {}
    for path in Path(checkpoint).glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            stored |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    shared = stored.keys() & expected.keys()
    differing = sorted(name for name in shared if stored[name] != expected[name])
    if differing or (stored and not shared):
        name = differing[0] if differing else min(stored)
        here = f"shape {expected[name]}" if differing else "no such weight"
        raise InputError(
            f"{checkpoint}: is of another model: {name} has shape {stored[name]} there, and this run's model has "
            f"{here}. Resume with the policy and the adapter of the run that wrote it, or use another --output_dir"
        )


def warn_of_other_processes(checkpoint: Path, processes: int) -> None:
    """Warn where a run goes on with more or fewer processes than wrote the checkpoint; each left its random state."""
    written = len(list(checkpoint.glob("rng_state*.pth")))
    if written not in (0, processes):
        logger.warning(
            "%s was written by %d processes, and %d resume it: a step has another number of rollouts, and prompts and "
            "random numbers are not those of the run as it was",
            checkpoint,
            written,
            processes,
        )


def check_no_model(output_dir: str) -> None:
    """Raises InputError where a trained model would be overwritten."""
    present = [name for name in TRAINED_WEIGHTS if Path(output_dir, name).is_file()]
    if present:
        raise InputError(
            f"--output_dir {output_dir}: holds a trained model ({present[0]}). Use another --output_dir, or delete it"
        )


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint-N that was written to its end."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_complete(folder):
            return str(folder)
        logger.warning("%s is incomplete (the run was interrupted while writing it); using the one before", folder)
    return None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has weights and, as the last file of one, a whole trainer_state.json."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(next(folder.glob(pattern), None) is not None for pattern in CHECKPOINT_WEIGHTS)


def stop_where_all_steps_are_done(trainer: Trainer) -> None:
    """Let a run resumed from the checkpoint of its last step end with it.

    transformers looks at --max_steps after a step only, so within an epoch it would take one too many.
    """
    run_epoch = trainer._run_epoch

    def run_epoch_unless_done(**state) -> None:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            run_epoch(**state)

    trainer._run_epoch = run_epoch_unless_done
