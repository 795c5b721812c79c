"""Every command of README.md and docs/*.md runs as printed; long ones with flags appended that make them short."""

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORTER = {  # what a command holds: flags that make it short
    "inference.py --task asr .*--dataset": "--dataset sixty.parquet --max_completion_length 20",
    "inference.py (?!--task asr).*--num_samples": "--text_file eight.txt",
    "select_rl_data.py": "--dataset sixty.parquet",
    "make_preferences.py": "--num_recordings 6",
    "train_preference_model.py": "--steps 2 --batch_size 4 --hidden_size 16",
    "train_token2text.py": "--steps 2 --batch_size 4",
    "sample_preferences.py": "--num_texts 4 --max_completion_length 140 --min_margin 0 --batch_size 8",
    "iterate_preferences.py": "--num_texts 4 --rounds 1 --sample '--max_completion_length 140 --min_margin 0' --train "
    "'--max_steps 1' --evaluate '--texts eight.txt --max_length 240 --seeds 0 --judge pocketsphinx'",
    "train.py .*--method dpo": "--max_steps 1 --per_device_train_batch_size 2",
    "train.py (?!.*(sft|--method dpo))": "--max_steps 1 --per_device_train_batch_size 8 --max_completion_length 40",
    "train.py .*tiny_sft": "--max_steps 1 --per_device_train_batch_size 8 --dataset speech.parquet",
    "evaluation.py --models": "--texts eight.txt --references eight.jsonl --num_players 2",
    "evaluation.py --models .*--adapters": "--max_length 240",
    "evaluation.py --task asr": "--clips sixty.parquet",
    "benchmarks/codec.py": "--threads 1 --repeats 1 --rollouts 8 --no-growth",
    "benchmarks/reward.py": "--threads 1 --repeats 1 --rollouts 8",
    "benchmarks/rollout.py": "--threads 1 --repeats 1 --rollouts 8 --codes 40 --no-growth",
    "benchmarks/train_step.py": "--threads 1 --repeats 1 --steps 1 --per_device_train_batch_size 8",
    "benchmarks/readiness.py": "--steps 2",
    "benchmarks/gradient_noise.py": "--batches 2 --draws 1",
}
NEEDS_THE_HUB = re.compile(r"HKUSTAudio|llasa-grpo-exp1|llasa-asr |--dataset (tokenized_dataset|your_)")
NEEDS_PEOPLE = re.compile(r"collect_preferences.py --read")
NEEDS_A_JUDGE = re.compile(r"--judge_url")
NEEDS_HOURS = re.compile(r"-m tiny\.|--size real|accelerate launch --|torchrun|vllm")
PROGRAMS = ("python ", "accelerate ")


def commands_of(page: Path) -> list[str]:
    """The lines of ```bash fences that start a program of the project, continuation lines joined, comments dropped."""
    fences = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(fences).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in lines]
    return [line for line in lines if line.startswith(PROGRAMS)]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
TOO_LONG = (NEEDS_THE_HUB, NEEDS_HOURS, NEEDS_PEOPLE, NEEDS_A_JUDGE)
PARSED = [command for command in COMMANDS if any(reason.search(command) for reason in TOO_LONG)]
RUN = [command for command in COMMANDS if command not in PARSED]


def test_the_pages_have_commands():
    assert len(PAGES) >= 8
    assert len(RUN) >= 15
    assert len([command for command in commands_of(ROOT / "README.md") if NEEDS_THE_HUB.search(command)]) == 3


def test_no_command_hides_outside_a_fence():
    for page in PAGES:
        outside = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        hidden = [line for line in outside.splitlines() if line.strip().startswith(PROGRAMS)]
        assert not hidden, f"{page.name}: {hidden}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The project as a clone has it, for commands that write into the current folder."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or (path.is_dir() and not path.name.startswith(".") and path.name not in ("runs",)):
            (folder / path.name).symlink_to(path)
    lines = (ROOT / "tiny/texts/heldout.txt").read_text().splitlines(keepends=True)
    (folder / "eight.txt").write_text("".join(lines[:8]))
    readings = (ROOT / "tiny/heldout/metadata.jsonl").read_text().splitlines()[:8]
    readings = [json.loads(line) for line in readings]
    for reading in readings:
        reading["audio"] = str(ROOT / "tiny/heldout" / reading.pop("file_name"))
    (folder / "eight.jsonl").write_text("".join(json.dumps(reading) + "\n" for reading in readings))
    for name, source in (("sixty", "tiny/asr/pool.parquet"), ("speech", "tiny/speech.parquet")):
        rows = datasets.Dataset.from_parquet(str(ROOT / source))
        rows.select(range(0, len(rows), len(rows) // 60)).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:70])
def test_command_runs(command, clone, monkeypatch):
    """In this process: importing torch for each would take longer than what most of them do."""
    _, *words = shlex.split(command)
    for pattern, flags in SHORTER.items():
        if re.search(rf"\b{pattern}", command):
            words += shlex.split(flags)
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize("command", PARSED, ids=lambda command: command[:70])
def test_flags_of_commands_too_long_to_run_exist(command, monkeypatch):
    monkeypatch.setattr("training.recipes.check_machine", lambda *_: None)  # vLLM need not be installed here
    words = shlex.split(command)
    if words[0] == "accelerate":
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or load_config_from_file(launch.config_file)
    if "-m" in words:
        module, first = words[words.index("-m") + 1], words.index("-m") + 2
    else:
        first = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words)) + 1
        module = words[first - 1].removesuffix(".py").replace("/", ".") if first <= len(words) else None
    if module is None or module == "vllm":
        pytest.skip("a command of another program")
    assert importlib.import_module(module).parse_args(words[first:])


def test_the_example_of_a_reward_of_ones_own():
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(import numpy.*?)^```", page, re.DOTALL | re.MULTILINE)[1], names)
    rollouts = SimpleNamespace(wavs=[np.full(80, 0.05), np.full(80, -0.3), np.zeros(0)], failures=[None, None, "empty"])
    reward = names["LoudnessReward"](SimpleNamespace(score=lambda *_: rollouts))
    assert reward([[1]] * 3, ["Go."] * 3) == pytest.approx([0.5, 1.0, 0.0])


def test_the_example_of_scoring_from_python(capsys):
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(from reward_whisper.*?)^```", page, re.DOTALL | re.MULTILINE)[1], {})
    assert capsys.readouterr().out.startswith("My teacher carried eleven hammers. 0.0 ")


SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args(["--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out


def test_every_relative_link_leads_somewhere():
    for page in [*PAGES, ROOT / "RESULTS.md", *sorted((ROOT / "docs/experiments").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://")):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
