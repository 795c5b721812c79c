"""iterate_preferences.py on a small random policy: rounds by a reward and by a judge, resumed runs, what is refused."""

import doctest
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_judge import FakeJudge
from fake_policy import FirstWordLostASR, ToneCodec, save_policy
from safetensors.torch import load_file

import inference
import iterate_preferences
from common.cli import InputError
from metrics import judges, synthesis
from speech import codec as speech_codec

TEXTS = [json.loads(line)["text"] for line in Path("tiny/texts/train.jsonl").read_text().splitlines()[:8]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.1)


@pytest.fixture
def in_process(monkeypatch) -> list[str]:
    """The scripts that were run; in this process, with stand-ins for codec and ASR."""
    for module in (speech_codec, inference, synthesis):
        monkeypatch.setattr(module, "SpeechCodec", ToneCodec)
    monkeypatch.setattr(synthesis, "WhisperScorer", FirstWordLostASR)
    monkeypatch.setattr(judges, "WhisperScorer", FirstWordLostASR)
    done = []

    def run_process(script: str, flags: list[str]) -> int:
        done.append(script.removesuffix(".py"))
        module = importlib.import_module(done[-1])
        try:
            module.main(module.parse_args(flags))
        except SystemExit as stop:
            return stop.code
        return 0

    monkeypatch.setattr(iterate_preferences, "run_process", run_process)
    return done


class Scripts:
    """Stands in for the scripts: each leaves what the loop reads of it, and notes its flags.

    Attributes:
        runs: script and flags of each.
        fails: exit code of the next.
        stop_after: number of runs after whose work Ctrl-C comes.
    """

    def __init__(self):
        self.runs, self.fails, self.stop_after = [], 0, None

    def __call__(self, script: str, flags: list[str]) -> int:
        self.runs.append((script, flags))
        if self.fails:
            return self.fails
        if script == "sample_preferences.py":
            pairs = Path(flags[flags.index("--output") + 1])
            pairs.parent.mkdir(parents=True, exist_ok=True)
            pairs.write_text("{}\n" * 3)
        elif script == "train.py":
            policy = Path(flags[flags.index("--output_dir") + 1])
            policy.mkdir(parents=True, exist_ok=True)
            step = {"epoch": 1.0, "rewards/accuracies": 0.75, "rewards/margins": 0.5}
            (policy / "trainer_state.json").write_text(json.dumps({"log_history": [step]}))
            if "--use_peft" in flags:
                (policy / "adapter_config.json").write_text("{}")
        if len(self.runs) == self.stop_after:
            raise KeyboardInterrupt
        return 0

    @property
    def names(self) -> list[str]:
        return [script.removesuffix(".py") for script, _ in self.runs]


@pytest.fixture
def scripts(monkeypatch) -> Scripts:
    scripts = Scripts()
    monkeypatch.setattr(iterate_preferences, "run_process", scripts)
    return scripts


@pytest.fixture
def flags(policy, tmp_path) -> list[str]:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "duration.json").write_text('{"duration": {}}')
    (tmp_path / "heldout.txt").write_text("red hats\nbig blue shoes\n")
    train = "--learning_rate 1e-2 --warmup_steps 0 --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
    given = ["--model_name_or_path", policy, "--dataset", str(tmp_path / "texts.jsonl"), "--num_texts", "5"]
    given += ["--train", f"{train} --max_steps 2 --use_cpu true", "--output_dir", str(tmp_path / "run")]
    return given


def by_reward(tmp_path) -> list[str]:
    sample = f"--reward_config {tmp_path}/duration.json --num_samples 4 --max_completion_length 140 --min_margin 0"
    return ["--sample", sample]


def evaluated(tmp_path) -> list[str]:
    return ["--evaluate", f"--texts {tmp_path}/heldout.txt --max_length 150 --seeds 0 --judge other-asr"]


