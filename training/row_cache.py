"""Rows made once on each machine and read from the disk: by its other processes, and instead of from memory."""

import atexit
import hashlib
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
from datasets.fingerprint import generate_random_fingerprint

from common.cli import InputError


def map_rows(
    rows: datasets.Dataset,
    name: str,
    make: Callable[[dict], dict | None],
    features: datasets.Features,
    cache: Path | None,
) -> datasets.Dataset:
    """What `make` gives for each row, without the rows for which it gives None; through the disk, not memory.

    Args:
        name: of the data set, for the message that names a row.
        cache: file to write; read instead where it is there already. None: in memory.
    Raises:
        InputError: of `make`, with the number of the row.
    """

    def make_batch(columns: dict[str, list], indices: list[int]) -> dict[str, list]:
        made = []
        for position, index in enumerate(indices):
            try:
                made.append(make({column: values[position] for column, values in columns.items()}))
            except InputError as error:
                raise InputError(f"{name}, row {index}: {error}") from None
        kept = [record for record in made if record is not None]
        return {column: [record[column] for record in kept] for column in features}

    return rows.map(
        make_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        cache_file_name=None if cache is None else str(cache),
        keep_in_memory=cache is None,
        load_from_cache_file=cache is not None,
        new_fingerprint=generate_random_fingerprint(),  # a hash would read `make` and its whole tokenizer
    )


def cache_folder(training_args) -> Path:
    """A folder for the rows of this run, empty at its start and gone at its end, the same for a machine's processes.

    The first process of a machine makes the rows, under `main_process_first`; the others find them here.
    """
    run = hashlib.sha256(str(Path(training_args.output_dir).resolve()).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "llasa-grpo" / f"{socket.gethostname()}-{run}"
    if training_args.local_process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
        except OSError as error:  # as on a node without home folders
            raise InputError(
                f"cannot write into {folder.parent}: {error.strerror}. Set HF_HOME in the environment to a folder "
                "that can be written"
            ) from error
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
