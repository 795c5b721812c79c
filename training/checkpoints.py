"""Find the checkpoint that a run resumes from, and check that it can."""

import json
import logging
import re
from pathlib import Path

from transformers import TrainingArguments

from common.cli import InputError

logger = logging.getLogger("train")


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
        return None
    if wanted in ("true", "True", True):
        last = last_complete_checkpoint(training_args.output_dir)
        if last:
            logger.info("resuming from %s", last)
        return last
    if not Path(wanted, "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {wanted}: no checkpoint there. Use a checkpoint-N folder, or true")
    return wanted


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint-N that was written to its end: trainer_state.json is the last file of one."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete (the run was interrupted while writing it); using the one before", folder)
            continue
        return str(folder)
    return None