def run(*flags: str) -> dict:
    return iterate_preferences.main(iterate_preferences.parse_args(list(flags)))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_by_a_reward(flags, in_process, policy, tmp_path):
    results = run(*flags, *by_reward(tmp_path), *evaluated(tmp_path), "--seed", "3")
    one_round = ["sample_preferences", "train", "evaluation"]
    assert in_process == ["evaluation", *one_round, *one_round]
    folder = tmp_path / "run"
    assert json.loads((folder / "results.json").read_text()) == results
    starts = [policy, str(folder / "round_1" / "policy")]
    for number, start in enumerate(starts, start=1):
        pairs = json.loads((folder / f"round_{number}" / "pairs.jsonl.run.json").read_text())["run"]
        trained = json.loads((folder / f"round_{number}" / "policy" / "run.json").read_text())
        assert pairs["model_name_or_path"] == trained["model"]["model_name_or_path"] == start
        assert pairs["seed"] == trained["seed"] == 3 + number - 1
        log = json.loads((folder / f"round_{number}" / "policy" / "trainer_state.json").read_text())["log_history"]
        assert log[0]["rewards/margins"] == 0, "the reference is the round's start"
    drawn = [{row["text"] for row in rows_of(folder / f"round_{number}" / "pairs.jsonl")} for number in (1, 2)]
    assert drawn[0] != drawn[1], "each round has texts of its own"
    weights = [load_file(Path(start, "model.safetensors")) for start in [*starts, str(folder / "round_2" / "policy")]]
    for before, after in zip(weights, weights[1:], strict=False):
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    table = (folder / "results.md").read_text().splitlines()[2:]
    assert table[0].startswith("|  | pairs | consistency | planted right | pair accuracy | margin | WER, other-asr |")
    assert [line.split(" | ")[0] for line in table[2:]] == ["| start", "| round_1", "| round_2"]
    assert all("%" in line.split(" | ")[6] for line in table[2:]) and table[2].count("–") == 5


def test_a_round_by_a_judge(flags, in_process, tmp_path):
    def longer(first, second):
        return "C" if len(first) == len(second) else "AB"[len(first) < len(second)]

    with FakeJudge(longer) as judge:
        given = ["--judge", f"--judge_url {judge.url} --judge_model judge --num_planted 0", "--num_texts", "8"]
        results = run(*flags, *given, "--sample", "--max_length 200 --temperature 1.0", "--rounds", "1")
    assert in_process == ["inference", "judge_preferences", "train"]
    folder = tmp_path / "run" / "round_1"
    assert (folder / "texts.txt").read_text().splitlines() == TEXTS
    pairs = rows_of(folder / "pairs.jsonl")
    assert 2 <= len(pairs) <= len(judge.requests) / 2 <= 8
    assert all(len(pair["chosen_codes"]) > len(pair["rejected_codes"]) for pair in pairs)
    assert all((pair["source"], pair["rater"]) == ("machine", "judge") for pair in pairs)
    assert [row.get("consistency") for row in results["rows"]] == [None, 1, None]
    assert "| round_1 | " + f"{len(pairs)} | 100.0 % |" in (tmp_path / "run" / "results.md").read_text()


