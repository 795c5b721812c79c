"""Which checkpoint a run resumes from."""

from training.checkpoints import last_complete_checkpoint


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, state in ((9, "{}"), (10, '{"cut')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-11").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
