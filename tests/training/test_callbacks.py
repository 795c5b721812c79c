"""The console's line a step, and the rollouts that a run keeps and reports."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

import train
from speech.audio import load_audio
from training.callbacks import ConsoleLog, clock, step_line

GRPO_LOG = {
    "loss": -1.5e-08,
    "reward": 0.2484,
    "reward_std": 0.279,
    "wer": 0.535,
    "nll": 3.02,
    "duration_s": 1.41,
    "frac_truncated": 0.188,
    "entropy": 1.5,
}


def test_the_line_of_a_grpo_step():
    line = step_line(GRPO_LOG, step=1, max_steps=75, seconds_a_step=6.1)
    assert line == (
        "step  1/75  reward 0.248 ± 0.279  WER 53.5 %  NLL 3.02  1.41 s  truncated 18.8 %  6.1 s/step  eta 7:31"
    )


def test_the_line_of_a_supervised_step_and_of_missing_values():
    assert step_line({"loss": "0.25", "mean_token_accuracy": 0.5}, 100, 850, None) == (
        "step 100/850  loss 0.2500  token accuracy 50.0 %"
    )
    assert step_line({"reward": 0.5, "reward_std": None, "wer": None}, 1, 2, 1.0) == (
        "step 1/2  reward 0.500 ± 0.000  1.0 s/step  eta 0:01"
    )


def test_a_narrow_terminal_cuts_off_metrics_not_times():
    line = step_line(GRPO_LOG, step=1, max_steps=75, seconds_a_step=6.1, times_first=True)
    assert line.startswith("step  1/75  6.1 s/step  eta 7:31  reward 0.248")


def test_clock():
    assert [clock(s) for s in (0.9, 61, 3_661)] == ["0:00", "1:01", "1:01:01"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_a_step_in_a_log_and_one_bar_on_a_terminal(terminal, tmp_path, caplog, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    caplog.set_level(logging.INFO, "train")
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(max_steps=2)
    console, control = ConsoleLog("GRPO · toy"), TrainerControl()
    console.on_train_begin(args, state, control)
    for state.global_step in (1, 2):
        console.on_log(args, state, control, logs=dict(GRPO_LOG))
    console.on_log(args, state, control, logs={"train_runtime": 3.0})  # the Trainer's last entry is no step
    console.on_train_end(args, state, control)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "GRPO · toy"
    assert len(lines) == (1 if terminal else 3)
    assert ("step 2/2" in capsys.readouterr().err) == terminal


def test_other_processes_are_silent(tmp_path, caplog):
    caplog.set_level(logging.INFO, "train")
    state = TrainerState(max_steps=2, is_world_process_zero=False)
    console, args = ConsoleLog("GRPO · toy"), TrainingArguments(str(tmp_path), use_cpu=True)
    console.on_train_begin(args, state, TrainerControl())
    console.on_log(args, state, TrainerControl(), logs=dict(GRPO_LOG))
    assert caplog.records == []


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A step of train.py that reports to all three, none of which needs an account."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio")
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        flags = ["--config", "configs/tiny.yaml", "--max_steps", "1", "--per_device_train_batch_size", "8"]
        flags += ["--num_generations", "4", "--max_completion_length", "60", "--sample_steps", "1"]
        flags += ["--sample_count", "2", "--save_strategy", "no", "--output_dir", str(folder / "run")]
        train.main(train.parse_args([*flags, "--report_to", "tensorboard", "trackio", "wandb"]))
        import wandb

        wandb.finish()
    return SimpleNamespace(folder=folder, samples=folder / "run" / "samples" / "step_000001")


def test_tensorboard_has_curves_and_audio(reported):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (reported.folder / "run" / "runs").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events), size_guidance={"audio": 0}).Reload()
    assert "train/reward" in log.Tags()["scalars"] and "train/wer" in log.Tags()["scalars"]
    assert log.Tags()["audio"] == ["samples/rollout_0", "samples/rollout_1"]
    assert log.Audio("samples/rollout_0")[0].sample_rate == 16_000


def test_wandb_has_audio(reported):
    clips = list(reported.folder.rglob("wandb/offline-run-*/files/media/audio/samples/*.wav"))
    assert len(clips) == 2
    assert any(np.abs(load_audio(clip)).max() > 0.01 for clip in clips)


def test_trackio_has_audio_at_its_own_loudness(reported):
    logged = sorted(np.abs(load_audio(clip)).max() for clip in Path(os.environ["TRACKIO_DIR"]).rglob("*.wav"))
    saved = sorted(np.abs(load_audio(clip)).max() for clip in reported.samples.glob("*.wav"))
    np.testing.assert_allclose(logged, saved, atol=1e-3)
