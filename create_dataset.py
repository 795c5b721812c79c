"""Turn recordings and their texts into a data set of speech codes, which train.py learns from.

    python create_dataset.py --dataset your_dataset_name_or_path --output_dir tokenized_dataset \
        --codec_id HKUSTAudio/xcodec2 --sampling_rate 16000

Writes the columns text, audio_codes (50 a second), duration_s, sampling_rate and, where the source
has them, speaker, language and id. What cannot be used is listed beside them in skipped.jsonl.
Killed and started again with the same arguments, it goes on where it was.
"""

import argparse
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from common.cli import InputError, bad_input_exits, parse_strictly, pick_device
from common.dataset_io import AUDIO_COLUMNS, CARRIED_COLUMNS, TEXT_COLUMNS, Source, open_source
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE

MAX_DURATION_S = 30.0  # what Whisper hears; and 1,500 codes leave Llasa's 2,048 tokens room for the text
MIN_DURATION_S = 0.3  # below it a click, not a word
# Of the arguments, those on which no clip's codes depend: a run may go on with others.
FREE_ARGUMENTS = ("output_dir", "format", "overwrite", "push_to_hub", "strict")

logger = logging.getLogger("create_dataset.py")


class Unusable(ValueError):
    """A clip that cannot be used, or a data set without any that can."""


def read_clip(source: Source, index: int, args: argparse.Namespace) -> tuple[dict, np.ndarray | None]:
    """One row of the source.

    Returns:
        The record to write, and the sound: float32 mono at 16 kHz, shape (n_samples,). For a clip
        that cannot be used: what skipped.jsonl says of it, and None.
    """
    values = source.rows[index]
    row = {name: values[column] for name, column in source.columns.items()}
    text, audio = (row.pop("text") or "").strip(), row.pop("audio")
    for name, value in row.items():
        feature = source.rows.features[source.columns[name]]
        value = feature.int2str(value) if isinstance(feature, datasets.ClassLabel) and value is not None else value
        row[name] = None if value is None else str(value)
    path, data = (audio.get("path"), audio.get("bytes")) if isinstance(audio, dict) else (audio, None)
    if isinstance(path, bytes):
        path, data = None, path

    def skipped(reason: str, detail: str) -> tuple[dict, None]:
        return {"row": index, "id": row.get("id"), "path": path, "reason": reason, "detail": detail}, None

    if not text:
        return skipped("empty_text", "the text is empty")
    if not (data or path):
        return skipped("unreadable", "neither a path nor bytes of audio")
    try:
        wav = load_audio(data or source.folder / path)
    except (ValueError, OSError) as error:
        return skipped("unreadable", str(error))
    duration_s = len(wav) / SAMPLE_RATE
    if duration_s > args.max_duration_s:
        return skipped("too_long", f"{duration_s:.2f} s is over --max_duration_s {args.max_duration_s:g}")
    if duration_s < args.min_duration_s:
        return skipped("too_short", f"{duration_s:.2f} s is under --min_duration_s {args.min_duration_s:g}")
    record = {"text": text, "audio_codes": [], "duration_s": round(duration_s, 4), "sampling_rate": SAMPLE_RATE}
    return record | row, wav


def encode_rows(source: Source, codec: SpeechCodec, indices: range, args: argparse.Namespace, progress) -> list[dict]:
    """The records of some rows, in their order.

    Raises:
        Unusable: with --strict, at the first clip that would be skipped.
    """
    records, wavs = {}, {}
    for index in indices:
        records[index], wav = read_clip(source, index, args)
        if wav is not None:
            wavs[index] = wav
            continue
        if args.strict:
            raise Unusable(f"--strict: {json.dumps(records[index], ensure_ascii=False)}")
        progress.update()
    by_length = sorted(wavs, key=lambda index: len(wavs[index]))  # those of equal length share a forward pass
    for start in range(0, len(by_length), args.batch_size):
        batch = by_length[start : start + args.batch_size]
        for index, codes in zip(batch, codec.encode([wavs[index] for index in batch]), strict=True):
            records[index]["audio_codes"] = codes
        progress.update(len(batch))
    return list(records.values())


