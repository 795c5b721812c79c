r"""Encode recordings and their texts as a dataset of speech codes, which train.py trains on.

    python create_dataset.py --dataset your_dataset_name_or_path --output_dir tokenized_dataset \
        --codec_id HKUSTAudio/xcodec2 --sampling_rate 16000

Writes the columns text, audio_codes (50 per second), duration_s, sampling_rate and, where the source has them,
speaker, language (or --language) and id. Clips that cannot be used are listed in skipped.jsonl, each with the reason.
An interrupted run resumes when it is started again with the same arguments. Exit code 2: the input was wrong; 130: it
was interrupted by Ctrl-C.

On several GPUs or nodes: one process for each, all with the same --output_dir, on a disk that all of them see, and
--num_shards N --shard_index 0 ... N-1; when all have ended, once more with --num_shards N --merge. The result is the
same as one process's.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.compute as pc
import torch
from huggingface_hub import HfApi
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from common.batches import batches_by_length
from common.cli import (
    HelpFormatter,
    InputError,
    add_device,
    bad_input_exits,
    check_at_least,
    check_writable,
    library_errors_are_input,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
    settings_of,
    write_whole,
)
from common.dataset_io import (
    AUDIO_COLUMNS,
    CARRIED_COLUMNS,
    TEXT_COLUMNS,
    Source,
    carried_value,
    open_source,
    path_and_bytes,
)
from speech.audio import SILENCE_DBFS, TooLongError, audio_failure, load_audio
from speech.codec import EncoderInputs, SpeechCodec, encoder_inputs
from speech.error_rate import language_code
from speech.policy import DEFAULT_CODEC
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE, tts_prompt

MAX_DURATION_S = 30.0  # Whisper's window; 1,500 of Llasa's 2,048 tokens, which leaves room for the text
MIN_DURATION_S = 0.3  # shorter clips are clicks, not words
PARTIAL = ".partial"  # in the output folder: run.json, and a file of records for each finished chunk
DISCARDED = ".discarded"  # what .partial is called while it is removed
MAX_WORKERS = 8  # by default: a clip of 10 s takes a core some 40 ms, 8 cores as long as a GPU takes (an estimate)
# Arguments that do not change the codes: a resumed run, or another shard, may have other values of them.
FREE_ARGUMENTS = (
    "output_dir", "format", "overwrite", "push_to_hub", "strict", "debug",
    "num_workers", "device", "shard_index", "merge",
)  # fmt: skip

logger = logging.getLogger("create_dataset")


# --- One clip ---------------------------------------------------------------------------------------------


def read_clip(source: Source, index: int, args: argparse.Namespace) -> tuple[dict, EncoderInputs | None]:
    """One row of the source.

    Returns:
        The record to write, and what the codec encodes. For a clip that cannot be used: its record in skipped.jsonl,
        and None.
    """
    values = source.rows[index]
    row = {name: values[column] for name, column in source.columns.items()}
    text = (row.pop("text") or "").strip()
    audio = row.pop("audio")
    carried = {name: carried_value(source, name, value) for name, value in row.items()}
    if args.language is not None:
        carried["language"] = carried.get("language") or args.language
    path, data = path_and_bytes(audio)

    def skipped(reason: str, detail: str) -> tuple[dict, None]:
        return {"row": index, "id": carried.get("id"), "path": path, "reason": reason, "detail": detail}, None

    if text:
        try:
            tts_prompt(text)
        except InputError as error:  # train.py would refuse the whole dataset
            return skipped("control_token", str(error))
    elif not args.keep_non_speech:
        return skipped("empty_text", "the text is empty. Noise or silence is kept with --keep_non_speech")
    if not (data or path):
        return skipped("unreadable", "neither a path nor bytes of audio")
    try:
        wav = load_audio(data or source.folder / path, args.max_duration_s)
    except TooLongError as error:
        return skipped("too_long", str(error))
    except (InputError, OSError) as error:
        return skipped("unreadable", str(error))
    duration_s = len(wav) / SAMPLE_RATE
    if duration_s < args.min_duration_s:
        return skipped("too_short", f"{duration_s:.2f} s is under --min_duration_s {args.min_duration_s:g}")
    if text and audio_failure(wav):
        return skipped(audio_failure(wav), f"no sound in it: RMS below {SILENCE_DBFS:g} dBFS")
    record = {"text": text, "audio_codes": [], "duration_s": round(duration_s, 4), "sampling_rate": SAMPLE_RATE}
    return record | carried, encoder_inputs(wav)


class Clips(Dataset):
    """The rows of a source, each as `read_clip` returns it: what worker processes do ahead of the codec."""

    def __init__(self, source: Source, args: argparse.Namespace):
        self.source, self.args = source, args

    def __len__(self) -> int:
        return len(self.source.rows)

    def __getitem__(self, index: int) -> tuple[dict, EncoderInputs | None]:
        return read_clip(self.source, index, self.args)


def read_ahead(source: Source, indices: Iterable[int], args: argparse.Namespace) -> Iterator[tuple]:
    """`read_clip` of the rows `indices`, in this order; --num_workers processes are at most a chunk ahead."""
    ahead = math.ceil(args.chunk_size / args.num_workers) if args.num_workers else None
    loader = DataLoader(
        Clips(source, args),
        sampler=indices,
        batch_size=None,  # clip by clip
        collate_fn=as_it_is,  # as arrays, through pipes: tensors take shared memory, of which containers have little
        num_workers=args.num_workers,
        prefetch_factor=ahead,
        worker_init_fn=leave_ctrl_c_to_the_main_process,
    )
    yield from loader


def as_it_is(clip: tuple) -> tuple:
    return clip


def leave_ctrl_c_to_the_main_process(worker: int) -> None:
    """The terminal sends it to all; libsndfile's callbacks into Python would print a traceback and go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- Chunks: what is held in memory and written at a time -------------------------------------------------


