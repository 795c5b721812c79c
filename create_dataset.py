r"""Encode recordings and their texts as a dataset of speech codes, which train.py trains on.

    python create_dataset.py --dataset your_dataset_name_or_path --output_dir tokenized_dataset \
        --codec_id HKUSTAudio/xcodec2 --sampling_rate 16000

Writes the columns text, audio_codes (50 per second), duration_s, sampling_rate and, where the source has them,
speaker, language and id. Clips that cannot be used are listed in skipped.jsonl, each with the reason.
An interrupted run resumes when it is started again with the same arguments. Exit code 2: the input was wrong.
"""

import argparse
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_writable,
    library_errors_are_input,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
    write_whole,
)
from common.dataset_io import AUDIO_COLUMNS, CARRIED_COLUMNS, TEXT_COLUMNS, Source, open_source
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE

MAX_DURATION_S = 30.0  # Whisper's window; 1,500 of Llasa's 2,048 tokens, which leaves room for the text
MIN_DURATION_S = 0.3  # shorter clips are clicks, not words
# Arguments that do not change the codes: a resumed run may have other values of them.
FREE_ARGUMENTS = ("output_dir", "format", "overwrite", "push_to_hub", "strict", "debug")

logger = logging.getLogger("create_dataset")


def read_clip(source: Source, index: int, args: argparse.Namespace) -> tuple[dict, np.ndarray | None]:
    """One row of the source.

    Returns:
        The record to write, and the waveform: float32 mono at 16 kHz, shape (n_samples,). For a clip that cannot be
        used: its record in skipped.jsonl, and None.
    """
    values = source.rows[index]
    row = {name: values[column] for name, column in source.columns.items()}
    text = (row.pop("text") or "").strip()
    audio = row.pop("audio")
    carried = {name: carried_value(source, name, value) for name, value in row.items()}
    path, data = path_and_bytes(audio)

    def skipped(reason: str, detail: str) -> tuple[dict, None]:
        return {"row": index, "id": carried.get("id"), "path": path, "reason": reason, "detail": detail}, None

    if not text:
        return skipped("empty_text", "the text is empty")
    if not (data or path):
        return skipped("unreadable", "neither a path nor bytes of audio")
    try:
        wav = load_audio(data or source.folder / path)
    except (InputError, OSError) as error:
        return skipped("unreadable", str(error))
    duration_s = len(wav) / SAMPLE_RATE
    if duration_s > args.max_duration_s:
        return skipped("too_long", f"{duration_s:.2f} s is over --max_duration_s {args.max_duration_s:g}")
    if duration_s < args.min_duration_s:
        return skipped("too_short", f"{duration_s:.2f} s is under --min_duration_s {args.min_duration_s:g}")
    record = {"text": text, "audio_codes": [], "duration_s": round(duration_s, 4), "sampling_rate": SAMPLE_RATE}
    return record | carried, wav


def carried_value(source: Source, name: str, value: object) -> str | None:
    """A value of CARRIED_COLUMNS as text; of class labels the name, not the number."""
    if value is None:
        return None
    feature = source.rows.features[source.columns[name]]
    return feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else str(value)


def path_and_bytes(audio: dict | str | bytes | None) -> tuple[str | None, bytes | None]:
    """The path and the content of an audio value, whichever it has."""
    if isinstance(audio, dict):
        return audio.get("path"), audio.get("bytes")
    if isinstance(audio, bytes):
        return None, audio
    return audio, None


def encode_rows(source: Source, codec: SpeechCodec, indices: range, args: argparse.Namespace, progress) -> list[dict]:
    """The records of the rows `indices`, in this order.

    Raises:
        InputError: with --strict, at the first clip that would be skipped.
    """
    records: dict[int, dict] = {}
    wavs: dict[int, np.ndarray] = {}
    for index in indices:
        records[index], wav = read_clip(source, index, args)
        if wav is not None:
            wavs[index] = wav
            continue
        if args.strict:
            clip = json.dumps(records[index], ensure_ascii=False)
            raise InputError(
                f"--strict: a clip cannot be used (got {clip}). Repair it, or leave --strict out to skip it"
            )
        progress.update()
    by_length = sorted(wavs, key=lambda index: len(wavs[index]))  # clips of equal length share a forward pass
    for start in range(0, len(by_length), args.batch_size):
        batch = by_length[start : start + args.batch_size]
        for index, codes in zip(batch, codec.encode([wavs[index] for index in batch]), strict=True):
            records[index]["audio_codes"] = codes
        progress.update(len(batch))
    return list(records.values())


