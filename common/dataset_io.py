"""Open a dataset by name, and check the types of its columns: the rules of `--dataset` in every script."""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, ClassLabel, Dataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, is_offline_mode

from common.cli import InputError, library_errors_are_input

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
SHARD_SUFFIXES = {".arrow", ".tar"}  # these may hold texts too
ACCEPTED = (
    "Accepted: a hub id such as 'owner/name', a folder saved by datasets' save_to_disk, a folder of audio with a "
    "metadata.csv or .jsonl, or a .json, .jsonl, .csv, .tsv or .parquet file"
)
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "text_normalized", "normalized_text")
AUDIO_COLUMNS = ("audio", "file_name", "audio_path", "audio_filepath", "path", "file", "wav")
CARRIED_COLUMNS = {  # name in the result → possible names in the source
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
    "id": ("id", "utterance_id", "segment_id"),
}


def load_any_dataset(name_or_path: str, split: str = "train", config: str | None = None) -> Dataset:
    """One split of a dataset, local or on the hub.

    Args:
        name_or_path: hub id, saved folder, audiofolder, or metadata file; a local path takes precedence over the hub.
        split: for a hub dataset also 'train[:100]'. A single file is one split: 'train', or its name without the
            suffix.
        config: of a hub dataset that has several, e.g. a language.
    Returns:
        The rows. An audiofolder comes as its metadata with `file_name` (datasets would need torchcodec to list the
        files). CSV has no types: all its columns are strings.
    Raises:
        InputError: no such dataset, the hub cannot be reached, no such split, unreadable, or empty; the message lists
            what is accepted.
    """
    path = Path(name_or_path)
    if not path.exists():
        return _load_from_hub(name_or_path, split, config)
    if config is not None:
        raise InputError(
            f"--dataset_config: {name_or_path} is a local path, only datasets on the hub have configurations (got "
            f"{config!r}). Leave it out"
        )
    file = find_data_file(name_or_path, split)
    if file is not None:
        rows = _read_file(file)
    elif (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        _check_split(name_or_path, split, splits)
        rows = _load_saved(path / split)
    elif (path / "state.json").is_file():
        rows = _load_saved(path)
        _check_split(name_or_path, split, ["train"] if rows.split is None else [str(rows.split), "train"])
    else:
        rows = _load_folder(path, split)
    with library_errors_are_input(f"{path}: not UTF-8 text. Convert the file to UTF-8", pa.ArrowInvalid):
        rows.data.validate(full=True)  # Arrow's reader of JSON takes any bytes, and the first look at them fails
    if len(rows) == 0:
        raise InputError(f"{name_or_path}: no rows in split {split!r}. Use another split or dataset")
    return rows


def drawn_rows(num_rows: int, num_drawn: int | None, seed: int) -> list[int]:
    """Indices of `num_drawn` rows drawn by the seed, in their order; of all where there are no more, or for None."""
    if num_drawn is None or num_drawn >= num_rows:
        return list(range(num_rows))
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:num_drawn]).tolist()


def find_data_file(name_or_path: str, split: str) -> Path | None:
    """The file with the rows of a split, if there is one; relative audio paths start in its folder.

    Raises:
        InputError: `name_or_path` is a file of an unknown format or of another split.
    """
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix.lower() not in FILE_SUFFIXES:
            raise InputError(f"{path}: a file of an unknown format (got {path.suffix or 'no suffix'}). {ACCEPTED}")
        _check_split(name_or_path, split, ["train", path.stem])
        return path
    stems = [split, f"{split}/metadata"] + (["metadata"] if split == "train" else [])
    files = [path / (stem + suffix) for stem in stems for suffix in FILE_SUFFIXES]
    return next((file for file in files if file.is_file()), None)


# --- Types of columns -------------------------------------------------------------------------------------