class Chunk(NamedTuple):
    """Rows that are encoded together, and the file of their records, one per line. A batch never spans two chunks, so
    neither an interruption nor shards change the batches.
    """

    rows: range
    file: Path


def all_chunks(n_rows: int, partial: Path, chunk_size: int) -> list[Chunk]:
    starts = range(0, n_rows, chunk_size)
    return [
        Chunk(range(start, min(start + chunk_size, n_rows)), partial / f"chunk-{number:06d}.jsonl")
        for number, start in enumerate(starts)
    ]


def is_written(chunk: Chunk) -> bool:
    """Whether there is a record of each row; a node that goes down may leave a file that has lost its end, or all."""
    if not chunk.file.is_file():
        return False
    with chunk.file.open("rb") as lines:
        return sum(line.endswith(b"\n") for line in lines) == len(chunk.rows)


def default_workers(device: str) -> int:
    """Of --num_workers: none beside a codec on a CPU, which takes all cores and several times as long as reading."""
    if torch.device(device).type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_WORKERS, cores)


def encode_all(source: Source, codec: SpeechCodec, chunks: list[Chunk], args: argparse.Namespace) -> None:
    """Encode the chunks that an interrupted run has not written."""
    todo = [chunk for chunk in chunks if not is_written(chunk)]
    total, left = (sum(len(chunk.rows) for chunk in some) for some in (chunks, todo))
    indices = chain.from_iterable(chunk.rows for chunk in todo)
    with (
        contextlib.closing(read_ahead(source, indices, args)) as clips,  # the workers end with it, after an error too
        tqdm(total=total, initial=total - left, unit="clip", desc="encoding", disable=None) as progress,
    ):
        for chunk in todo:
            write_lines(chunk.file, encode_chunk(codec, islice(clips, len(chunk.rows)), args, progress))


def encode_chunk(codec: SpeechCodec, clips: Iterable[tuple], args: argparse.Namespace, progress: tqdm) -> list[dict]:
    """The records of the clips, in this order.

    Raises:
        InputError: with --strict, at the first clip that would be skipped.
    """
    records: list[dict] = []
    inputs: dict[int, EncoderInputs] = {}
    for record, clip in clips:
        if clip is not None:
            inputs[len(records)] = clip
        elif args.strict:
            raise InputError(
                f"--strict: a clip cannot be used (got {json.dumps(record, ensure_ascii=False)}). Repair it, or leave "
                "--strict out to skip it"
            )
        records.append(record)
    progress.update(len(records) - len(inputs))
    # Clips of equal length share a forward pass
    for batch in batches_by_length({i: len(clip.wav) for i, clip in inputs.items()}, args.batch_size):
        for i, codes in zip(batch, codec.encode_inputs([inputs.pop(i) for i in batch]), strict=True):
            records[i]["audio_codes"] = codes
        progress.update(len(batch))
    return records