def encode_all(source: Source, codec: SpeechCodec, partial: Path, args: argparse.Namespace) -> list[Path]:
    """Encode the shards that an interrupted run has not written; returns all shards, files of one record per line."""
    n_rows = len(source.rows)
    shards = []
    with tqdm(total=n_rows, unit="clip", desc="encoding", disable=None) as progress:
        for start in range(0, n_rows, args.shard_size):
            indices = range(start, min(start + args.shard_size, n_rows))
            shard = partial / f"shard-{start // args.shard_size:05d}.jsonl"
            if shard.is_file():
                progress.update(len(indices))
            else:  # a batch never spans two shards, so an interruption does not change the batches
                write_lines(shard, encode_rows(source, codec, indices, args, progress))
            shards.append(shard)
    return shards


def read_lines(shards: list[Path], skipped: bool) -> Iterator[dict]:
    """The records of the skipped clips, or of the other ones."""
    for shard in shards:
        for line in shard.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if ("reason" in record) == skipped:
                yield record


def write_lines(path: Path, records: list[dict]) -> None:
    """Write a .jsonl file atomically."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_whole(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))


def assemble(shards: list[Path], columns: dict[str, str], partial: Path, args: argparse.Namespace) -> datasets.Dataset:
    """Write skipped.jsonl and the dataset, and log a summary.

    Raises:
        InputError: every clip was skipped.
    """
    output_dir = Path(args.output_dir)
    split = re.split(r"[\[+]", args.split)[0]  # 'train' of 'train[:100]'
    for pattern in ("data-*.arrow", "state.json", "dataset_info.json", f"{split}.jsonl", f"{split}.parquet"):
        for stale in output_dir.glob(pattern):  # of the dataset that --overwrite replaces
            stale.unlink()
    skipped = list(read_lines(shards, skipped=True))
    write_lines(output_dir / "skipped.jsonl", skipped)
    reasons = Counter(record["reason"] for record in skipped)
    summary = f"skipped {len(skipped)}" + "".join(f", {reason} {n}" for reason, n in sorted(reasons.items()))
    if next(read_lines(shards, skipped=False), None) is None:
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
    shutil.rmtree(partial / "cache", ignore_errors=True)
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_generator(  # via the disk: the codes of a large corpus do not fit into memory
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
    """Create output_dir/.partial.

    Raises:
        InputError: output_dir cannot be written to, or has files that would be lost.
    """
    output_dir = Path(args.output_dir)
    partial = output_dir / ".partial"
    if partial.is_dir() and not (partial / "run.json").is_file():
        shutil.rmtree(partial)  # of a finished run that was killed in `discard`
    names = {file.name for file in output_dir.iterdir()} - {".partial"} if output_dir.is_dir() else set()
    if names and not any(partial.glob("shard-*.jsonl")):
        if "skipped.jsonl" not in names:
            raise InputError(f"--output_dir: {output_dir} holds other files. Use a new or an empty folder")
        if not args.overwrite:
            raise InputError(f"--output_dir: {output_dir} holds a finished dataset. --overwrite replaces it")
    check_writable(partial)
    return partial


def open_run(source: Source, partial: Path, args: argparse.Namespace) -> None:
    """Start a run in .partial, or resume the interrupted one there if its arguments and rows are the same.

    Raises:
        InputError: the interrupted run has other arguments or rows, whose codes must not be mixed with these; or it has
            skipped clips and this one is --strict.
    """
    run = {name: value for name, value in vars(args).items() if name not in FREE_ARGUMENTS}
    run["rows"] = source.fingerprint()
    file, shards = partial / "run.json", sorted(partial.glob("shard-*.jsonl"))
    earlier = json.loads(file.read_text()) if shards else run
    changed = [f"{name} {earlier.get(name)!r} (now {run[name]!r})" for name in run if run[name] != earlier.get(name)]
    if changed and not args.overwrite:
        raise InputError(
            f"--output_dir: {args.output_dir} holds an unfinished run with other {', '.join(changed)}. Resume it with "
            "those, use another folder, or discard that run with --overwrite"
        )
    if changed:
        for shard in shards:
            shard.unlink()
    elif args.strict:
        skipped = next(read_lines(shards, skipped=True), None)
        if skipped:
            raise InputError(
                f"--strict: the interrupted run has skipped a clip (got {json.dumps(skipped)}). Use another "
                "--output_dir"
            )
    write_lines(file, [run])


def discard(partial: Path) -> None:
    """Remove .partial; run.json first, because shards without it do not belong to any run."""
    (partial / "run.json").unlink()
    shutil.rmtree(partial)


def check_arguments(args: argparse.Namespace) -> None:
    if args.sampling_rate != SAMPLE_RATE:
        raise InputError(
            f"--sampling_rate: XCodec2 works at {SAMPLE_RATE} Hz only, with {CODES_PER_SECOND} codes per second (got "
            f"{args.sampling_rate}). Leave it out: audio of any rate is resampled"
        )
    check_at_least(args, batch_size=1, shard_size=1)
    if not 0 <= args.min_duration_s < args.max_duration_s:
        raise InputError(
            f"--min_duration_s, --max_duration_s: must have 0 <= min < max (got {args.min_duration_s} and "
            f"{args.max_duration_s})"
        )


def claim_hub_repo(name: str) -> None:
    """Create the private dataset repository, so that a missing login shows before hours of encoding."""
    try:
        HfApi().create_repo(name, repo_type="dataset", private=True, exist_ok=True)
    except Exception as error:  # as in dataset_io: httpx's or httpx2's errors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"--push_to_hub: {name}: {reason}. Log in with 'hf auth login', or leave it out") from error


def main(args: argparse.Namespace) -> None:
    set_up_logging("create_dataset")
    # TF32 has 10 bits of mantissa, as float16: some codes would differ between GPUs, and from a CPU's.
    torch.backends.cudnn.allow_tf32 = False
    with bad_input_exits():
        check_arguments(args)
        device = pick_device(args.device)
        partial = open_output(args)
        source = open_source(args.dataset, args.split, args.dataset_config, args.text_column, args.audio_column)
        open_run(source, partial, args)
        if args.push_to_hub:
            claim_hub_repo(args.push_to_hub)
        codec = SpeechCodec.from_pretrained(args.codec_id, device=device, dtype=getattr(torch, args.dtype))
        shards = encode_all(source, codec, partial, args)
        dataset = assemble(shards, source.columns, partial, args)
        if args.push_to_hub:
            with library_errors_are_input(f"--push_to_hub: {args.push_to_hub}", OSError):
                dataset.push_to_hub(args.push_to_hub, private=True)
    discard(partial)  # last: without .partial the dataset counts as finished


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", required=True, help="hub id, saved folder, audiofolder, or .json/.jsonl/.csv/.parquet file")
    add("--dataset_config", help="configuration of a hub dataset that has several, e.g. a language")
    add("--split", default="train", help="split to encode; for a hub dataset also train[:100]")
    add("--text_column", help=f"column of the text; default: the first available of {', '.join(TEXT_COLUMNS)}")
    add("--audio_column", help=f"column of the audio; default: the first available of {', '.join(AUDIO_COLUMNS)}")
    add("--output_dir", required=True, help="folder of the new dataset: new, empty, or of an interrupted run")
    add("--format", choices=("arrow", "json", "parquet"), default="arrow", help="arrow is datasets' save_to_disk")
    add("--overwrite", action="store_true", help="replace a finished dataset, or discard another unfinished run")
    add("--push_to_hub", metavar="REPO", help="also push the dataset to this hub repository, private if it is new")
    add("--codec_id", default="HKUSTAudio/xcodec2", help="hub id or folder of the XCodec2 codec")
    add("--sampling_rate", type=int, default=SAMPLE_RATE, help="sampling rate of the codec in Hz; no other is accepted")
    add("--device", default="auto", help="where the codec runs: auto (a GPU where there is one), cpu, cuda or cuda:1")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the codec; the half precisions change some codes",
    )
    add("--batch_size", type=int, default=16, help="number of clips that the codec encodes at a time")
    add("--shard_size", type=int, default=128, help="number of rows held in memory, and lost at most when killed")
    add("--max_duration_s", type=float, default=MAX_DURATION_S, help="skip longer clips; Whisper's window is 30 s")
    add("--min_duration_s", type=float, default=MIN_DURATION_S, help="skip shorter clips, which are clicks, not words")
    add("--strict", action="store_true", help="stop with an error at the first clip that would be skipped")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
