"""tiny/compare.py: commands that exist, runs that are kept, and a table that says what was measured."""

import json
import shlex
from pathlib import Path

import pytest

import evaluation
import inference
import select_rl_data
import train
from tiny import compare


@pytest.mark.parametrize("name", compare.COMPARISONS)
def test_commands_are_accepted(name, tmp_path):
    comparison = compare.COMPARISONS[name]
    for flags in comparison.runs.values():
        train.parse_args(shlex.split(flags.format(folder=tmp_path)))
    args = evaluation.parse_args([*comparison.evaluation.split(), "--models", comparison.policy])
    evaluation.check_args(args)
    assert set(comparison.plotted) <= comparison.metrics.keys()
    (tmp_path / "transcripts.jsonl").touch()
    for data in comparison.rl_data:
        flags = f"{compare.POOL} {compare.RL_DATA[data].format(folder=tmp_path)} --output {tmp_path}/{data}.parquet"
        select_rl_data.check_args(select_rl_data.parse_args(flags.split()))
    script, *flags = compare.TRANSCRIPTS.split()
    assert script == "inference.py"
    inference.parse_args([*flags, "--output", "x.jsonl"])


def finish(folder, name, step, wer):
    """What train.py and evaluation.py would leave."""
    (folder / name / f"checkpoint-{step}").mkdir(parents=True)
    history = [{"step": i + 1, "step_time": 2.0 + i} for i in range(step)] + [{"step": step, "train_runtime": 9.0}]
    (folder / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    write_evaluation(folder, f"{name}@{step}", wer)


def write_evaluation(folder, name, wer):
    metrics = {
        "judges": {judge: {"error_rate": wer} for judge in ("pocketsphinx", "tiny/whisper.pt")},
        "token2text": -wer, "duration_s": 1.5, "log_f0_std": None, "truncated": 0.25,
    }  # fmt: skip
    path = folder / "evaluations" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": [{"temperature": 1.0, "metrics": metrics}]}))


def test_table_and_plot_of_what_is_there(tmp_path, monkeypatch):
    for seed, wer in enumerate((0.3, 0.4, 0.5)):
        finish(tmp_path, f"grpo_{seed}", 50, wer)
    finish(tmp_path, "diffro_0", 50, 0.7)
    write_evaluation(tmp_path, "sft", 0.5)
    commands = []
    monkeypatch.setattr(compare, "run", lambda log, command, *more: commands.append((command, *more)))
    compare.main(compare.parse_args(["diffro", "--output_dir", str(tmp_path)]))

    # less the 4 that are there; nothing is evaluated anew
    wanted = 3 * len(compare.COMPARISONS["diffro"].runs) - 4
    assert len(commands) == wanted and all(command.startswith("train.py") for command, *_ in commands)
    assert commands[0][1:] == (
        "--seed", "0", "--output_dir", str(tmp_path / "combined_0"), "--resume_from_checkpoint", "true",
    )  # fmt: skip
    header, _, *rows = [line[2:-2].split(" | ") for line in (tmp_path / "diffro.md").read_text().splitlines()]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row[""], row["step"], row["runs"]) for row in table] == [
        ("sft", "0", "1"), ("grpo", "50", "3"), ("diffro", "50", "1"),
    ]  # fmt: skip
    assert [row["WER by pocketsphinx"] for row in table] == ["50.0", "40.0 ± 10.0", "70.0"]
    assert table[1]["token-to-text score"] == "-0.40 ± 0.10" and table[1]["log-F0 spread"] == "–"
    assert table[1]["seconds a step"] == "26.5" and table[0]["seconds a step"] == "–"
    assert (tmp_path / "diffro.png").stat().st_size > 10_000


def test_longer_runs_go_on_from_the_shorter_ones(tmp_path, monkeypatch):
    finish(tmp_path, "grpo_0", 50, 0.3)
    commands = []
    monkeypatch.setattr(compare, "run", lambda log, command, *more: commands.append((log.name, command)))
    flags = compare.COMPARISONS["stability"].runs["grpo"]
    compare.train_run(tmp_path, "grpo", flags, seed=0)
    assert [log for log, _ in commands] == ["grpo_0.log"] and "--max_steps 150" in commands[0][1]


def test_an_evaluation_that_was_stopped_is_made_again(tmp_path, monkeypatch):
    comparison = compare.COMPARISONS["diffro"]

    def stopped(log, command, folder, *more):
        (tmp_path / "evaluations" / "sft.part" / "results.json").write_text('{"rows": []}')
        raise RuntimeError("stopped")

    monkeypatch.setattr(compare, "run", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        compare.evaluate(comparison, tmp_path, "sft", comparison.policy)
    rows = {"rows": [{"temperature": 1.0, "metrics": {"duration_s": 1.0}}]}
    monkeypatch.setattr(
        compare, "run", lambda log, command, folder, *_: Path(folder, "results.json").write_text(json.dumps(rows))
    )
    assert compare.evaluate(comparison, tmp_path, "sft", comparison.policy) == {1.0: {"duration_s": 1.0}}
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["sft"]


def test_a_failed_script_says_where_to_look(tmp_path):
    with pytest.raises(RuntimeError, match=r"train.py failed, .*x.log says why"):
        compare.run(tmp_path / "x.log", "train.py --no_such_flag")
    assert "no_such_flag" in (tmp_path / "x.log").read_text()
