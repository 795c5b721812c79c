"""Which checkpoint a run resumes from."""

from types import SimpleNamespace

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
