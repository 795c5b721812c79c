"""What the benchmarks share: variants timed in turn in one run, a table, a JSON file, a plot of cost over size.

A benchmark builds its inputs, checks that every variant gives the baseline's results, and only then times them.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer

from common.arithmetic import set_up_arithmetic
from common.cli import HelpFormatter, add_device, check_at_least, check_writable, pick_device, set_up_logging
from common.run_record import provenance
from common.tables import markdown_table

BASELINE = "baseline: one at a time"  # every other variant's ratio is to this one's seconds
NOT_COMPARABLE = "error: the variants do not give the same results; their times would not be comparable"


@dataclass
class Timing:
    """Seconds of each repeat of one variant, and its peak memory on a GPU (bytes; None on a CPU)."""

    seconds: list[float]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def synchronize(device: torch.device) -> None:
    """Wait for the GPU: without it the clock measures how fast kernels are launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def silence(trainer: Trainer) -> None:
    """Remove the trainer's own console output, a dict and a bar, from between the benchmark's lines."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def interleave(variants: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Time the variants in turn, A B A B …: a machine that slows down slows all. One untimed warm-up call each."""
    timings = {name: Timing([]) for name in variants}
    for call in variants.values():
        call()
    for _ in range(repeats):
        for name, call in variants.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            timings[name].seconds.append(time.perf_counter() - start)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device)
                timings[name].peak_bytes = max(peak, timings[name].peak_bytes or 0)
    return timings


def ratios(baseline: Timing, variant: Timing) -> tuple[float, float, float]:
    """Speed-up of `variant`: median, lowest and highest over the pairs that ran one after the other."""
    pairs = [a / b for a, b in zip(baseline.seconds, variant.seconds, strict=True)]
    return float(np.median(pairs)), min(pairs), max(pairs)


def host_peak_bytes() -> int:
    """Peak memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured on this device: the limit of what is bound by arithmetic."""
    n = 8_192 if device.type == "cuda" else 2_048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(interleave({"product": lambda: a @ b}, 5, device)["product"].seconds)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes read per second (a sum over 1 GiB, 4 GiB on a GPU), measured: the limit of what is bound by memory."""
    values = torch.ones((1 << 30) if device.type == "cuda" else (1 << 28), device=device)
    return values.nbytes / min(interleave({"sum": values.sum}, 5, device)["sum"].seconds)


def timing_table(timings: dict[str, Timing], items: int, unit: str) -> str:
    """In Markdown, a row for each variant; the first is the baseline.

    Args:
        items: how many items of `unit` ("rollouts") one call processes.
    """
    baseline = next(iter(timings.values()))
    rows = []
    for name, timing in timings.items():
        ratio, low, high = ratios(baseline, timing)
        memory = "–" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**30:.2f} GiB"
        rate = items / timing.median
        rows.append([name, f"{timing.median:.3f}", f"{rate:.3g}", f"{ratio:.2f}× ({low:.2f}–{high:.2f})", memory])
    return markdown_table(["variant", "seconds", f"{unit} / s", "speed-up", "GPU memory"], rows)


def growth_slope(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log size by least squares: 1 is linear, 2 quadratic, 0 a fixed cost."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def plot_growth(path: Path, curves: dict[str, dict[str, tuple[list[float], list[float]]]]) -> None:
    """Cost over size, on log axes, one panel for each x-axis.

    Args:
        curves: {x-axis label: {name: (sizes, seconds)}}; a name that begins with "limit" is drawn dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), squeeze=False)
    for axis, (label, lines) in zip(axes[0], curves.items(), strict=True):
        for name, (sizes, seconds) in lines.items():
            slope = f", slope {growth_slope(sizes, seconds):.2f}" if len(sizes) > 1 else ""
            axis.plot(sizes, seconds, "--" if name.startswith("limit") else "o-", label=name + slope)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_results(output_dir: Path, name: str, results: dict) -> None:
    """Write `<name>.json`: the results and their provenance (command, commit, versions, hardware)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, **results, "provenance": provenance()}, indent=2)
    (output_dir / f"{name}.json").write_text(text + "\n")


def benchmark_parser(doc: str, slow_repeats: int | None = None) -> argparse.ArgumentParser:
    """The flags that the benchmarks share.

    Args:
        slow_repeats: --repeats for the real size on a CPU, if not 5; the flag's default is None then.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)
    add = parser.add_argument
    size_help = "tiny: the models of tiny/; real: the published sizes with random weights"
    add("--size", choices=("tiny", "real"), default="tiny", help=size_help)
    add_device(parser, "device of the models")
    slow = "" if slow_repeats is None else f" (default: 5; {slow_repeats} for the real size on a CPU)"
    add("--repeats", type=int, default=None if slow else 5, help=f"number of times each variant is timed{slow}")
    add("--threads", type=int, default=2, help="number of CPU threads of PyTorch")
    add("--seed", type=int, default=0, help="random seed of the inputs and the random weights")
    output_help = "folder of the results, a JSON file and plots"
    add("--output_dir", type=Path, default=Path("benchmarks/results"), help=output_help)
    return parser


def set_up(args: argparse.Namespace) -> torch.device:
    """Apply the flags that the benchmarks share; returns the device.

    Raises:
        InputError: a number below 1, a device that is not there, a folder that cannot be written.
    """
    set_up_logging("benchmarks")
    counts = ("repeats", "threads", "rollouts", "steps", "codes", "min_codes", "max_codes")
    given = [name for name in counts if getattr(args, name, None) is not None]
    check_at_least(args, **dict.fromkeys(given, 1))
    torch.set_num_threads(args.threads)
    set_up_arithmetic()
    check_writable(args.output_dir)
    return torch.device(pick_device(args.device))
