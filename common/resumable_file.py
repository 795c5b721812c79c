"""A .jsonl file that is whole or not there, and what an interrupted run of many batches left of it.

Beside `t.jsonl` stands `t.jsonl.run.json`, which says what run it is of, and until all is done `t.jsonl.partial`: a
line of JSON for each finished batch, from which the same command resumes.
"""

import json
from pathlib import Path

from common.cli import InputError, write_whole_text
from common.run_record import changed_settings, provenance


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Write a file of JSON Lines, whole or not at all."""
    write_whole_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ResumableFile:
    """A .jsonl file, whole once `finish` is called.

    Args:
        path: of the file.
        run: JSON; all that decides what is in it.
        what: what is in it, for messages.
        overwrite: whether to replace a finished file, and discard what another unfinished run has left.
    Raises:
        InputError: `path` is of another run, finished or not, and is not to be overwritten.
    """

    def __init__(self, path: Path, run: dict, what: str, overwrite: bool):
        self.path, self.run, self.what, self.overwrite = path, json.loads(json.dumps(run)), what, overwrite
        self.partial = path.with_name(f"{path.name}.partial")
        self.run_file = path.with_name(f"{path.name}.run.json")
        if not overwrite and (path.exists() or self.partial.exists()):
            self._check_run()

    def _earlier_run(self) -> dict | None:
        try:
            return json.loads(self.run_file.read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _check_run(self) -> None:
        earlier = self._earlier_run()
        if earlier is None:
            raise InputError(
                f"--output {self.path}: exists, and no {self.run_file.name} tells what is in it. Use another file, or "
                "replace it with --overwrite"
            )
        changed = changed_settings(earlier, self.run)
        if changed:
            raise InputError(
                f"--output {self.path}: has the {self.what} of a run with other {changed}. Use another file, or "
                "replace them with --overwrite"
            )

    @property
    def finished(self) -> bool:
        return self.path.exists() and not self.overwrite

    def finished_batches(self) -> list:
        """What `add_batch` was given, by this run before it was interrupted; starts its record where there is none."""
        if self.overwrite:
            self.path.unlink(missing_ok=True)
            if self._earlier_run() != self.run:
                self.partial.unlink(missing_ok=True)
        lines = self.partial.read_text(encoding="utf-8").split("\n")[:-1] if self.partial.exists() else []
        record = json.dumps({**provenance(), "run": self.run}, indent=1, ensure_ascii=False)
        write_whole_text(self.run_file, record + "\n")  # first: without it the other files are refused
        # Without the line that was cut off, if one was
        write_whole_text(self.partial, "".join(f"{line}\n" for line in lines))
        return [json.loads(line) for line in lines]

    def add_batch(self, batch: dict) -> None:
        """Append the JSON of a batch that has just been finished."""
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch, ensure_ascii=False) + "\n")

    def finish(self, records: list[dict]) -> None:
        """Write the file, a line for each record."""
        write_json_lines(self.path, records)
        self.partial.unlink()
