"""benchmarks/readiness.py: the whole chain on small stand-ins of the published checkpoints, and what falls short."""

import json
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_codec import build_native
from fake_whisper import save_random_whisper

from benchmarks import readiness
from speech.codec import SpeechCodec
from training.grpo_trainer import SpeechGRPOTrainer

SHORT = ["--steps", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
SHORT += ["--num_generations", "4", "--max_completion_length", "20"]
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def few_lengths(monkeypatch):
    """All 256 take 11 s on a CPU."""
    monkeypatch.setattr(readiness, "ATTENTION_LENGTHS", 3)


def run(output_dir, *flags) -> dict:
    readiness.main(readiness.parse_args([*SHORT, "--output_dir", str(output_dir), *flags]))
    [results] = output_dir.glob("readiness_*.json")
    return json.loads(results.read_text())


def small_models(device, seed, whisper_path):
    save_random_whisper(whisper_path, n_vocab=51_866)
    return SpeechCodec(build_native(seed, quantization_levels=[4] * 8))


def test_the_chain_on_the_published_layout(tmp_path, monkeypatch, capsys):
    """As --size real goes, with its own tokenizer, but narrow."""
    monkeypatch.setattr(readiness, "save_llasa", partial(readiness.save_llasa, **SIZES, **HEADS))
    monkeypatch.setattr(readiness, "random_models", small_models)
    monkeypatch.setattr(readiness, "BUILT_BYTES", 0)  # the full sizes need more disk than these
    results = run(tmp_path, "--size", "real", "--offload_rewards", "false", "--learning_rate", "1e-4")
    checks = {check["name"]: check for check in results["checks"]}
    attention = ["attention, heads of 48", "attention, heads of 64"]
    assert list(checks) == ["finite", "gradient", "number format", "log-probs", "memory", *attention, "speech"]
    assert checks.pop("memory")["passed"] is None, "there is no GPU here"
    assert all(check["passed"] for check in checks.values()), checks
    phases = results["seconds"]
    assert all(phases[name] > 0 for name in ("sampling", "codec", "Whisper", "loss"))
    assert sum(phases.values()) < 2 * phases["step"] + 1e-6, "the phases are parts of the step"
    assert results["memory_estimate"]["peak"] > 0
    sampling = results["sampling"]
    assert 1 <= sampling["calls"] <= 20 and sampling["codes"] <= 4 * sampling["calls"]
    assert sampling["seconds"] == pytest.approx(phases["sampling"])
    out = capsys.readouterr().out
    assert "| memory | " in out and "codes a second" in out


def test_sampling_beside_what_memory_allows():
    rate = readiness.RolloutRate(codes=64 * 500, calls=1000, call_bytes=3_000_000_000, bandwidth=3e12, seconds=20)
    assert rate.line() == (
        "sampling: 1,600 codes a second, 20.0 ms a code of all rollouts; "
        "reading 3.00 GB for each at 3.00 TB/s would take 1.0 ms, 5.0%"
    )


def test_the_first_of_several_steps_is_not_timed():
    seconds = Counter(step=60.0)
    clock = readiness.ForgetFirstStep(seconds)
    clock.on_step_end(None, SimpleNamespace(global_step=1, max_steps=1), None)
    assert seconds["step"] == 60 and readiness.timed_steps(1) == 1
    clock.on_step_end(None, SimpleNamespace(global_step=1, max_steps=3), None)
    assert not seconds
    seconds["step"] += 20
    clock.on_step_end(None, SimpleNamespace(global_step=2, max_steps=3), None)
    assert seconds["step"] == 20 and readiness.timed_steps(3) == 2


def test_a_disagreement_ends_it_with_1(tmp_path, monkeypatch, capsys):
    score = SpeechGRPOTrainer._get_per_token_logps_and_entropies

    def off_by_a_little(*args, **kwargs):
        log_probs, *others = score(*args, **kwargs)
        return log_probs - 0.05, *others

    monkeypatch.setattr(SpeechGRPOTrainer, "_get_per_token_logps_and_entropies", off_by_a_little)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--size", "tiny")
    assert stop.value.code == 1
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| log-probs")]
    assert row.endswith("| FALLS SHORT |")
    assert 0.03 < float(row.split("|")[3].split()[0]) < 0.07


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_number_that_is_not_finite(value):
    entry = {"reward": 0.1, "grad_norm": 1.0, "step": 1, "log_f0_std": None}
    finite, gradient = readiness.check_log([entry, entry | {"step": 2, "kl": value}, {"train_runtime": 1.0}])
    assert not finite.passed and finite.measured == "6 of 7, not kl at step 2"
    assert gradient.passed
    finite, gradient = readiness.check_log([entry | {"grad_norm": 0.0}])
    assert finite.passed and not gradient.passed
    assert not any(check.passed for check in readiness.check_log([])), "no step was logged"


def test_flags_of_the_run_that_is_planned(tmp_path):
    """A sampling temperature is in both log-probs; of LoRA the adapter is saved, loaded and synthesizes."""
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear", "--learning_rate", "1e-3"]
    results = run(tmp_path, "--size", "tiny", "--temperature", "0.6", "--max_completion_length", "140", *lora)
    checks = {check["name"]: check["passed"] for check in results["checks"]}
    assert checks.pop("memory") is None and all(checks.values()), results["checks"]


def test_with_vllm_the_log_probs_are_those_of_its_last_step():
    steps = [{"reward": 0.1, "sampling/sampling_logp_difference/mean": value} for value in (0.3, 0.004)]
    trainer = SimpleNamespace(use_vllm=True, state=SimpleNamespace(log_history=[*steps, {"train_runtime": 1.0}]))
    assert readiness.compare_log_probs(trainer, ["Anna."]) == readiness.LogProbs(0.004)


@pytest.mark.parametrize(("processes", "gpus"), [("8", 8), ("1", 8), ("2", 1)])
def test_several_gpus_are_refused_before_anything_is_built(processes, gpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(readiness, "measure", None)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--size", "real")
    assert stop.value.code == 2 and "CUDA_VISIBLE_DEVICES=0 python" in caplog.text


def test_what_else_falls_short():
    def log_probs(*values: float) -> bool:
        return readiness.check_log_probs(readiness.LogProbs(*values)).passed

    assert log_probs(0.02) and log_probs(0.02, 0.5) and not log_probs(0.021, 0.5) and not log_probs(math.nan)
    # The logits of a trained policy spread further, and bfloat16 rounds them more coarsely
    assert log_probs(0.05, 2.5) and not log_probs(0.051, 2.5)
    gib = readiness.memory.GIB
    assert readiness.check_memory(30 * gib, 34 * gib).passed and not readiness.check_memory(30 * gib, 35 * gib).passed
    assert not readiness.check_memory(30 * gib, 25 * gib).passed and readiness.check_memory(gib, None).passed is None
    assert readiness.check_number_format({torch.bfloat16}).passed
    assert not readiness.check_number_format({torch.float32, torch.bfloat16}).passed
    assert not readiness.check_number_format(set()).passed
    broken = readiness.attention_row("", {64: ["query gradient"], 192: ["query gradient"]})
    assert not broken.passed and broken.measured.endswith("lengths, not 64, 192 (query gradient)")
    assert readiness.attention_row("attention", {}).passed
    clip = np.zeros(320, np.float32)
    assert readiness.check_speech([clip]).passed and not readiness.check_speech([]).passed
    assert not readiness.check_speech([clip, clip[:0]]).passed and not readiness.check_speech([clip * np.nan]).passed


def test_a_kernel_that_is_broken_at_some_lengths_is_found(monkeypatch):
    """In its backward, as cuDNN's in pytorch/pytorch#196678, and in its forward without a gradient."""
    attention = readiness.scaled_dot_product_attention

    def broken(query, *args, **kwargs):
        length = query.shape[2]
        if length % 128 == 64 and query.requires_grad and torch.is_grad_enabled():
            query.register_hook(lambda gradient: gradient * math.nan)
        return attention(query, *args, **kwargs) * (math.nan if length == 7 and not torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(readiness, "ATTENTION_LENGTHS", 256)
    assert readiness.broken_lengths(torch.device("cpu"), 16) == {}
    monkeypatch.setattr(readiness, "scaled_dot_product_attention", broken)
    expected = {7: ["output without gradients"], 64: ["query gradient"], 192: ["query gradient"]}
    assert readiness.broken_lengths(torch.device("cpu"), 16) == expected


def test_a_full_disk_is_known_before_anything_is_built(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(readiness, "BUILT_BYTES", 1e18)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--size", "real", "--checkpoints", str(tmp_path))
    assert stop.value.code == 2 and "Use --checkpoints with another folder" in caplog.text