def read_lines(files: list[Path], skipped: bool) -> Iterator[dict]:
    """The records of the skipped clips, or of the other ones."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                if ("reason" in record) == skipped:
                    yield record


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write a .jsonl file atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    write_whole(path, write)


# --- The dataset ------------------------------------------------------------------------------------------


def assemble(chunks: list[Chunk], columns: dict[str, str], partial: Path, args: argparse.Namespace) -> datasets.Dataset:
    """Write skipped.jsonl and the dataset, in the order of the source, and log a summary. Memory does not grow with it.

    Raises:
        InputError: every clip was skipped.
    """
    output_dir = Path(args.output_dir)
    split = re.split(r"[\[+]", args.split)[0]  # 'train' of 'train[:100]'
    for pattern in ("data-*.arrow", "state.json", "dataset_info.json", f"{split}.jsonl", f"{split}.parquet"):
        for stale in output_dir.glob(pattern):  # of the dataset that --overwrite replaces
            stale.unlink()
    files = [chunk.file for chunk in chunks]
    write_lines(output_dir / "skipped.jsonl", read_lines(files, skipped=True))
    reasons = Counter(record["reason"] for record in read_lines([output_dir / "skipped.jsonl"], skipped=True))
    summary = f"skipped {reasons.total()}" + "".join(f", {reason} {n}" for reason, n in sorted(reasons.items()))
    if next(read_lines(files, skipped=False), None) is None:
        discard(partial)
        raise InputError(
            f"{args.dataset}: no clip can be used ({summary}). {output_dir / 'skipped.jsonl'} has the reason of each"
        )
    features = {
        "text": datasets.Value("string"),
        "audio_codes": datasets.List(datasets.Value("int32")),
        "duration_s": datasets.Value("float64"),
        "sampling_rate": datasets.Value("int32"),
    } | {name: datasets.Value("string") for name in CARRIED_COLUMNS if name in columns}
    if args.language is not None:
        features["language"] = datasets.Value("string")
    shutil.rmtree(partial / "cache", ignore_errors=True)
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_generator(  # via the disk: the codes of a large corpus do not fit into memory
        read_lines,
        gen_kwargs={"files": files, "skipped": False},
        features=datasets.Features(features),
        cache_dir=str(partial / "cache"),
        split=datasets.NamedSplit(split),
    )
    if args.format == "arrow":
        dataset.save_to_disk(output_dir)
    elif args.format == "json":
        dataset.to_json(output_dir / f"{split}.jsonl", force_ascii=False)
    else:
        dataset.to_parquet(output_dir / f"{split}.parquet")
    hours = pc.sum(dataset.data["duration_s"]).as_py() / 3600
    without_speech = pc.sum(pc.equal(dataset.data["text"], "")).as_py()
    kept = f"{len(dataset)} ({without_speech} without speech)" if without_speech else len(dataset)
    logger.info("kept %s, %.2f hours; %s", kept, hours, summary)
    warn_of_languages(dataset)
    return dataset


def warn_of_languages(dataset: datasets.Dataset) -> None:
    """Supervised training takes any language; rewards and evaluation need one that Whisper knows."""
    for language in dataset.unique("language") if "language" in dataset.column_names else []:
        try:
            language_code(language or "en")
        except InputError as error:
            logger.warning("GRPO and evaluation.py will refuse such rows: %s", error)


# --- The run ----------------------------------------------------------------------------------------------


def open_output(args: argparse.Namespace) -> Path:
    """Create output_dir/.partial.

    Raises:
        InputError: output_dir cannot be written to, or has files that would be lost.
    """
    output_dir = Path(args.output_dir)
    partial = output_dir / PARTIAL
    names = {file.name for file in output_dir.iterdir()} - {PARTIAL, DISCARDED} if output_dir.is_dir() else set()
    if names and not any(partial.glob("chunk-*.jsonl")):
        if "skipped.jsonl" not in names:
            raise InputError(f"--output_dir: {output_dir} holds other files. Use a new or an empty folder")
        if not args.overwrite:
            raise InputError(f"--output_dir: {output_dir} holds a finished dataset. --overwrite replaces it")
    check_writable(partial)
    return partial


def open_run(source: Source, device: str | None, partial: Path, args: argparse.Namespace) -> None:
    """Start a run in .partial, or resume the one there if its arguments and rows are the same.

    Args:
        device: where the codec runs; None to merge, which may be done on a machine without a GPU.
    Raises:
        InputError: the run there has other arguments or rows, whose codes must not be mixed with these; or it has
            skipped clips and this one is --strict; or there is none to merge.
    """
    run = settings_of(args, FREE_ARGUMENTS)
    run["rows"] = source.fingerprint()
    if device is not None:
        run["device"] = torch.device(device).type
    file, chunks = partial / "run.json", sorted(partial.glob("chunk-*.jsonl"))
    if args.merge and not file.is_file():
        raise InputError(f"--merge: {args.output_dir} holds no shards. Run all --shard_index first")
    if not is_sharded(args) and not chunks:
        file.unlink(missing_ok=True)  # nothing was encoded, so this may be another run
    write_first(file, run)
    earlier = json.loads(file.read_text(encoding="utf-8"))
    changed = [f"{name} {earlier.get(name)!r} (now {run[name]!r})" for name in run if run[name] != earlier.get(name)]
    if changed and not args.overwrite:
        way_out = f"remove {partial}" if is_sharded(args) else "discard that run with --overwrite"
        raise InputError(
            f"--output_dir: {args.output_dir} holds an unfinished run with other {', '.join(changed)}. Resume it with "
            f"those, use another folder, or {way_out}"
        )
    if changed:
        for chunk in chunks:
            chunk.unlink()
        write_lines(file, [run])
    elif args.strict:
        whole = [chunk for chunk in chunks if chunk.read_bytes().endswith(b"\n")]  # the others are encoded again
        skipped = next(read_lines(whole, skipped=True), None)
        if skipped:
            raise InputError(
                f"--strict: the interrupted run has skipped a clip (got {json.dumps(skipped)}). Use another "
                "--output_dir"
            )


def is_sharded(args: argparse.Namespace) -> bool:
    """Whether other processes write into .partial too, now or before."""
    return args.merge or args.shard_index is not None


def write_first(path: Path, record: dict) -> None:
    """Write a file of one record unless it exists: of several processes, on several nodes, the first one wins."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.json")
    write_lines(temporary, [record])
    try:
        os.link(temporary, path)  # atomic, on NFS too
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def check_complete(chunks: list[Chunk], args: argparse.Namespace) -> None:
    """Raises InputError that names the shards which are not finished."""
    missing = [number for number, chunk in enumerate(chunks) if not is_written(chunk)]
    if missing:
        shards = sorted({number % args.num_shards for number in missing})
        raise InputError(
            f"--merge: unfinished shards (got {len(chunks) - len(missing)} of {len(chunks)} chunks). Run --shard_index "
            f"{', '.join(map(str, shards))} again, which resumes"
        )


