"""tiny/compare.py: its commands' flags exist, runs are kept or resumed, and the table has the evaluations' numbers."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

import evaluation
import inference
import select_rl_data
import train
from metrics import recognition, report
from metrics.clip_measures import SynthesizedSpeech, measure_clips
from metrics.texts import Item
from speech.policy import Sample, Transcript
from speech.text_marks import plain_text
from speech.whisper_scorer import Score, WhisperScorer
from speech.word_times import Word
from tiny import compare


@pytest.mark.parametrize("name", compare.COMPARISONS)
def test_flags_exist(name, tmp_path):
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


class FakeASR(WhisperScorer):
    def __init__(self):
        pass

    def score(self, wavs, texts, languages, word_times=False):
        words = [[Word(w, 0.05 * i, 0.05 * (i + 1)) for i, w in enumerate(plain_text(t).split())] for t in texts]
        return [Score("Anna found two.", 0.25, 0.5, 1, 4, words=tuple(of_text)) for of_text in words]


def tts_metrics() -> dict:
    """What evaluation.py measures of one rollout."""
    heard_by = ("tiny/whisper.pt", "faster-whisper:build/whisper-base")
    wav = np.sin(np.arange(3_200) / 10).astype(np.float32)
    texts = ("Anna found two boxes.", "Did Anna find two boxes?", "Anna *found* two boxes.")
    speech = SynthesizedSpeech([Sample([1] * 10, truncated=True)] * 3, [wav] * 3)
    items = [Item(str(number), text, "en") for number, text in enumerate(texts)]
    clips = measure_clips({name: FakeASR() for name in heard_by}, items, speech, seed=0)
    row = {"name": "model", "seeds": [0], "compute_s": 1.0, "clips": clips}
    return report.summarize(row, first=row)


def asr_metrics() -> dict:
    """What `evaluation.py --task asr` measures of a short clip, a long one, and one without speech."""
    clips = [("short", 100, "Anna found boxes."), ("long", 200, "Anna found boxes."), ("non-speech", 100, "")]
    entries = []
    for name, num_codes, text in clips:
        clip = recognition.RecognitionClip(name, [0] * num_codes, text, "en", ["Anna"])
        entries.append(recognition.transcript_entry(clip, Transcript("Anna found books.", False), seed=0))
    row = {"name": "model", "seeds": [0], "clips": entries}
    return recognition.summarize(row, first=row, long_s=3)


@pytest.mark.parametrize("name", compare.COMPARISONS)
def test_every_column_is_in_the_evaluation(name):
    comparison = compare.COMPARISONS[name]
    metrics = asr_metrics() if name == "recognition" else tts_metrics()
    values = {column: metric({0.0: metrics, 1.0: metrics}) for column, metric in comparison.metrics.items()}
    expected = {"all: WER": 100 / 3, "long: del": 0.0, "keyword recall": 100.0, "hallucinations on non-speech": 100.0}
    if name != "recognition":
        expected = {"WER, held-out ASR": 25.0, "WER, reward ASR": 25.0, "duration, s": 0.2}
        expected |= {"emphasis": 0.0, "questions that rise": 0.0} if name == "melody" else {"truncated": 100.0}
    assert {column: values[column] for column in expected} == pytest.approx(expected)


def finish(folder, name, step, wer):
    """What train.py and evaluation.py would leave."""
    (folder / name / f"checkpoint-{step}").mkdir(parents=True)
    history = [{"step": i + 1, "step_time": 2.0 + i} for i in range(step)] + [{"step": step, "train_runtime": 9.0}]
    (folder / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    write_evaluation(folder, f"{name}@{step}", wer)


def write_evaluation(folder, name, wer):
    metrics = {
        "asr": {asr: {"error_rate": wer} for asr in ("tiny/whisper.pt", "faster-whisper:build/whisper-base")},
        "token2text": -wer, "duration_s": 1.5, "log_f0_std": None, "truncated": 0.25,
    }  # fmt: skip
    path = folder / "evaluations" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": [{"temperature": 1.0, "metrics": metrics}]}))


def test_table_and_plot_of_what_is_there(tmp_path, monkeypatch):
    for seed, wer in enumerate((0.3, 0.4, 0.5)):
        finish(tmp_path, f"grpo_{seed}", 75, wer)
    finish(tmp_path, "diffro_0", 75, 0.7)
    write_evaluation(tmp_path, "sft", 0.5)
    commands = []
    monkeypatch.setattr(compare, "run", lambda log, command, *more: commands.append((command, *more)))
    compare.main(compare.parse_args(["diffro", "--output_dir", str(tmp_path)]))

    # All runs are trained but the 4 that are complete; no evaluation is repeated.
    missing = 3 * len(compare.COMPARISONS["diffro"].runs) - 4
    assert len(commands) == missing and all(command.startswith("train.py") for command, *_ in commands)
    assert commands[0][1:] == (
        "--seed", "0", "--output_dir", str(tmp_path / "combined_0"), "--resume_from_checkpoint", "true",
    )  # fmt: skip
    header, _, *rows = [line[2:-2].split(" | ") for line in (tmp_path / "diffro.md").read_text().splitlines()]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["run"], row["step"], row["seeds"]) for row in table] == [
        ("sft", "0", "1"), ("grpo", "75", "3"), ("diffro", "75", "1"),
    ]  # fmt: skip
    assert [row["WER, held-out ASR, %"] for row in table] == ["50.0", "40.0 ± 10.0", "70.0"]
    assert table[1]["token-to-text score"] == "-0.40 ± 0.10" and table[1]["log-F0 std"] == "–"
    assert table[1]["s/step"] == "39.0" and table[0]["s/step"] == "–"
    assert (tmp_path / "diffro.png").stat().st_size > 10_000


def test_into_a_folder_that_is_not_there(tmp_path, monkeypatch):
    class Started(Exception):
        pass

    def start(log, *_):
        log.touch()
        raise Started

    monkeypatch.setattr(compare, "run", start)
    for name, log in (("recognition", "data.log"), ("diffro", "grpo_0.log")):
        with pytest.raises(Started):
            compare.main(compare.parse_args([name, "--output_dir", str(tmp_path / name), "--seeds", "0"]))
        assert (tmp_path / name / log).exists()


def test_longer_runs_resume_from_shorter_ones(tmp_path, monkeypatch):
    finish(tmp_path, "grpo_0", 75, 0.3)
    commands = []
    monkeypatch.setattr(compare, "run", lambda log, command, *more: commands.append((log.name, command)))
    flags = compare.COMPARISONS["stability"].runs["grpo"]
    compare.train_run(tmp_path, "grpo", flags, seed=0)
    assert [log for log, _ in commands] == ["grpo_0.log"] and "--max_steps 225" in commands[0][1]


def test_an_interrupted_evaluation_is_repeated(tmp_path, monkeypatch):
    comparison = compare.COMPARISONS["diffro"]

    def interrupted(log, command, folder, *more):
        (tmp_path / "evaluations" / "sft.part" / "results.json").write_text('{"rows": []}')
        raise RuntimeError("interrupted")

    monkeypatch.setattr(compare, "run", interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        compare.evaluate(comparison, tmp_path, "sft", comparison.policy)
    rows = {"rows": [{"temperature": 1.0, "metrics": {"duration_s": 1.0}}]}
    monkeypatch.setattr(
        compare, "run", lambda log, command, folder, *_: Path(folder, "results.json").write_text(json.dumps(rows))
    )
    assert compare.evaluate(comparison, tmp_path, "sft", comparison.policy) == {1.0: {"duration_s": 1.0}}
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["sft"]


def test_the_error_of_a_failed_script_names_its_log(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys; sys.exit(f'unknown flag {sys.argv[1]}')")
    with pytest.raises(RuntimeError, match=r"train.py: failed. See .*x.log"):
        compare.run(tmp_path / "x.log", f"{script} --no_such_flag")
    assert (tmp_path / "x.log").read_text() == "unknown flag --no_such_flag\n"
