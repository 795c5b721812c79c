"""Command line helpers: reading text files, and the process that a script runs in."""

import io
import os
import subprocess
import sys

import pytest

from common.cli import InputError, check_writable, pick_device, read_lines


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_only_a_line_feed_ends_a_line(tmp_path, monkeypatch, end):
    """JSON allows a raw U+2028 within a string; str.splitlines() would split there, and at U+0085 and form feeds."""
    lines = ['{"text": "one\u2028two"}', "three\x85four\x0cfive", "", "six"]
    text = (end or "\n").join(lines) + end
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert read_lines(str(tmp_path / "a.jsonl")) == lines
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert read_lines("-") == lines


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, why in (("latin.txt", "not UTF-8 text"), ("none.txt", "No such file")):
        with pytest.raises(InputError, match=rf"{name}: {why}"):
            read_lines(str(tmp_path / name))


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_gpu_that_is_asked_for_is_the_current_one(device, current, monkeypatch):
    """openai-whisper's Triton kernels run on the current GPU, and fail on tensors of another."""
    chosen = []
    monkeypatch.setattr("torch.empty", lambda *_, **__: None)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert pick_device(device) == device and chosen == current


def test_plots_are_drawn_whatever_backend_a_notebook_has_set(tmp_path):
    """The reward curve is drawn at the end of a training, just before the policy is saved."""
    code = (
        "import sys; from pathlib import Path; from common.cli import run_script; "
        "from common.run_record import plot_curves; "
        "run_script(lambda path: plot_curves([{'step': 1, 'loss': 0.5}], path), lambda: Path(sys.argv[1]))"
    )
    environment = {**os.environ, "MPLBACKEND": "module://not_installed.backend"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curve.png")], check=True, env=environment)
    assert (tmp_path / "curve.png").stat().st_size > 1_000


@pytest.mark.parametrize("output", ["run", "run/round_1"])
def test_a_link_to_a_folder_that_is_gone_is_named(output, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    with pytest.raises(InputError, match=f"cannot write into {tmp_path / output}: .*run is a link to .*scratch, which"):
        check_writable(tmp_path / output)
    (tmp_path / "scratch").mkdir()
    check_writable(tmp_path / output)
