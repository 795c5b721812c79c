"""benchmarks/train_step.py: first steps that differ stop it; test_docs.py runs the whole of it."""

import pytest

from benchmarks import train_step

LOG = {"reward": "0.206", "reward_std": "0.1447", "completions/mean_length": "72.38", "grad_norm": "1.211"}


def test_equal_first_steps(capsys):
    compared = train_step.check_equal({"baseline": LOG, "ours": LOG | {"grad_norm": "1.2115"}}, tolerance=1e-3)
    assert compared["grad_norm"] == [1.211, 1.2115] and compared.keys() == LOG.keys()
    assert "first step, grad_norm: baseline 1.21100, ours 1.21150" in capsys.readouterr().out


@pytest.mark.parametrize("key, value", [("reward", "0.21"), ("completions/mean_length", "72.5"), ("grad_norm", "nan")])
def test_first_steps_that_differ(key, value):
    with pytest.raises(SystemExit, match=f"error: {key} differs"):
        train_step.check_equal({"baseline": LOG, "ours": LOG | {key: value}}, tolerance=1e-3)


def test_a_row_for_each_phase():
    def step(scale):
        seconds = {phase: scale * (i + 1) for i, phase in enumerate(train_step.PHASES)}
        return seconds | {"step": sum(seconds.values())}

    table = train_step.phase_table({train_step.BASELINE: [step(2.0)], "ours": [step(1.0), step(1.0)]})
    assert table.splitlines()[2:4] == [
        "| sampling | 2.00 s (7%) | 1.00 s (7%) | 2.00× |",
        "| rewards | 4.00 s (13%) | 2.00 s (13%) | 2.00× |",
    ]
    assert table.splitlines()[-1] == "| step | 30.00 s (100%) | 15.00 s (100%) | 2.00× |"


def test_flags_of_train_py_are_passed_on():
    args = train_step.parse_args(["--steps", "1", "--max_completion_length", "20", "--num_generations", "4"])
    assert args.config == "configs/tiny.yaml" and args.steps == 1
    _, training_args, _ = train_step.train_arguments(args, "folder", steps=2)
    assert (training_args.max_steps, training_args.max_completion_length, training_args.num_generations) == (2, 20, 4)
