"""Open a data set by name: what `--dataset` means in create_dataset.py and train.py."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pandas
from datasets import Audio, Dataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, is_offline_mode

from common.cli import InputError

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ACCEPTED = (
    "Accepted: a hub id such as 'owner/name', a folder saved by datasets' save_to_disk, a folder of "
    "audio with a metadata.csv or .jsonl, or a .json, .jsonl, .csv or .parquet file"
)
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription", "text_normalized", "normalized_text")
AUDIO_COLUMNS = ("audio", "file_name", "audio_path", "audio_filepath", "path", "file", "wav")
CARRIED_COLUMNS = {  # name in the result → names it may have in the source
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
    "id": ("id", "utterance_id", "segment_id"),
}


def load_any_dataset(name_or_path: str, split: str = "train", config: str | None = None) -> Dataset:
    """One split of a data set, from wherever it is.

    Args:
        name_or_path: hub id, saved folder, audiofolder, or metadata file; what exists on the disk
            goes before the hub.
        split: of a hub set also 'train[:100]'. A single file is one split: 'train', or its name
            without the suffix.
        config: of a hub set that has several, e.g. a language.
    Returns:
        The rows. An audiofolder comes as its metadata, `file_name` included (datasets would need
        torchcodec to list the files). CSV has no types: all its columns are strings.
    Raises:
        OSError: no such data set, or the hub cannot be reached.
        ValueError: no such split, unreadable, or empty; the message says what is accepted.
    """
    path = Path(name_or_path)
    if not path.exists():
        return _load_from_hub(name_or_path, split, config)
    if config is not None:
        raise InputError(f"config {config!r}: {name_or_path} is not on the hub, only hub sets have one")
    file = find_data_file(name_or_path, split)
    if file is not None:
        rows = _read_file(file)
    elif (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        _check_split(name_or_path, split, splits)
        rows = load_from_disk(str(path / split))
    elif (path / "state.json").is_file():
        rows = load_from_disk(str(path))
        _check_split(name_or_path, split, ["train"] if rows.split is None else [str(rows.split), "train"])
    else:
        rows = _load_folder(path, split)
    if len(rows) == 0:
        raise InputError(f"{name_or_path}: split {split!r} holds no rows")
    return rows


def find_data_file(name_or_path: str, split: str) -> Path | None:
    """The file which holds a split's rows, if there is one; relative audio paths start beside it.

    Raises:
        ValueError: a file, but of an unknown kind or not of this split.
    """
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix.lower() not in FILE_SUFFIXES:
            raise InputError(f"{path}: a {path.suffix or 'nameless'} file is no data set. {ACCEPTED}")
        _check_split(name_or_path, split, ["train", path.stem])
        return path
    stems = [split, f"{split}/metadata"] + (["metadata"] if split == "train" else [])
    files = [path / (stem + suffix) for stem in stems for suffix in FILE_SUFFIXES]
    return next((file for file in files if file.is_file()), None)


@dataclass
class Source:
    """Recordings and their texts.

    Attributes:
        rows: audio is a path, bytes, or {"path", "bytes"}.
        columns: "text", "audio" and those of CARRIED_COLUMNS that are there → name in the rows.
        folder: where relative audio paths start.
    """

    rows: Dataset
    columns: dict[str, str]
    folder: Path

    def fingerprint(self) -> str:
        """A hash of texts and audio paths; unlike datasets' own, the same when the cache is made anew."""
        digest = hashlib.sha256()
        for name in (self.columns["text"], self.columns["audio"]):
            for value in self.rows[name] if _is_text(self.rows.features[name]) else []:
                digest.update(json.dumps(value).encode())
        return f"{len(self.rows)} rows, sha256 {digest.hexdigest()}"