def discard(partial: Path) -> None:
    """Remove .partial. Renamed first, at once: without it the dataset counts as finished."""
    discarded = partial.with_name(DISCARDED)
    shutil.rmtree(discarded, ignore_errors=True)  # of a run that was killed here
    partial.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def check_args(args: argparse.Namespace) -> None:
    if args.sampling_rate != SAMPLE_RATE:
        raise InputError(
            f"--sampling_rate: XCodec2 works at {SAMPLE_RATE} Hz only, with {CODES_PER_SECOND} codes per second (got "
            f"{args.sampling_rate}). Leave it out: audio of any rate is resampled"
        )
    if args.language is not None:
        try:
            language_code(args.language)
        except InputError as error:
            raise InputError(f"--language: {error}") from error
    check_at_least(args, batch_size=1, chunk_size=1, num_shards=1, num_workers=0)
    if not 0 <= args.min_duration_s < args.max_duration_s:
        raise InputError(
            f"--min_duration_s, --max_duration_s: must have 0 <= min < max (got {args.min_duration_s} and "
            f"{args.max_duration_s})"
        )
    if args.merge and args.shard_index is not None:
        raise InputError("--merge: has no --shard_index, it joins all shards. Leave one of them out")
    if args.num_shards > 1 and not is_sharded(args):
        raise InputError(
            f"--num_shards {args.num_shards}: must come with --shard_index 0 to {args.num_shards - 1}, the part that "
            "this process encodes, or with --merge when all are done"
        )
    if args.shard_index is not None and not 0 <= args.shard_index < args.num_shards:
        raise InputError(f"--shard_index: must be in 0 to {args.num_shards - 1} (got {args.shard_index})")
    if args.overwrite and is_sharded(args):
        raise InputError("--overwrite: one shard must not discard what the others write. Remove the folder instead")


