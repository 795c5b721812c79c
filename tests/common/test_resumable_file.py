"""What an interrupted run left, where the disk was full."""

import errno
import os

import pytest

from common import resumable_file
from common.resumable_file import ResumableFile


def test_a_disk_that_was_full_at_the_start_leaves_nothing_that_is_refused(tmp_path, monkeypatch):
    """A file without a byte fits onto a full disk."""
    write = resumable_file.write_whole_text

    def write_on_a_full_disk(path, text):
        if text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(resumable_file, "write_whole_text", write_on_a_full_disk)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        ResumableFile(tmp_path / "pairs.jsonl", {"seed": 0}, "pairs", False).finished_batches()
    monkeypatch.undo()
    output = ResumableFile(tmp_path / "pairs.jsonl", {"seed": 0}, "pairs", False)
    assert output.finished_batches() == []
    output.add_batch({"number": 1})
    assert ResumableFile(tmp_path / "pairs.jsonl", {"seed": 0}, "pairs", False).finished_batches() == [{"number": 1}]