def test_pairs_of_a_judge_who_hears_nothing_are_not_trained_on(flags, scripts, tmp_path, monkeypatch, caplog):
    judge_facts = iterate_preferences.judge_facts

    def judged(right: int, min_planted: float = 0.8):
        report = {"consistency": 1.0, "planted": 5, "planted_right": right, "cost": None}
        (tmp_path / "pairs.report.json").write_text(json.dumps(report))
        return judge_facts(tmp_path / "pairs.jsonl", min_planted)

    assert judged(4)["planted_right"] == 4 and judged(3, 0.5)["planted_right"] == 3
    with pytest.raises(InputError, match="the judge has 3 of 5 planted pairs right, too few to train on its pairs"):
        judged(3)
    monkeypatch.setattr(iterate_preferences, "judge_facts", lambda pairs, min_planted: judged(3, min_planted))
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--judge", "--judge_url http://127.0.0.1:9/v1 --judge_model judge")
    assert stop.value.code == 2 and "train" not in scripts.names and "has 3 of 5 planted" in caplog.text
    monkeypatch.setattr(iterate_preferences, "training_facts", lambda pairs, policy: {})
    run(*flags, "--judge", "--judge_url http://127.0.0.1:9/v1 --judge_model judge", "--min_planted", "0.6")
    assert scripts.names.count("train") == 2  # the same run goes on


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_resumes_at_its_step(stop_after, flags, scripts):
    """What was noted is not run again; what was interrupted is, by the same command."""
    scripts.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    results = run(*flags)
    steps = ["sample_preferences", "train"] * 2
    assert scripts.names == steps[:stop_after] + steps[stop_after - 1 :]
    assert scripts.runs[stop_after] == scripts.runs[stop_after - 1]
    assert [row["step"] for row in results["rows"]] == [
        f"round_{number}/{made}" for number in (1, 2) for made in ("pairs.jsonl", "policy")
    ]
    assert run(*flags) == results and len(scripts.runs) == 5, "nothing left to do"


def test_a_training_interrupted_as_it_ended_has_the_same_weights(flags, in_process, tmp_path):
    """At two of three steps of an epoch, the last of which has a checkpoint."""
    run(*flags, *by_reward(tmp_path), "--rounds", "1")
    policy = tmp_path / "run" / "round_1" / "policy"
    weights = (policy / "model.safetensors").read_bytes()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    results["rows"].pop()  # all is there, but not noted
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    run(*flags, *by_reward(tmp_path), "--rounds", "1")
    assert in_process == ["sample_preferences", "train", "train"]
    assert (policy / "model.safetensors").read_bytes() == weights
    assert json.loads((policy / "trainer_state.json").read_text())["global_step"] == 2