def check_codes(rows: Dataset, column: str, num_codes: int, name: str, optional: bool = False) -> None:
    """Check that every row of a column such as audio_codes holds speech codes, before any model is loaded.

    A second for a million rows: a batch is checked as Arrow arrays, and only one with a fault value by value.

    Args:
        num_codes: of the codec; codes are in [0, num_codes).
        name: of the dataset, for the message.
        optional: the column may be absent, and a row null or empty; a code never.
    Raises:
        InputError: no such column; codes that are strings, floats, booleans, lists, null or out of range; a row that
            is not a list, or has no codes. The message names the dataset and the row.
    """

    def are_codes(lists: pa.Array) -> bool:
        if not (_is_list(lists.type) and pa.types.is_integer(lists.type.value_type)):
            return False
        codes = lists.flatten()
        if codes.null_count:
            return False
        extremes = pc.min_max(codes).as_py()
        in_range = len(codes) == 0 or (0 <= extremes["min"] and extremes["max"] < num_codes)
        missing = lists.null_count or pc.min(pc.list_value_length(lists)).as_py() == 0
        return in_range and (optional or not missing)

    def fault(value: object) -> str | None:
        if value is None or value == []:
            return None if optional else repr(value)
        if not isinstance(value, list):
            return repr(value)
        wrong = (code for code in value if type(code) is not int or not 0 <= code < num_codes)  # True is an int too
        return next((f"{code!r} among them" for code in wrong), None)

    wanted = f"a list of whole numbers from 0 to {num_codes - 1}"
    _check_column(rows, column, name, optional, are_codes, fault, wanted)


def check_texts(rows: Dataset, column: str, name: str, optional: bool = False) -> None:
    """Check that every row of a column such as text or language is a string; it may be empty.

    Args:
        name: of the dataset, for the message.
        optional: the column may be absent, and a row null.
    Raises:
        InputError: no such column, or a row that is no string. The message names the dataset and the row.
    """

    def are_texts(values: pa.Array) -> bool:
        return _is_string(values.type) and (optional or values.null_count == 0)

    def fault(value: object) -> str | None:
        return None if isinstance(value, str) or (optional and value is None) else repr(value)

    _check_column(rows, column, name, optional, are_texts, fault, "text")


def check_keywords(rows: Dataset, column: str, name: str) -> None:
    """Check that every row of a column such as keywords is a list of strings, or empty, or null.

    Args:
        name: of the dataset, for the message. A dataset without the column passes.
    Raises:
        InputError: a row that is a string or another type. The message names the dataset and the row.
    """

    def are_keywords(lists: pa.Array) -> bool:
        return _is_list(lists.type) and _is_string(lists.type.value_type) and lists.flatten().null_count == 0

    def fault(value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, list):
            return repr(value)
        return next((f"{word!r} among them" for word in value if not isinstance(word, str)), None)

    _check_column(rows, column, name, True, are_keywords, fault, "a list of strings")


def _check_column(
    rows: Dataset,
    column: str,
    name: str,
    optional: bool,
    batch_passes: Callable[[pa.Array], bool],
    fault: Callable[[object], str | None],
    wanted: str,
) -> None:
    """Raises InputError at the first row that is not what is `wanted`.

    Args:
        batch_passes: whether all of a batch is as wanted; only one that does not pass is searched row by row.
        fault: what a row has instead of what is wanted; None if nothing is wrong.
    """
    if column not in rows.column_names:
        if optional:
            return
        raise InputError(f"{name}: no column {column!r} (got {', '.join(rows.column_names)}). Add it")
    start = 0
    rows = rows.select_columns([column])
    for table in rows.with_format("arrow").iter(10_000):
        if not batch_passes(table[column].combine_chunks()):
            for index, value in enumerate(rows[start : start + len(table)][column], start):
                got = fault(value)
                if got is not None:
                    raise InputError(
                        f"{name}, row {index}: {column} must be {wanted} (got {got:.60}). Correct the row, or drop it"
                    )
        start += len(table)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


# --- Sources of create_dataset.py -------------------------------------------------------------------------


@dataclass
class Source:
    """A dataset of recordings and their texts.

    Attributes:
        rows: their audio is a path, bytes, or {"path", "bytes"}.
        columns: "text", "audio" and the available ones of CARRIED_COLUMNS → name of the column in `rows`.
        folder: where relative audio paths start.
    """

    rows: Dataset
    columns: dict[str, str]
    folder: Path

    def fingerprint(self) -> str:
        """A hash of texts and audio paths; unlike datasets' fingerprint, it does not depend on the cache."""
        digest = hashlib.sha256()
        for name in (self.columns["text"], self.columns["audio"]):
            if _is_text(self.rows.features[name]):
                for batch in self.rows.select_columns([name]).iter(10_000):  # 50 times as fast as row by row
                    for value in batch[name]:
                        digest.update(json.dumps(value).encode())
        return f"{len(self.rows)} rows, sha256 {digest.hexdigest()}"


