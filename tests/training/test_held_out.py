"""Held-out rows while training: what is measured, that training does not notice, and that the best model is kept."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from common.cli import InputError
from reward_models.asr_rules import transcript_errors
from speech.codec import SpeechCodec, decode_rollouts
from speech.error_rate import sum_errors
from speech.policy import Policy
from speech.tokens import asr_prompt, tts_prompt
from speech.whisper_scorer import WhisperScorer
from training.held_out import HeldOutEvaluation, whole
from training.rows import load_any_dataset

TINY = "--config configs/tiny.yaml --per_device_train_batch_size 8 --num_generations 4 --sample_steps 0".split()
TEXTS = Path("tiny/texts/heldout.txt").read_text().splitlines()[:4]


@pytest.fixture(scope="module")
def held_out_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("held_out") / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def run(output_dir: Path, *flags: str) -> list[dict]:
    """The log of a short run."""
    train.main(train.parse_args([*TINY, "--output_dir", str(output_dir), *flags]))
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


EVALUATING = "--eval_strategy steps --eval_steps 1 --save_steps 1 --learning_rate 1e-2".split()
SHORT = "--max_steps 3 --max_completion_length 140".split()


@pytest.fixture(scope="module")
def evaluated(held_out_file, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Three steps at a learning rate that ruins the policy, so that the last model is not the best."""
    folder = tmp_path_factory.mktemp("evaluated")
    flags = [*SHORT, *EVALUATING, "--eval_dataset", held_out_file, "--eval_temperature", "0"]
    return folder, run(folder, *flags, "--load_best_model_at_end", "true", "--eval_on_start", "true")


def test_the_wer_is_that_of_greedy_samples(evaluated):
    _, log = evaluated
    policy = Policy.from_pretrained("tiny/llasa")
    prompts = [tts_prompt(text) for text in TEXTS]
    samples = policy.sample(prompts, temperature=0, max_completion_length=140)
    wavs = decode_rollouts(SpeechCodec.from_pretrained("tiny/codec", "cpu"), [sample.codes for sample in samples])
    scores = WhisperScorer("tiny/whisper.pt", "cpu").score(wavs, TEXTS, ["en"] * len(TEXTS))
    at_start = next(entry for entry in log if entry["step"] == 0)
    assert at_start["eval_wer"] == sum(s.edits for s in scores) / sum(s.ref_length for s in scores)
    assert at_start["eval_nll"] == pytest.approx(sum(s.nll for s in scores) / len(scores), rel=1e-4)
    assert at_start["eval_frac_truncated"] == sum(sample.truncated for sample in samples) / len(samples)


def test_the_best_model_is_kept(evaluated):
    folder, log = evaluated
    by_step = {entry["step"]: entry["eval_wer"] for entry in log if "eval_wer" in entry and entry["step"]}
    assert len(by_step) == 3 and by_step[3] > min(by_step.values())
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_metric"] == min(by_step.values())
    best = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best)


def test_the_training_does_not_notice(held_out_file, tmp_path):
    short = ["--max_steps", "2", "--max_completion_length", "20"]
    run(tmp_path / "without", *short, "--learning_rate", "1e-2")
    sampling = [*EVALUATING, "--eval_dataset", held_out_file, "--eval_temperature", "0.8", "--eval_on_start", "true"]
    run(tmp_path / "with", *short, *sampling)
    without, with_ = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    assert all(torch.equal(without[name], with_[name]) for name in without)


def test_asr(tmp_path):
    clips = load_any_dataset("tiny/asr/heldout.parquet").select(range(6))
    clips.to_parquet(tmp_path / "clips.parquet")
    flags = "--max_steps 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --num_generations 4".split()
    flags += ["--config", "configs/tiny_asr.yaml", "--output_dir", str(tmp_path / "run"), "--sample_steps", "0"]
    flags += ["--max_completion_length", "40", "--eval_on_start", "true", "--eval_temperature", "0"]
    train.main(train.parse_args([*flags, "--eval_dataset", str(tmp_path / "clips.parquet")]))
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    policy = Policy.from_pretrained("tiny/llasa_asr", task="asr")
    prompts = [asr_prompt(codes) for codes in clips["audio_codes"]]
    transcripts = policy.transcribe(prompts, temperature=0, max_completion_length=40)
    errors = [transcript_errors(ref, hyp.text, "en") for ref, hyp in zip(clips["text"], transcripts, strict=True)]
    at_start = next(entry for entry in log if entry["step"] == 0)
    assert at_start["eval_wer"] == sum_errors(errors).rate
    assert at_start["eval_frac_truncated"] == sum(t.truncated for t in transcripts) / len(transcripts)


def test_supervised_training_has_a_held_out_loss(tmp_path):
    rows = load_any_dataset("tiny/speech.parquet")
    rows.select(range(16)).to_parquet(tmp_path / "train.parquet")
    rows.select(range(16, 24)).to_parquet(tmp_path / "held_out.parquet")
    flags = ["--config", "configs/tiny_sft.yaml", "--model_name_or_path", "tiny/llasa", "--max_steps", "2"]
    flags += ["--dataset", str(tmp_path / "train.parquet"), "--eval_dataset", str(tmp_path / "held_out.parquet")]
    flags += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--save_strategy", "steps"]
    flags += ["--load_best_model_at_end", "true"]
    train.main(train.parse_args([*flags, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "run")]))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(losses) == 2 and state["best_metric"] == min(losses)


def test_the_shares_of_several_processes_are_one_corpus():
    """2 of 4 and 0 of 1 words wrong are 2 / 5; means weigh by rows; a process without rows has no part."""
    parts = [
        {"count": 2, "edits": 2, "ref_length": 4, "means": {"nll": 1.0, "log_f0_std": math.nan}},
        {"count": 1, "edits": 0, "ref_length": 1, "means": {"nll": 4.0, "log_f0_std": 0.2}},
        {"count": 0, "edits": 0, "ref_length": 0, "means": {}},
    ]
    assert whole(parts) == {"wer": 0.4, "nll": 2.0, "log_f0_std": 0.2}
    assert "wer" not in whole([{"count": 1, "edits": 0, "ref_length": 0, "means": {"duration_s": 1.0}}])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_strategy", "steps"], "--eval_strategy: needs --eval_dataset"),
        (["--eval_dataset", "x.jsonl"], "--eval_dataset: is not used without --eval_strategy"),
        (["--eval_temperature", "nan"], r"--eval_temperature: must be in \[0, inf\) .got nan"),
    ],
)
def test_flags_that_evaluate_nothing(flags, message, caplog):
    with pytest.raises(SystemExit):
        train.parse_args([*TINY, *flags])
    assert re.search(message, caplog.text)


def test_a_metric_that_is_not_measured_is_refused_before_training():
    class Scorer:
        def score_held_out(self, completion_ids, text, language):
            return None, {"duration_s": 0.0, "wer": 1.0, "insertions": 0.0}

    class Args:
        metric_for_best_model = "eval_los"

    evaluation = HeldOutEvaluation(Scorer(), 0.0)
    with pytest.raises(InputError, match="must be one of duration_s, wer, .* .got 'eval_los'"):
        evaluation.check_metric(Args, 7)
    Args.metric_for_best_model = "eval_wer"
    evaluation.check_metric(Args, 7)