def claim_hub_repo(name: str) -> None:
    """Create the private dataset repository, so that a missing login shows before hours of encoding."""
    try:
        HfApi().create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    except Exception as error:  # as in dataset_io: httpx's or httpx2's errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"--push_to_hub: {name}: {reason}. Log in with 'hf auth login', or leave it out") from error


def create(args: argparse.Namespace) -> None:
    check_args(args)
    device = None if args.merge else pick_device(args.device)
    if args.num_workers is None and device is not None:
        args.num_workers = default_workers(device)
    partial = open_output(args)
    source = open_source(args.dataset, args.split, args.dataset_config, args.text_column, args.audio_column)
    open_run(source, device, partial, args)
    chunks = all_chunks(len(source.rows), partial, args.chunk_size)
    if args.push_to_hub:
        claim_hub_repo(args.push_to_hub)
    if args.merge:
        check_complete(chunks, args)
    else:
        codec = SpeechCodec.from_pretrained(args.codec_id, device=device, dtype=getattr(torch, args.dtype))
        encode_all(source, codec, chunks[args.shard_index or 0 :: args.num_shards], args)
    if args.shard_index is not None:
        logger.info("shard %d of %d is encoded; when all are, run --merge", args.shard_index, args.num_shards)
        return
    dataset = assemble(chunks, source.columns, partial, args)
    if args.push_to_hub:
        with library_errors_are_input(f"--push_to_hub: {args.push_to_hub}", OSError):
            dataset.push_to_hub(args.push_to_hub, private=True)
    discard(partial)


def main(args: argparse.Namespace) -> None:
    set_up_logging("create_dataset")
    with bad_input_exits():
        create(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, help="hub id, saved folder, audiofolder, or .json/.jsonl/.csv/.tsv/.parquet file")
    add("--dataset_config", help="configuration of a hub dataset that has several, e.g. a language")
    add("--split", default="train", help="split to encode; for a hub dataset also train[:100]")
    add("--text_column", help=f"column of the text; default: the first available of {', '.join(TEXT_COLUMNS)}")
    add("--audio_column", help=f"column of the audio; default: the first available of {', '.join(AUDIO_COLUMNS)}")
    add("--language", help="language of the rows that state none: Whisper's code or name, such as de or German")
    add("--output_dir", required=True, help="folder of the new dataset: new, empty, or of an interrupted run")
    add("--format", choices=("arrow", "json", "parquet"), default="arrow", help="arrow is datasets' save_to_disk")
    add("--overwrite", action="store_true", help="replace a finished dataset, or discard another unfinished run")
    add("--push_to_hub", metavar="REPO", help="also push the dataset to this hub repository, private if it is new")
    add("--codec_id", default=DEFAULT_CODEC, help="hub id or folder of the XCodec2 codec")
    add("--sampling_rate", type=int, default=SAMPLE_RATE, help="sampling rate of the codec in Hz; no other is accepted")
    add_device(parser, "where the codec runs")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the codec; the half precisions change some codes",
    )
    add("--batch_size", type=int, default=16, help="number of clips that the codec encodes at a time")
    add("--chunk_size", type=int, default=128, help="number of rows held in memory, and lost at most when killed")
    workers_help = (
        "number of processes that read clips ahead of the codec; default: one per core, at most 8; on a CPU 0"
    )
    add("--num_workers", type=int, help=workers_help)
    add("--num_shards", type=int, default=1, help="number of processes that share the rows; see above")
    add("--shard_index", type=int, help="encode only this one of --num_shards parts, from 0 on")
    add("--merge", action="store_true", help="encode nothing, join the finished shards")
    add("--max_duration_s", type=float, default=MAX_DURATION_S, help="skip longer clips; Whisper's window is 30 s")
    add("--min_duration_s", type=float, default=MIN_DURATION_S, help="skip shorter clips, which are clicks, not words")
    help = "keep rows without text: noise or silence, on which --task asr is to say nothing (docs/asr.md)"
    add("--keep_non_speech", action="store_true", help=help)
    add("--strict", action="store_true", help="stop with an error at the first clip that would be skipped")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