def encode_all(source: Source, codec: SpeechCodec, partial: Path, args: argparse.Namespace) -> list[Path]:
    """Encode what an earlier run has not; returns the shards, files with a record a line."""
    n_rows, shards = len(source.rows), []
    with tqdm(total=n_rows, unit="clip", desc="encoding") as progress:
        for start in range(0, n_rows, args.shard_size):
            indices = range(start, min(start + args.shard_size, n_rows))
            shard = partial / f"shard-{start // args.shard_size:05d}.jsonl"
            if shard.is_file():
                progress.update(len(indices))
            else:  # a batch never spans two shards, so an interruption changes no batch
                write_lines(shard, encode_rows(source, codec, indices, args, progress))
            shards.append(shard)
    return shards


def read_lines(shards: list[Path], skipped: bool) -> Iterator[dict]:
    """The records of the clips that were skipped, or of the others."""
    for shard in shards:
        for line in shard.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if ("reason" in record) == skipped:
                yield record


def write_lines(path: Path, records: list[dict]) -> None:
    """Write a .jsonl that is there whole or not at all, whenever the process is killed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)


def assemble(shards: list[Path], columns: dict[str, str], partial: Path, args: argparse.Namespace) -> datasets.Dataset:
    """Write skipped.jsonl and the data set, and say what is in them.

    Raises:
        Unusable: nothing is left.
    """
    output_dir, split = Path(args.output_dir), re.split(r"[\[+]", args.split)[0]  # 'train' of 'train[:100]'
    for pattern in ("data-*.arrow", "state.json", "dataset_info.json", f"{split}.jsonl", f"{split}.parquet"):
        for stale in output_dir.glob(pattern):  # of the data set that --overwrite replaces
            stale.unlink()
    skipped = list(read_lines(shards, skipped=True))
    write_lines(output_dir / "skipped.jsonl", skipped)
    reasons = Counter(record["reason"] for record in skipped)
    summary = f"skipped {len(skipped)}" + "".join(f", {reason} {n}" for reason, n in sorted(reasons.items()))
    if next(read_lines(shards, skipped=False), None) is None:
        discard(partial)
        raise Unusable(f"nothing is left of {args.dataset}: {summary}; see {output_dir / 'skipped.jsonl'}")
    features = {
        "text": datasets.Value("string"),
        "audio_codes": datasets.List(datasets.Value("int32")),
        "duration_s": datasets.Value("float64"),
        "sampling_rate": datasets.Value("int32"),
    } | {name: datasets.Value("string") for name in CARRIED_COLUMNS if name in columns}
    shutil.rmtree(partial / "cache", ignore_errors=True)
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_generator(  # by way of the disk: a corpus of codes outgrows the memory
        read_lines,
        gen_kwargs={"shards": shards, "skipped": False},
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
    logger.info("kept %d, %.2f hours; %s", len(dataset), sum(dataset["duration_s"]) / 3600, summary)
    return dataset


def open_output(args: argparse.Namespace) -> Path:
    """Make output_dir/.partial; refuse a folder that cannot be written or holds something to lose."""
    output_dir = Path(args.output_dir)
    partial = output_dir / ".partial"
    if partial.is_dir() and not (partial / "run.json").is_file():
        shutil.rmtree(partial)  # of a finished run, killed in `discard`
    names = {file.name for file in output_dir.iterdir()} - {".partial"} if output_dir.is_dir() else set()
    if names and not any(partial.glob("shard-*.jsonl")):
        if "skipped.jsonl" not in names:
            raise InputError(f"--output_dir {output_dir} holds other files; give a new or an empty folder")
        if not args.overwrite:
            raise InputError(f"--output_dir {output_dir} holds a finished data set; --overwrite replaces it")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=partial).close()
    except OSError as error:
        raise InputError(f"--output_dir {output_dir} cannot be written: {error.strerror}; give another") from error
    return partial


def open_run(source: Source, partial: Path, args: argparse.Namespace) -> None:
    """Claim .partial, or find in it an interrupted run of the same arguments and rows.

    Raises:
        ValueError: it is another run's, whose codes would get among ours; or it has skipped clips
            and this one is --strict.
    """
    run = {name: value for name, value in vars(args).items() if name not in FREE_ARGUMENTS}
    run["rows"] = source.fingerprint()
    file, shards = partial / "run.json", sorted(partial.glob("shard-*.jsonl"))
    earlier = json.loads(file.read_text()) if shards else run
    changed = [f"{name} {earlier.get(name)!r} (now {run[name]!r})" for name in run if run[name] != earlier.get(name)]
    if changed and not args.overwrite:
        raise InputError(
            f"--output_dir {args.output_dir} holds an unfinished run with other {', '.join(changed)}. Go on with "
            "those, give another folder, or discard that run with --overwrite"
        )
    if changed:
        for shard in shards:
            shard.unlink()
    elif args.strict and (skipped := next(read_lines(shards, skipped=True), None)):
        raise InputError(f"--strict, but the run to go on with has skipped {json.dumps(skipped)}; give another folder")
    write_lines(file, [run])


def discard(partial: Path) -> None:
    """Remove .partial; run.json first, because without it shards are nobody's."""
    (partial / "run.json").unlink()
    shutil.rmtree(partial)


