"""The files that an evaluation leaves, and how an interrupted one resumes from them.

results.json, results.md and report.html are for the reader. sounds.npz has the audio on the page, which a resumed
evaluation puts on its page again.
"""

import json
import shlex
import zipfile
from pathlib import Path

import numpy as np

from common.cli import InputError, write_whole, write_whole_text
from common.run_record import changed_settings, provenance
from common.tables import markdown_table

# Arguments that do not change the rows: a resumed evaluation may have other values of them
FREE_ARGUMENTS = ("output_dir", "overwrite", "debug")
FULL_SCALE = 32_768  # of 16-bit audio


def open_results(folder: Path, arguments: dict, digests: dict, overwrite: bool) -> dict:
    """What results.json is to hold before its first row, or what an interrupted evaluation left of it.

    Its date, command and commit are those of the run that began it.

    Args:
        arguments: of evaluation.py.
        digests: JSON; what tells the models, texts or clips that the arguments name from others of the same names.
    Raises:
        InputError: results.json is of other settings, and not to be overwritten.
    """
    results = {**provenance(), "arguments": arguments, "digests": digests, "rows": []}
    results = json.loads(json.dumps(results))
    file = folder / "results.json"
    if overwrite or not file.exists():
        return results
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        changed = changed_settings(_settings(earlier), _settings(results))
        complete = isinstance(earlier["rows"], list)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(
            f"--output_dir {folder}: its results.json does not tell what settings it is of. Use another folder, or "
            "replace it with --overwrite"
        )
    if changed:
        raise InputError(
            f"--output_dir {folder}: has the results of a run with other {changed}. Use another folder, or replace "
            "them with --overwrite"
        )
    return earlier


def _settings(results: dict) -> dict:
    """All that decides what the rows are."""
    arguments = {name: value for name, value in results["arguments"].items() if name not in FREE_ARGUMENTS}
    return arguments | results["digests"]


def write_results(folder: Path, results: dict, about: str, table: list[list[str]], page: str) -> None:
    """Write results.json, results.md and report.html.

    Each is replaced as a whole: a reader meanwhile sees the old or the new file, never half of one.

    Args:
        results: of results.json; `argv` is the command.
        about: the line above the table of results.md.
        table: header and rows.
        page: report.html.
    """
    header, *rows = table
    command = "\n    ".join(shlex.join(results["argv"]).splitlines())  # all of it stays in its block of code
    contents = {
        "results.md": f"{about}\n\n    {command}\n\n{markdown_table(header, rows)}\n",
        "report.html": page,
        # Last: what it has is not computed again, so it must be in the others
        "results.json": json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False),
    }
    for name, content in contents.items():
        write_whole_text(folder / name, content)


def write_sounds(folder: Path, sounds: dict[str, np.ndarray]) -> None:
    """Write sounds.npz: the waveforms on the page, to the 16 bits that the page has of them."""
    # Rounded as soundfile rounds
    steps = {
        name: np.floor(np.nan_to_num(wav) * FULL_SCALE).clip(-FULL_SCALE, FULL_SCALE - 1)
        for name, wav in sounds.items()
    }
    samples = {name: step.astype(np.int16) for name, step in steps.items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **samples)

    write_whole(folder / "sounds.npz", write)


def read_sounds(folder: Path) -> dict[str, np.ndarray]:
    """The waveforms of sounds.npz, float32; InputError if there is none."""
    try:
        with np.load(folder / "sounds.npz") as samples:
            return {name: samples[name].astype(np.float32) / FULL_SCALE for name in samples}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--output_dir {folder}: the sounds.npz of its rows is missing or broken. Begin again with --overwrite"
        ) from error
