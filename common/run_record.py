"""What a run leaves beside its checkpoint: run.json and reward_curve.png."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from common.cli import write_whole_text

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "openai-whisper", "jiwer")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "model.bin")  # of a model's folder
# What the reward curve shows where it was logged: (log key, label)
CURVES = (
    ("reward", "reward"),
    ("wer", "WER of the rollouts"),
    ("nll", "NLL per token"),
    ("duration_s", "duration, s"),
    ("log_f0_std", "log-F0 std"),
    ("frac_hallucination", "hallucinations"),
    ("insertions", "insertions per word"),
    ("deletions", "deletions per word"),
    ("kl", "KL to the reference"),
    ("rewards/accuracies", "pairs ordered rightly"),
    ("rewards/margins", "margin of chosen over rejected"),
    ("entropy", "entropy per token"),
    ("loss", "loss"),
)


def git_commit() -> str:
    """The project's commit, with +dirty where the tree differs from it; "unknown" outside a clone."""
    folder = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict:
    """Command, date, commit, versions and hardware of this process."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "argv": ["python", Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.now().isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": {"cpu": platform.machine(), "cores": os.cpu_count(), "gpus": gpus},
    }


def write_run(output_dir: str, **facts) -> None:
    """Write output_dir/run.json: provenance and `facts` (which must be JSON, or paths)."""
    text = json.dumps({**provenance(), **facts}, indent=2, default=str) + "\n"
    write_whole_text(Path(output_dir) / "run.json", text)


def content_digest(name_or_path: str) -> str | None:
    """A digest of a file, or of the weights in a model's folder; None for what is not on this disk, as a hub id."""
    path = Path(name_or_path)
    files = [path] if path.is_file() else sorted(file for pattern in WEIGHTS for file in path.glob(pattern))
    digests = []
    for name in files:
        with name.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return short_digest(digests) if files else None


def short_digest(items: Iterable) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of JSON values."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()[:16]


def changed_settings(earlier: dict, now: dict) -> str:
    """The settings in which two runs differ, for an error message; "" if in none.

    One that the earlier run does not record, as of a version without it, counts as switched off.
    """
    names = [name for name in earlier if earlier[name] != now.get(name)]
    names += [name for name in now if name not in earlier and now[name]]
    return ", ".join(f"{name} ({earlier.get(name)!r:.80}, now {now.get(name)!r:.80})" for name in names)


def running_mean(values: list[float], window: int) -> list[float]:
    """Each value's mean with up to window − 1 values before it."""
    spans = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def plot_curves(log_history: list[dict], path: Path) -> None:
    """Draw every curve of CURVES that the log holds, each over the training step."""
    import matplotlib.pyplot as plt  # slow to import, and only needed at the end

    drawn = []
    for key, label in CURVES:
        # A metric without a value (no voice, no pitch) is logged as null.
        points = [(entry["step"], float(entry[key])) for entry in log_history if entry.get(key) is not None]
        if points:
            drawn.append((label, *zip(*points, strict=True)))
    if not drawn:
        return
    rows = (len(drawn) + 3) // 4
    figure, axes = plt.subplots(rows, 4, figsize=(14, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.remove()
    for axis, (label, steps, values) in zip(axes.flat, drawn, strict=False):
        axis.plot(steps, values, linewidth=0.8, alpha=0.35, color="tab:blue")
        axis.plot(steps, running_mean(values, max(1, len(values) // 20)), linewidth=1.6, color="tab:blue")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
