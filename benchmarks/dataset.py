"""Speed and memory of create_dataset.py: recordings to codes, with and without worker processes.

    python benchmarks/dataset.py --hours 1    # tiny/codec: an hour of clips of 2 to 20 s, FLAC at 24 kHz
    python benchmarks/dataset.py --size real  # published sizes, random weights; needs a GPU

The clips are the recordings of tiny/heldout, one behind the other in random order. The variants:

    baseline: one at a time  --num_workers 0: one process reads, computes features and encodes
    ours                     --num_workers N: N processes read and compute features ahead of it

Each is a process of its own, start included; their codes must be equal before any time is printed. Memory is that of
the process with its workers (PSS: pages that they share count once), also for a quarter of the hours: it is not to
grow with them.

What to expect: on a CPU the codec takes ten times as long as reading and features, and all cores, so workers gain
nothing there. They are for a GPU, which would wait for them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import soundfile
import soxr
import torch
from transformers import Xcodec2Config, Xcodec2Model

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

from benchmarks.harness import (
    BASELINE,
    NOT_COMPARABLE,
    Timing,
    benchmark_parser,
    ratios,
    set_up,
    synchronize,
    write_results,
)
from common.cli import POSITIVE, InputError, bad_input_exits, check_at_least, check_ranges, parse_strictly
from common.tables import markdown_table
from speech.audio import load_audio
from speech.codec import SpeechCodec, encoder_inputs
from speech.tokens import SAMPLE_RATE

ROOT = Path(__file__).parent.parent
SHORTEST_S, LONGEST_S = 2.0, 20.0
SOURCE_RATE = 24_000  # of the clips, as LibriTTS has it: they are resampled
CHUNK_SIZE = 32  # rows: a quarter of an hour is to have several chunks, or memory would still grow
SAMPLED_CLIPS = 32  # of which the seconds of each stage are measured


def write_clips(folder: Path, hours: float, seed: int) -> Path:
    """Clips of SHORTEST_S to LONGEST_S, `hours` in all, and the clips.jsonl that is returned."""
    rng = np.random.default_rng(seed)
    recordings = [load_audio(path) for path in sorted((ROOT / "tiny/heldout").glob("*.ogg"))]
    rows, written_s = [], 0.0
    while written_s < hours * 3_600:
        length = round(rng.uniform(SHORTEST_S, LONGEST_S) * SAMPLE_RATE)
        parts = []
        while sum(map(len, parts)) < length:
            parts.append(recordings[rng.integers(len(recordings))])
        wav = np.concatenate(parts)[:length]
        name = f"{len(rows):06d}.flac"
        soundfile.write(folder / name, soxr.resample(wav, SAMPLE_RATE, SOURCE_RATE), SOURCE_RATE)
        rows.append({"audio": name, "text": f"clip {len(rows)}"})
        written_s += length / SAMPLE_RATE
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "clips.jsonl"


def run_command(command: list[str]) -> tuple[float, int]:
    """Seconds that a command takes, and the peak memory of its processes in bytes, looked at every 0.2 s."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, memory_of(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)}: {process.stderr.read()}")
    return time.perf_counter() - start, peak_bytes