def test_more_rounds_and_other_settings(flags, scripts, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(*flags, "--rounds", "1")
    run(*flags, "--rounds", "2")
    assert scripts.names == ["sample_preferences", "train"] * 2 and "round_1/policy: done before" in caplog.text
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--num_texts", "4")
    assert stop.value.code == 2 and "a run with other num_texts (5, now 4)" in caplog.text
    run(*flags, "--num_texts", "4", "--rounds", "1", "--overwrite")
    assert len(scripts.runs) == 6 and not (tmp_path / "run" / "round_2").exists()


def test_an_interrupted_run_that_overwrites_resumes_by_the_same_command(flags, scripts, tmp_path):
    run(*flags, "--rounds", "1")
    overwriting = [*flags, "--num_texts", "4", "--rounds", "1", "--overwrite"]
    for stop_after in (3, 5):  # during its first step, and its second
        scripts.stop_after = stop_after
        with pytest.raises(KeyboardInterrupt):
            run(*overwriting)
        assert (tmp_path / "run" / "round_1" / "policy").exists() == (stop_after == 5), "the other run's is gone"
        (tmp_path / "run" / "round_1" / f"made before the end of run {stop_after}").touch()
    run(*overwriting)
    assert scripts.names[2:] == ["sample_preferences"] * 2 + ["train"] * 2
    assert len(list((tmp_path / "run" / "round_1").glob("made before*"))) == 2


def test_a_step_that_fails_ends_the_run_with_its_code(flags, scripts, caplog):
    scripts.fails = 1
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 1 and scripts.names == ["sample_preferences"]
    assert "round_1/pairs.jsonl: sample_preferences.py ended with exit code 1, see above" in caplog.text
    scripts.fails = -9
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 1 and "sample_preferences.py was killed" in caplog.text


def test_an_adapter_is_trained_further(flags, scripts):
    run(*flags, "--train", "--use_peft true --lora_r 2")
    (_, first), (_, second) = (each for each in scripts.runs if each[0] == "train.py")
    assert first[-4:] == ["--use_peft", "true", "--lora_r", "2"] and second[-2:] == ["--use_peft", "false"]


def test_the_scripts_are_run_as_processes(capfd):
    assert iterate_preferences.run_process("judge_preferences.py", ["--nonsense"]) == 2
    assert "judge_preferences.py: error:" in capfd.readouterr().err


def test_sigterm_ends_the_script_too(tmp_path):
    """A cluster, or `timeout`, sends it to the loop alone."""
    script, started = tmp_path / "script.py", tmp_path / "pid"
    script.write_text("import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)")
    code = "import sys, iterate_preferences; iterate_preferences.run_process(sys.argv[1], sys.argv[2:])"
    loop = subprocess.Popen([sys.executable, "-c", code, str(script), str(started)])
    deadline = time.time() + 120
    while not (started.exists() and started.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    try:
        assert started.exists()
        loop.terminate()
        assert loop.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(started.read_text()), signal.SIGKILL)
    finally:
        loop.kill()


@pytest.mark.parametrize(("own", "seen"), [(None, "0"), ("3,4", "3")])
def test_training_sees_one_gpu(own, seen, monkeypatch):
    """TRL refuses several without accelerate launch, after hours of sampling."""
    if own is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    given = {}
    ended = SimpleNamespace(returncode=0)
    monkeypatch.setattr("subprocess.run", lambda command, env: given.update({Path(command[1]).name: env}) or ended)
    for script in ("train.py", "inference.py"):
        assert iterate_preferences.run_process(script, []) == 0
    assert given["train.py"]["CUDA_VISIBLE_DEVICES"] == seen
    assert given["inference.py"].get("CUDA_VISIBLE_DEVICES") == own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--train", "--learning_rte 1"], "--train: train.py does not take these flags"),
        (["--sample", "--see 4"], "--sample: sample_preferences.py does not take these flags"),
        (["--train", "--seed=4"], "--train: the loop sets --seed of train.py itself"),
        (["--sample", "--num_texts 4"], "--sample: the loop sets --num_texts of sample_preferences.py itself"),
        (["--sample", "'--top_p 1"], "--sample: No closing quotation"),
        (["--sample", "--temperature 0"], "--temperature: must be above 0"),
        (["--judge", "--judge_url http://host/v1"], "--judge: judge_preferences.py does not take these flags"),
        (["--judge", "--judge_url host --judge_model x"], "--judge_url: must begin with http"),
        (["--evaluate", "--seeds 0"], "--task tts needs --texts"),
        (["--rounds", "0"], "--rounds: must be >= 1"),
        (["--seed", "4294967295"], "--seed: must be in"),
        (["--judge", "--judge_url http://host/v1 --judge_model x", "--dataset", "no.jsonl"], "no.jsonl: no such"),
    ],
)
def test_bad_input(given, message, flags, scripts, caplog):
    with pytest.raises(SystemExit) as stop:
        run(*flags, *given)
    assert stop.value.code == 2 and message in caplog.text and not scripts.runs


def test_voice_prompts_are_not_for_a_judge(flags, scripts, tmp_path, caplog):
    (tmp_path / "voices.jsonl").write_text('{"text": "Go.", "ref_text": "Hm.", "ref_codes": [1, 2]}\n')
    with pytest.raises(SystemExit):
        judge = ["--judge", "--judge_url http://host/v1 --judge_model x"]
        run(*flags, *judge, "--dataset", str(tmp_path / "voices.jsonl"))
    assert "voices.jsonl: has voice prompts, which --judge does not take" in caplog.text and not scripts.runs


def test_a_training_that_logged_nothing_has_no_accuracy():
    assert iterate_preferences.last_epoch([{"epoch": 1.0, "train_runtime": 1}]) == {}


def test_worked_examples():
    assert doctest.testmod(iterate_preferences) == (0, 3)
