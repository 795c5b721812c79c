"""The transcripts of inference.py --task asr: a file that is whole or not there, and what an interrupted run left.

Beside `t.jsonl` stands `t.jsonl.run.json`, which says what run it is of, and until all is done `t.jsonl.partial`: a
line for each finished batch, from which the same command resumes as if it had never stopped, its random state included.
"""

import base64
import json
from functools import partial
from pathlib import Path

import torch

from common.cli import InputError, write_whole
from common.run_record import changed_settings, provenance
from speech.policy import Transcript


class TranscriptFile:
    """A .jsonl file, whole once `finish` is called.

    Args:
        path: of the file.
        run: JSON; all that decides what the transcripts are.
        device: where they are sampled.
        overwrite: whether to discard what another run, or this one, has left.
    Raises:
        InputError: `path` has transcripts of another run, finished or not, and they are not to be overwritten.
    """

    def __init__(self, path: Path, run: dict, device: str, overwrite: bool):
        self.path, self.run, self.device = path, json.loads(json.dumps(run)), torch.device(device)
        self.partial = path.with_name(f"{path.name}.partial")
        self.run_file = path.with_name(f"{path.name}.run.json")
        self.overwrite = overwrite
        if not overwrite and (path.exists() or self.partial.exists()):
            self._check_run()

    def _check_run(self) -> None:
        try:
            earlier = json.loads(self.run_file.read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"--output {self.path}: exists, and no {self.run_file.name} tells what is in it. Use another file, or "
                "replace it with --overwrite"
            ) from None
        changed = changed_settings(earlier, self.run)
        if changed:
            raise InputError(
                f"--output {self.path}: has the transcripts of a run with other {changed}. Use another file, or "
                "replace them with --overwrite"
            )

    @property
    def finished(self) -> bool:
        return self.path.exists() and not self.overwrite

    def resume(self) -> list[dict[int, Transcript]]:
        """The batches that are done, by the rollouts' indices; torch's random state is then that after the last one.

        Starts the record of this run where there are none.
        """
        if self.overwrite:
            self.path.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)
        lines = self.partial.read_text(encoding="utf-8").split("\n")[:-1] if self.partial.exists() else []
        # Without the line that was cut off, if one was
        write_whole(
            self.partial, partial(Path.write_text, data="".join(f"{line}\n" for line in lines), encoding="utf-8")
        )
        record = json.dumps({**provenance(), "run": self.run}, indent=1, ensure_ascii=False)
        write_whole(self.run_file, partial(Path.write_text, data=record + "\n", encoding="utf-8"))
        batches = [json.loads(line) for line in lines]
        if batches:
            set_random_state(batches[-1]["random_state"], self.device)
        return [{i: Transcript(text, truncated) for i, text, truncated in batch["rollouts"]} for batch in batches]

    def add(self, batch: dict[int, Transcript]) -> None:
        """Append a batch that has just been sampled."""
        rollouts = [[i, transcript.text, transcript.truncated] for i, transcript in batch.items()]
        line = json.dumps({"rollouts": rollouts, "random_state": random_state(self.device)}, ensure_ascii=False)
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def finish(self, records: list[dict]) -> None:
        """Write the file, a line for each record."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_whole(self.path, partial(Path.write_text, data=lines, encoding="utf-8"))
        self.partial.unlink()


def random_state(device: torch.device) -> str:
    """The state of the generator that a device samples with, as text: 16 bytes of a GPU, 5 KB of a CPU."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return base64.b64encode(state.numpy().tobytes()).decode()


def set_random_state(text: str, device: torch.device) -> None:
    state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
