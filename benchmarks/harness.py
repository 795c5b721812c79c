"""What the benchmarks share: two sides timed in turn in one run, a table, a JSON file, a plot of how cost grows.

A benchmark builds its inputs, checks that both sides give equal results, and only then times them.
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/codec.py` finds the project's files

from common.run_record import provenance  # noqa: E402

REFERENCE = "one at a time"  # the obvious way: what every other side is a ratio to


@dataclass
class Timing:
    """Seconds of each repeat of one side, and the most memory it took on a GPU (bytes; None on a CPU)."""

    seconds: list[float]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def synchronize(device: torch.device) -> None:
    """Wait for the GPU: without it the clock measures how fast work is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(sides: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Time the sides in turn, A B A B …, so that a machine that slows down slows both. One untimed call each first."""
    timings = {name: Timing([]) for name in sides}
    for call in sides.values():
        call()
    for _ in range(repeats):
        for name, call in sides.items():
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


def ratios(reference: Timing, side: Timing) -> tuple[float, float, float]:
    """How many times faster `side` is: median, lowest and highest over the pairs that ran one after the other."""
    pairs = [a / b for a, b in zip(reference.seconds, side.seconds, strict=True)]
    return float(np.median(pairs)), min(pairs), max(pairs)


def host_peak_bytes() -> int:
    """The most memory this process has held so far, in bytes; it never goes down."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here and now: the limit of what computes."""
    n = 8_192 if device.type == "cuda" else 2_048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(interleave({"product": lambda: a @ b}, 5, device)["product"].seconds)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second that can be read here and now (a sum over 1 GiB, 4 GiB on a GPU): the limit of what only reads."""
    values = torch.ones((1 << 30) if device.type == "cuda" else (1 << 28), device=device)
    return values.nbytes / min(interleave({"sum": values.sum}, 5, device)["sum"].seconds)


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def timing_rows(timings: dict[str, Timing], items: int) -> list[list]:
    """Rows of side, seconds, items a second, ratio (lowest to highest), GPU memory; the first side is the reference."""
    reference = next(iter(timings.values()))
    rows = []
    for name, timing in timings.items():
        ratio, low, high = ratios(reference, timing)
        memory = "–" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**30:.2f} GiB"
        rate = items / timing.median
        rows.append([name, f"{timing.median:.3f}", f"{rate:.3g}", f"{ratio:.2f}× ({low:.2f}–{high:.2f})", memory])
    return rows


TIMING_HEADER = ["side", "seconds", "items / s", "ratio", "GPU memory"]


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
    """`<name>.json`: the results, and what they were made with."""
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, **results, "provenance": provenance()}, indent=2)
    (output_dir / f"{name}.json").write_text(text + "\n")


def benchmark_parser(doc: str) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--size", choices=("tiny", "real"), default="tiny", help="tiny/'s models, or random weights at the real sizes")
    add("--device", default="auto", help="auto is a GPU where there is one")
    add("--repeats", type=int, default=5, help="how often each side is timed")
    add("--threads", type=int, default=2, help="CPU threads of PyTorch")
    add("--seed", type=int, default=0, help="of the inputs and the random weights")
    add("--output_dir", type=Path, default=Path("benchmarks/results"), help="where the JSON and the plots go")
    return parser
