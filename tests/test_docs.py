"""Every command of the README runs as printed; long ones with flags appended that make them short."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

ROOT = Path(__file__).parent.parent
SHORTER = {  # what a command holds: flags that make it short
    "inference.py --task asr .*--dataset": "--dataset sixty.parquet --max_new_tokens 20",
    "select_rl_data.py": "--dataset sixty.parquet",
    "train_token2text.py": "--steps 2 --batch_size 4",
    "train.py": "--max_steps 1 --per_device_train_batch_size 8 --max_completion_length 40",
    "evaluation.py --models": "--texts eight.txt --num_players 2",
    "evaluation.py --task asr": "--clips sixty.parquet",
    "benchmarks/codec.py": "--threads 1 --repeats 1 --rollouts 8 --no-growth",
    "benchmarks/reward.py": "--threads 1 --repeats 1 --rollouts 8",
    "benchmarks/rollout.py": "--threads 1 --repeats 1 --rollouts 8 --codes 40 --no-growth",
    "benchmarks/train_step.py": "--threads 1 --repeats 1 --steps 1 --per_device_train_batch_size 8",
}
NEEDS_THE_HUB = re.compile(r"HKUSTAudio|llasa-grpo-exp1")


def commands() -> list[str]:
    """The indented lines that start with a program, continuation lines joined."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = [re.sub(r"\s+", " ", line.strip()) for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(("python ", "accelerate "))]


def test_the_readme_has_commands():
    assert len([c for c in commands() if not NEEDS_THE_HUB.search(c)]) >= 6
    assert len([c for c in commands() if NEEDS_THE_HUB.search(c)]) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The project as a clone has it, for commands that write into the current folder."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("tiny", "configs", "reward_models", "benchmarks"):
            (folder / path.name).symlink_to(path)
    lines = (ROOT / "tiny/texts/heldout.txt").read_text().splitlines(keepends=True)
    (folder / "eight.txt").write_text("".join(lines[:8]))
    rows = datasets.Dataset.from_parquet(str(ROOT / "tiny/asr/pool.parquet"))
    rows.select([*range(50), *range(len(rows) - 10, len(rows))]).to_parquet(folder / "sixty.parquet")
    return folder


@pytest.mark.parametrize("command", [c for c in commands() if not NEEDS_THE_HUB.search(c)], ids=lambda c: c[:60])
def test_command_runs(command, folder):
    _, *words = shlex.split(command)
    for pattern, flags in SHORTER.items():
        if re.search(rf" {pattern}", command):
            words += shlex.split(flags)
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if NEEDS_THE_HUB.search(c)], ids=lambda c: c[:60])
def test_flags_of_the_real_commands_exist(command):
    """They need the hub's checkpoints; here their flags are parsed."""
    import create_dataset
    import inference
    import train

    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    module = {"create_dataset.py": create_dataset, "inference.py": inference, "train.py": train}[script]
    assert module.parse_args(words[words.index(script) + 1 :])


SCRIPTS = ["create_dataset", "select_rl_data", "train", "inference", "evaluation", "reward_whisper", "train_token2text"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    done = subprocess.run(
        [sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--" in done.stdout