def open_source(
    name_or_path: str,
    split: str = "train",
    config: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
) -> Source:
    """A data set of recordings, and which of its columns hold text and audio.

    Args:
        name_or_path, split, config: as for `load_any_dataset`.
        text_column, audio_column: None: the first of TEXT_COLUMNS, AUDIO_COLUMNS that is there.
    Raises:
        OSError, ValueError: no such set, or it has no text or no audio.
    """
    rows = load_any_dataset(name_or_path, split, config)
    text = find_column(name_or_path, rows, text_column, TEXT_COLUMNS, "--text_column")
    audio = find_column(name_or_path, rows, audio_column, AUDIO_COLUMNS, "--audio_column")
    if not _is_text(rows.features[text]):
        raise InputError(f"{name_or_path}: --text_column {text!r} holds {rows.features[text]}, not text")
    feature = rows.features[audio]
    if isinstance(feature, Audio):  # datasets 5 decodes with torchcodec, we do without
        rows = rows.cast_column(audio, Audio(decode=False))
    elif not (_is_text(feature) or feature == Value("binary") or isinstance(feature, dict)):
        raise InputError(
            f"{name_or_path}: --audio_column {audio!r} holds {feature}; accepted: paths, the bytes of audio "
            "files, or datasets' Audio"
        )
    columns = {"text": text, "audio": audio}
    for name, candidates in CARRIED_COLUMNS.items():
        found = [candidate for candidate in candidates if candidate in rows.features]
        columns |= {name: found[0]} if found else {}
    file = find_data_file(name_or_path, split) if Path(name_or_path).exists() else None
    folder = file.parent if file else Path(name_or_path)
    return Source(rows.select_columns(list(columns.values())), columns, folder)


def find_column(name: str, rows: Dataset, chosen: str | None, candidates: tuple[str, ...], flag: str) -> str:
    """The chosen column, or else the first candidate which is there.

    Raises:
        ValueError: there is none; the message names those there, and the flag to choose with.
    """
    for column in [chosen] if chosen else candidates:
        if column in rows.column_names:
            return column
    wanted = repr(chosen) if chosen else " or ".join(candidates)
    there = ", ".join(rows.column_names)
    has_codes = candidates is AUDIO_COLUMNS and "audio_codes" in rows.column_names
    hint = ". It has audio_codes: train.py takes it as it is" if has_codes else ""
    raise InputError(f"{name}: no column {wanted}; there: {there}; choose one with {flag}{hint}")


def _is_text(feature) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _check_split(name: str, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise InputError(f"{name}: no split {split!r}; there: {', '.join(dict.fromkeys(splits))}")


def _read_file(path: Path) -> Dataset:
    """All rows of one .json, .jsonl, .csv or .parquet file."""
    try:
        if path.suffix.lower() == ".csv":
            # Typed by pandas, the id 007 becomes 7 and the text "None" a missing value.
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            return Dataset.from_pandas(table, preserve_index=False)
        if path.suffix.lower() == ".parquet":
            return Dataset.from_parquet(str(path))
        return Dataset.from_json(str(path))
    except StopIteration:  # what datasets 5 makes of an empty .jsonl
        raise InputError(f"{path}: the file is empty") from None
    except (DatasetsError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix}: {error.__cause__ or error}") from error


def _load_folder(path: Path, split: str) -> Dataset:
    """A folder in one of the hub's layouts, such as data/train-00000-of-00002.parquet."""
    metadata = [file for file in path.glob("**/metadata.*") if file.suffix in FILE_SUFFIXES]
    if metadata:  # an audiofolder, which has other splits
        splits = ["train" if file.parent == path else file.parent.name for file in metadata]
        _check_split(str(path), split, sorted(splits))
    try:
        return load_dataset(str(path), split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: the folder cannot be read as split {split!r}: {error.__cause__ or error}. {ACCEPTED}"
        ) from error


def _load_from_hub(name: str, split: str, config: str | None) -> Dataset:
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_a_path or Path(name).suffix.lower() in FILE_SUFFIXES:
        raise InputError(f"{name}: no such data set: no such file or folder. {ACCEPTED}")
    if not is_offline_mode():
        try:
            HfApi().dataset_info(name, timeout=20)  # datasets itself retries for half a minute
        except Exception as error:  # httpx's errors or httpx2's, by the version: no nearer common base
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(
                f"{name}: no such data set: neither on the disk nor to be had from the hub ({reason}). {ACCEPTED}"
            ) from error
    try:
        return load_dataset(name, config, split=split)
    except OSError as error:  # offline and not in the cache
        raise InputError(f"{name}: no such data set: {error}. {ACCEPTED}") from error
    except (DatasetsError, RuntimeError, ValueError) as error:
        advice = ACCEPTED
        if isinstance(error.__cause__, ImportError):  # raw audio files: datasets asks for torchcodec
            advice = (
                f"Get its files with 'hf download {name} --repo-type dataset --local-dir FOLDER', then pass the folder"
            )
        reason = error.__cause__ or error
        raise InputError(f"{name}: datasets cannot load split {split!r}: {reason}. {advice}") from error
