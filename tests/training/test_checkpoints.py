"""Which checkpoint a run resumes from."""

from types import SimpleNamespace

import pytest

from training.checkpoints import find_checkpoint, last_complete_checkpoint


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, state in ((9, "{}"), (10, '{"cut')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-11").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")


def test_no_resuming_however_it_is_written(tmp_path):
    """A YAML file has a boolean; and folders of other names are the user's."""
    (tmp_path / "checkpoint-best").mkdir()
    for wanted in (None, False, "false"):
        assert find_checkpoint(SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(tmp_path))) is None


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("files", "processes"), [(["rng_state.pth"], 2), (["rng_state_0.pth", "rng_state_1.pth"], 1)])
def test_other_processes_than_before_are_warned_of(files, processes, named, tmp_path, caplog):
    """Two GPUs make twice the rollouts a step: the run is not the one it was."""
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    for name, content in {"trainer_state.json": "{}", "model.safetensors": "", **dict.fromkeys(files, "")}.items():
        (checkpoint / name).write_text(content)
    wanted = str(checkpoint) if named else "true"
    for world_size, warned in ((len(files), False), (processes, True)):
        args = SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(tmp_path), world_size=world_size)
        assert find_checkpoint(args) == str(checkpoint)
        assert (f"written by {len(files)} processes, and {processes} resume it" in caplog.text) == warned