def open_source(
    name_or_path: str,
    split: str = "train",
    config: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
) -> Source:
    """A dataset of recordings, and which of its columns hold text and audio.

    Args:
        name_or_path, split, config: as for `load_any_dataset`.
        text_column, audio_column: None is the first available of TEXT_COLUMNS, AUDIO_COLUMNS.
    Raises:
        InputError: no such dataset, or it has no text or no audio.
    """
    rows = load_any_dataset(name_or_path, split, config)
    text = find_column(name_or_path, rows, text_column, TEXT_COLUMNS, "--text_column")
    audio = find_column(name_or_path, rows, audio_column, AUDIO_COLUMNS, "--audio_column")
    if not _is_text(rows.features[text]):
        raise InputError(
            f"{name_or_path}: column {text!r} is not text (got {rows.features[text]}). Choose another one with "
            "--text_column"
        )
    feature = rows.features[audio]
    if isinstance(feature, Audio):  # datasets 5 would decode with torchcodec, which is not required here
        rows = rows.cast_column(audio, Audio(decode=False))
    elif not (_is_text(feature) or feature == Value("binary") or isinstance(feature, dict)):
        raise InputError(
            f"{name_or_path}: column {audio!r} is not audio (got {feature}). Accepted: paths, the bytes of audio "
            "files, or datasets' Audio; choose another one with --audio_column"
        )
    columns = {"text": text, "audio": audio}
    for name, candidates in CARRIED_COLUMNS.items():
        available = [candidate for candidate in candidates if candidate in rows.features]
        if available:
            columns[name] = available[0]
    file = find_data_file(name_or_path, split) if Path(name_or_path).exists() else None
    folder = file.parent if file else Path(name_or_path)
    return Source(rows.select_columns(list(columns.values())), columns, folder)


def carried_value(source: Source, name: str, value: object) -> str | None:
    """A value of CARRIED_COLUMNS as text; of class labels the name, not the number."""
    if value is None:
        return None
    feature = source.rows.features[source.columns[name]]
    return feature.int2str(value) if isinstance(feature, ClassLabel) else str(value)


def path_and_bytes(audio: dict | str | bytes | None) -> tuple[str | None, bytes | None]:
    """The path and the content of an audio value, whichever it has."""
    if isinstance(audio, dict):
        return audio.get("path"), audio.get("bytes")
    if isinstance(audio, bytes):
        return None, audio
    return audio, None


def find_column(name: str, rows: Dataset, chosen: str | None, candidates: tuple[str, ...], flag: str) -> str:
    """The chosen column, or else the first available candidate.

    Raises:
        InputError: there is none; the message lists the columns, and the flag to choose with.
    """
    for column in [chosen] if chosen else candidates:
        if column in rows.column_names:
            return column
    wanted = repr(chosen) if chosen else " or ".join(candidates)
    has_codes = candidates is AUDIO_COLUMNS and "audio_codes" in rows.column_names
    hint = ". It has audio_codes: train.py takes it as it is" if has_codes else ""
    raise InputError(f"{name}: no column {wanted} (got {', '.join(rows.column_names)}). Choose one with {flag}{hint}")


