"""Command line helpers: reading text files."""

import io

import pytest

from common.cli import InputError, pick_device, read_lines


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
