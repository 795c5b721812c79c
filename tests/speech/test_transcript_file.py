"""Files of transcripts: what an interrupted run leaves, who may resume it, and torch's random state."""

import json

import pytest
import torch

from common.cli import InputError
from speech.policy import Transcript
from speech.transcript_file import TranscriptFile

RUN = {"temperature": 1.0, "clips": "abc"}
BATCHES = [{3: Transcript("three\n\u2028", False), 0: Transcript("zero", True)}, {1: Transcript("", False)}]


def opened(path, overwrite=False, **changes) -> TranscriptFile:
    return TranscriptFile(path, RUN | changes, "cpu", overwrite)


def interrupted(path) -> torch.Tensor:
    """Two batches, and what torch would draw next."""
    file = opened(path)
    torch.manual_seed(1)
    assert file.resume() == []
    for batch in BATCHES:
        torch.rand(3)  # as sampling does
        file.add(batch)
    return torch.rand(3)


@pytest.mark.parametrize("cut_off", ["", '{"rollouts": [[7, "se'])
def test_resumes_after_the_last_whole_batch(tmp_path, cut_off):
    path = tmp_path / "t.jsonl"
    expected = interrupted(path)
    with (tmp_path / "t.jsonl.partial").open("a") as file:
        file.write(cut_off)
    torch.manual_seed(2)
    file = opened(path)
    assert not file.finished and not path.exists()
    assert file.resume() == BATCHES
    assert torch.equal(torch.rand(3), expected)
    file.add(BATCHES[1])
    assert opened(path).resume() == [*BATCHES, BATCHES[1]]


def test_a_finished_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "t.jsonl"
    interrupted(path)
    opened(path).finish([{"index": 0, "transcripts": ["é"]}, {"index": 1}])
    assert path.read_text(encoding="utf-8") == '{"index": 0, "transcripts": ["é"]}\n{"index": 1}\n'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.jsonl", "t.jsonl.run.json"]
    assert json.loads((tmp_path / "t.jsonl.run.json").read_text())["run"] == RUN
    assert opened(path).finished and not opened(path, overwrite=True).finished


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_unless_it_is_to_be_overwritten(tmp_path, finished):
    path = tmp_path / "t.jsonl"
    interrupted(path)
    if finished:
        opened(path).finish([{}])
    message = (
        r"t\.jsonl: has the transcripts of a run with other temperature \(1\.0, now 0\.5\), clips \('abc', now 'x'\)"
    )
    with pytest.raises(InputError, match=message):
        opened(path, temperature=0.5, clips="x")
    for record in ("{", "[]", None):
        (tmp_path / "t.jsonl.run.json").unlink()
        if record:
            (tmp_path / "t.jsonl.run.json").write_text(record)
        with pytest.raises(InputError, match=r"exists, and no t\.jsonl\.run\.json tells what is in it.*--overwrite"):
            opened(path)
        (tmp_path / "t.jsonl.run.json").touch()
    file = opened(path, overwrite=True, temperature=0.5)
    assert path.exists() == finished  # until the run begins
    assert file.resume() == [] and not path.exists()
    assert opened(path, temperature=0.5).resume() == []