def _is_text(feature) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _check_split(name: str, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise InputError(f"{name}: no split {split!r}. Available: {', '.join(dict.fromkeys(splits))}")


def _read_file(path: Path) -> Dataset:
    """The rows of a .json, .jsonl, .csv, .tsv or .parquet file."""
    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            # All strings: pandas' types would make the id 007 a 7 and the text "None" a missing value.
            # A .tsv, as Common Voice's, has no quoting: a quotation mark is part of the text.
            own = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
            with path.open(encoding="utf-8-sig") as file:
                if not own and "|" in file.readline():
                    raise InputError(
                        f"{path}: its columns are separated by |, as LJSpeech's. Save it with commas, and the header "
                        "file_name,text"
                    )
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", **own)
            if not own and len(table.columns) == 1 and ";" in table.columns[0]:
                raise InputError(f"{path}: its columns are separated by semicolons. Save it with commas")
            if not isinstance(table.index, pandas.RangeIndex):  # pandas takes surplus first fields for names of rows
                advice = "Take the surplus tabs out" if own else "Put texts that hold commas into quotation marks"
                raise InputError(f"{path}: rows have more fields than its header. {advice}")
            return Dataset.from_pandas(table, preserve_index=False)
        if path.suffix.lower() == ".parquet":
            return Dataset.from_parquet(str(path))
        if path.suffix.lower() == ".jsonl":
            return _read_json_lines(path)
        return Dataset.from_json(str(path))
    except StopIteration:  # datasets 5 on an empty .jsonl
        raise InputError(f"{path}: the file is empty. Use a file with at least one row") from None
    except InputError:
        raise
    except (DatasetsError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as {path.suffix}: {error.__cause__ or error}. Repair or export the file again"
        ) from error


def _read_json_lines(path: Path) -> Dataset:
    """The rows of a .jsonl file, whichever columns a row has.

    datasets takes the columns and types of the first 10 MB for those of all, and refuses a file that was joined from
    two kinds of rows.
    """
    try:
        return Dataset.from_json(str(path))
    except DatasetsError as error:
        try:
            with path.open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        except ValueError:  # datasets' error says as much
            raise error from None
        if not all(isinstance(row, dict) for row in rows):
            raise
        names = dict.fromkeys(name for row in rows for name in row)
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _load_saved(path: Path) -> Dataset:
    """The rows of a folder written by save_to_disk."""
    with library_errors_are_input(f"{path}: cannot be read as a saved dataset", DatasetsError, OSError, ValueError):
        return load_from_disk(str(path))


def _load_folder(path: Path, split: str) -> Dataset:
    """A folder in one of the hub's layouts, such as data/train-00000-of-00002.parquet."""
    metadata = [file for file in path.glob("**/metadata.*") if file.suffix in FILE_SUFFIXES]
    if metadata:  # an audiofolder, with a subfolder per split
        splits = ["train" if file.parent == path else file.parent.name for file in metadata]
        _check_split(str(path), split, sorted(splits))
    suffixes = {file.suffix.lower() for file in path.glob("**/*")}
    if suffixes & AUDIO_SUFFIXES and not suffixes & {*FILE_SUFFIXES, *SHARD_SUFFIXES}:  # datasets wants torchcodec
        raise InputError(
            f"{path}: a folder of audio without a metadata file. Name the file with the texts itself, or write a "
            "metadata.csv into the folder: the header file_name,text and a line for each clip"
        )
    try:
        return load_dataset(str(path), split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: the folder cannot be read as split {split!r}: {error.__cause__ or error}. {ACCEPTED}"
        ) from error


def _load_from_hub(name: str, split: str, config: str | None) -> Dataset:
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_a_path or Path(name).suffix.lower() in FILE_SUFFIXES:
        raise InputError(f"{name}: no such dataset: no such file or folder. {ACCEPTED}")
    if not is_offline_mode():
        try:
            HfApi().dataset_info(name, timeout=20)  # datasets itself retries for half a minute
        except Exception as error:  # httpx's or httpx2's errors, by the version: they have no closer common base
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(
                f"{name}: no such dataset: neither a local path nor available from the hub ({reason}). {ACCEPTED}"
            ) from error
    try:
        return load_dataset(name, config, split=split)
    except OSError as error:  # offline and not in the cache
        raise InputError(f"{name}: no such dataset: {error}. {ACCEPTED}") from error
    except (DatasetsError, RuntimeError, ValueError) as error:
        advice = ACCEPTED
        if isinstance(error.__cause__, ImportError):  # raw audio files: datasets asks for torchcodec
            advice = (
                f"Download its files with 'hf download {name} --repo-type dataset --local-dir FOLDER', then use the "
                "folder"
            )
        reason = error.__cause__ or error
        raise InputError(f"{name}: datasets cannot load split {split!r}: {reason}. {advice}") from error