def memory_of(pid: int) -> int:
    """Bytes of a process and its descendants; 0 if it has just ended."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # denied while it ends
        pass
    return total


def encode(clips: Path, codec_id: str, output_dir: Path, num_workers: int, device: torch.device) -> tuple[float, int]:
    """Run create_dataset.py on the clips; returns seconds and bytes."""
    flags = {
        "dataset": clips,
        "codec_id": codec_id,
        "output_dir": output_dir,
        "num_workers": num_workers,
        "device": device,
        "chunk_size": CHUNK_SIZE,
    }
    return run_command([sys.executable, "create_dataset.py", *(f"--{name}={value}" for name, value in flags.items())])


def seconds_of_stages(clips: Path, codec: SpeechCodec) -> dict[str, float]:
    """Seconds that each stage takes for a second of audio, clip by clip in this process."""
    paths = [clips.parent / json.loads(line)["audio"] for line in clips.read_text().split("\n")[:-1]][:SAMPLED_CLIPS]
    stages = {
        "read and resample": load_audio,
        "features": encoder_inputs,
        "encode": lambda inputs: codec.encode_inputs([inputs]),
    }
    seconds, duration_s = dict.fromkeys(stages, 0.0), 0.0
    codec.encode([load_audio(paths[0])])  # warm-up
    for path in paths:
        result = path
        for name, stage in stages.items():
            start = time.perf_counter()
            result = stage(result)
            synchronize(codec.device)
            seconds[name] += time.perf_counter() - start
        duration_s += soundfile.info(path).duration
    return {name: passed / duration_s for name, passed in seconds.items()}


def random_codec(folder: Path, seed: int) -> None:
    """A codec of the published sizes with random weights."""
    torch.manual_seed(seed)
    Xcodec2Model(Xcodec2Config()).save_pretrained(folder)


def codes_of(output_dir: Path) -> list[list[int]]:
    return datasets.load_from_disk(str(output_dir))["audio_codes"][:]


def compare(
    clips: Path, codec_id: str, folder: Path, workers: dict[str, int], repeats: int, device: torch.device
) -> tuple[dict[str, Timing], dict[str, int], bool]:
    """Time the variants in turn.

    Args:
        workers: variant → --num_workers; the first one is the baseline.
    Returns:
        Their timings, their peak memory in bytes, and whether all codes are equal.
    """
    timings, peaks, equal = {name: Timing([]) for name in workers}, dict.fromkeys(workers, 0), True
    expected = None
    for repeat in range(repeats):
        for name, num_workers in workers.items():
            output_dir = folder / f"{num_workers}_{repeat}"
            seconds, peak_bytes = encode(clips, codec_id, output_dir, num_workers, device)
            timings[name].seconds.append(seconds)
            peaks[name] = max(peaks[name], peak_bytes)
            expected = expected or codes_of(output_dir)
            equal = equal and codes_of(output_dir) == expected
    return timings, peaks, equal


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        device = set_up(args)
        check_at_least(args, num_workers=1)
        check_ranges(args, {"hours": POSITIVE})
        if args.size == "real" and device.type == "cpu":
            raise InputError("--size real: needs a GPU. On a CPU use --size tiny")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that are started
    workers = {BASELINE: 0, "ours": args.num_workers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        codec_id = args.codec_id or str(ROOT / "tiny/codec")
        if args.size == "real":
            codec_id = str(folder / "codec")
            random_codec(folder / "codec", args.seed)
        clips = {}
        for name, hours in (("quarter", args.hours / 4), ("whole", args.hours)):
            (folder / name / "out").mkdir(parents=True)
            clips[name] = write_clips(folder / name, hours, args.seed)
        timings, peaks, equal = compare(clips["whole"], codec_id, folder / "whole/out", workers, args.repeats, device)
        if not equal:
            sys.exit(NOT_COMPARABLE)
        _, quarter_peaks, _ = compare(clips["quarter"], codec_id, folder / "quarter/out", workers, 1, device)
        stages = seconds_of_stages(clips["whole"], SpeechCodec.from_pretrained(codec_id, device))

    print(f"{args.hours:g} hours, {device}, {args.threads} threads, {args.num_workers} workers; codes equal\n")
    rows = []
    for name, timing in timings.items():
        ratio, low, high = ratios(timings[BASELINE], timing)
        rows.append([
            name, f"{timing.median:.1f}", f"{args.hours * 3_600 / timing.median:.0f}×",
            f"{ratio:.2f}× ({low:.2f}–{high:.2f})",
            f"{quarter_peaks[name] / 2**30:.2f} GiB", f"{peaks[name] / 2**30:.2f} GiB",
        ])  # fmt: skip
    header = ["variant", "seconds", "real time", "speed-up", "memory, a quarter of the hours", "memory, all"]
    print(markdown_table(header, rows))
    print("\nof a clip of 10 s: " + ", ".join(f"{name} {1_000 * 10 * s:.0f} ms" for name, s in stages.items()))
    results = {
        "hours": args.hours,
        "device": str(device),
        "threads": args.threads,
        "num_workers": args.num_workers,
        "equal": equal,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratio": ratios(timings[BASELINE], timings["ours"]),
        "peak_bytes": peaks,
        "peak_bytes_quarter": quarter_peaks,
        "seconds_of_stages": stages,
    }
    write_results(args.output_dir, f"dataset_{args.size}", results)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.set_defaults(repeats=3)
    add = parser.add_argument
    add("--hours", type=float, default=1.0, help="hours of clips")
    add("--codec_id", help="codec of the size tiny (default: tiny/codec); a smaller one stands in for a fast device")
    add("--num_workers", type=int, default=min(8, os.cpu_count()), help="worker processes of ours")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