def check_arguments(args: argparse.Namespace) -> None:
    if args.sampling_rate != SAMPLE_RATE:
        raise InputError(
            f"--sampling_rate {args.sampling_rate}: XCodec2 works at {SAMPLE_RATE} Hz only, with "
            f"{CODES_PER_SECOND} codes a second; audio of other rates is resampled to that"
        )
    if min(args.batch_size, args.shard_size) < 1:
        raise InputError(f"--batch_size {args.batch_size}, --shard_size {args.shard_size}: both at least 1")
    if not 0 <= args.min_duration_s < args.max_duration_s:
        raise InputError(
            f"--min_duration_s {args.min_duration_s}, --max_duration_s {args.max_duration_s}: 0 <= min < max"
        )


def claim_hub_repo(name: str) -> None:
    """Make the (private) data set repository, so that a missing login shows now and not in hours."""
    try:
        HfApi().create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    except Exception as error:  # as in dataset_io: httpx's errors or httpx2's
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"--push_to_hub {name}: {reason}. Log in with 'hf auth login', or leave it out") from error


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    with bad_input_exits(ValueError, OSError):
        check_arguments(args)
        device = pick_device(args.device)
        partial = open_output(args)
        source = open_source(args.dataset, args.split, args.dataset_config, args.text_column, args.audio_column)
        open_run(source, partial, args)
        if args.push_to_hub:
            claim_hub_repo(args.push_to_hub)
        codec = SpeechCodec.from_pretrained(args.codec_id, device=device, dtype=getattr(torch, args.dtype))
    with bad_input_exits(Unusable, OSError):
        shards = encode_all(source, codec, partial, args)
        dataset = assemble(shards, source.columns, partial, args)
        if args.push_to_hub:
            dataset.push_to_hub(args.push_to_hub, private=True)
    discard(partial)  # last: without it the data set counts as finished


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset", required=True, help="hub id, saved folder, audiofolder, or .json/.jsonl/.csv/.parquet file")
    add("--dataset_config", help="configuration of a hub set that has several, e.g. a language")
    add("--split", default="train", help="split to encode; of a hub set also train[:100]")
    add("--text_column", help=f"None: the first there of {', '.join(TEXT_COLUMNS)}")
    add("--audio_column", help=f"None: the first there of {', '.join(AUDIO_COLUMNS)}")
    add("--output_dir", required=True, help="folder to write; new, empty, or of an interrupted run")
    add("--format", choices=("arrow", "json", "parquet"), default="arrow", help="arrow is datasets' save_to_disk")
    add("--overwrite", action="store_true", help="replace a finished data set, discard another unfinished run")
    add("--push_to_hub", metavar="REPO", help="also push it to this hub repository, made private if new")
    add("--codec_id", default="HKUSTAudio/xcodec2", help="XCodec2: hub id or folder")
    add("--sampling_rate", type=int, default=SAMPLE_RATE, help="Hz; the codec's, no other")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="half moves some codes")
    add("--batch_size", type=int, default=16, help="clips given to the codec at a time")
    add("--shard_size", type=int, default=128, help="rows held in memory, and at most lost when killed")
    add("--max_duration_s", type=float, default=MAX_DURATION_S, help="skip longer clips: Whisper hears 30 s")
    add("--min_duration_s", type=float, default=MIN_DURATION_S, help="skip shorter clips: clicks, not words")
    add("--strict", action="store_true", help="an error at the first clip that would be skipped")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
