"""train.py on the toy setup: it learns, it resumes exactly, and bad input is refused before anything long."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from common.run_record import content_digest
from speech.policy import Policy
from speech.tokens import asr_prompt, tts_prompt
from tiny.llasa import new_model, new_tokenizer
from training import models
from training.grpo_trainer import SpeechGRPOTrainer

SHORT = [
    "--config",
    "configs/tiny.yaml",
    "--max_steps",
    "3",
    "--per_device_train_batch_size",
    "8",
    "--num_generations",
    "4",
    "--max_completion_length",
    "24",
    "--sample_steps",
    "0",
]


def run(*flags: str) -> None:
    train.main(train.parse_args([*SHORT, *flags]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def refused(capsys, caplog, *flags: str) -> str:
    """The one line that bad input gets."""
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2
    return caplog.text + capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    # 140 codes: some rollouts end, so that rewards differ
    run("--output_dir", str(folder), "--max_completion_length", "140", "--sample_steps", "2", "--beta", "0.1")
    return folder


def test_every_parameter_moves(trained):
    before = {name: p.detach() for name, p in Policy.from_pretrained("tiny/llasa").model.named_parameters()}
    after = weights(trained)
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert unmoved == []


def test_what_is_logged(trained):
    log = [
        entry for entry in json.loads((trained / "trainer_state.json").read_text())["log_history"] if "reward" in entry
    ]
    assert len(log) == 3
    expected = {
        "rewards/whisper/mean",
        "rewards/whisper/std",
        "r_wer/mean",
        "r_wer/group_std",
        "r_nll/mean",
        "wer",
        "nll",
        "duration_s",
        "frac_truncated",
        "frac_empty",
        "frac_silent",
        "frac_repetitive",
        "entropy",
        "kl",
    }
    for entry in log:
        assert expected <= entry.keys()
        assert entry["reward_std"] > 0
    # The reference is confined to speech as the policy is: where they are one model their KL is 0.
    assert abs(log[0]["kl"]) < 1e-6


def test_what_a_run_leaves(trained):
    run_json = json.loads((trained / "run.json").read_text())
    assert run_json["codec_id"] == "tiny/codec" and run_json["whisper"] == "tiny/whisper.pt"
    assert run_json["reward"]["whisper"]["alpha_wer"] == 3.0
    assert {"argv", "git_commit", "packages", "hardware", "seed", "recipe"} <= run_json.keys()
    assert (trained / "reward_curve.png").stat().st_size > 5_000
    samples = trained / "samples" / "step_000002"
    lines = [json.loads(line) for line in (samples / "transcripts.jsonl").read_text().splitlines()]
    assert {"text", "transcript", "wer", "nll"} <= lines[0].keys()
    assert list(samples.glob("*.wav"))
    modes = {path.stat().st_mode for path in trained.iterdir() if path.is_file()}
    assert len(modes) == 1, "weights are as readable as the other files"


def test_inference_loads_it_with_nothing_more_said(trained, tmp_path):
    output = tmp_path / "sample.wav"
    command = [
        sys.executable,
        "inference.py",
        "--model_name_or_path",
        str(trained),
        "--text",
        "Anna found two boxes.",
        "--output",
        str(output),
        "--max_length",
        "200",
    ]
    assert subprocess.run(command, check=False).returncode == 0
    assert output.stat().st_size > 1_000


def test_kill_and_resume_equals_an_uninterrupted_run(tmp_path):
    """SIGKILL after a checkpoint, then --resume_from_checkpoint true: the same weights to the last bit.

    8 prompts, 2 a step, 7 steps: the run is in its second epoch when it is killed.
    """
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(Path("tiny/texts/train.jsonl").read_text().splitlines(keepends=True)[:8]))
    flags = [
        *SHORT,
        "--dataset",
        str(texts),
        "--max_steps",
        "7",
        "--save_steps",
        "1",
        "--save_strategy",
        "steps",
        "--max_completion_length",
        "140",
        "--learning_rate",
        "1e-3",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main(train.parse_args([*flags, "--output_dir", str(whole)]))

    command = [sys.executable, "train.py", *flags, "--output_dir", str(killed), "--resume_from_checkpoint", "true"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not (killed / "checkpoint-5").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists(), "it was to be killed before its end"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    a, b = weights(whole), weights(killed)
    assert a.keys() == b.keys()
    start = weights(Path("tiny/llasa"))
    assert all(not torch.equal(a[name], start[name].float()) for name in a), "it was to learn something"
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_another_policys_checkpoint_is_refused(tmp_path, capsys, caplog):
    checkpoint, tokenizer = tmp_path / "checkpoint-1", new_tokenizer(["Anna found two boxes."], num_codes=64)
    new_model(tokenizer, seed=0).save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    torch.save({}, checkpoint / "optimizer.pt")
    message = refused(capsys, caplog, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "true")
    assert (
        f"{checkpoint}: is of another model: model.embed_tokens.weight has shape [{len(tokenizer)}, 192] there"
        in message
    )
    assert not (tmp_path / "run.json").exists()


def test_lora(tmp_path):
    run("--output_dir", str(tmp_path), "--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--max_steps", "1")
    policy = Policy.from_pretrained(str(tmp_path))
    assert policy.sample([tts_prompt("Anna found two boxes.")], max_length=120)[0].codes


DIFFRO = (
    "--token2text",
    "tiny/token2text",
    "--credit",
    "rollout",
    "--max_steps",
    "1",
    "--max_completion_length",
    "140",
)


def logged(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"][0]


def test_diffro_alone_needs_neither_codec_nor_whisper(tmp_path, monkeypatch, caplog):
    for name in ("SpeechCodec", "WhisperScorer"):
        monkeypatch.setattr(models, name, None)
    rewards = ("--reward_config", "reward_models/token2text.json")
    run("--method", "diffro", *DIFFRO, *rewards, "--output_dir", str(tmp_path))
    entry = logged(tmp_path)
    assert entry["diffro_frac_kept"] > 0 and entry["diffro_reward"] < 0 and entry["grad_norm"] > 0
    assert "text_log_prob" in entry and "wer" not in entry
    assert "nothing holds the policy" in caplog.text  # configs/tiny.yaml has --beta 0


def test_grpo_and_diffro_together(tmp_path):
    run("--method", "grpo+diffro", "--diffro_filter", "positive", *DIFFRO, "--output_dir", str(tmp_path))
    entry = logged(tmp_path)
    assert 0 < entry["diffro_frac_kept"] < 1 and {"wer", "text_log_prob", "diffro_reward"} <= entry.keys()


def test_sft_trains_on_speech_alone(tmp_path):
    train.main(
        train.parse_args(
            [
                "--config",
                "configs/tiny_sft.yaml",
                "--model_name_or_path",
                "tiny/llasa",
                "--output_dir",
                str(tmp_path),
                "--max_steps",
                "2",
                "--per_device_train_batch_size",
                "2",
            ]
        )
    )
    assert (tmp_path / "run.json").exists()


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(tmp_path):
    """Resumed within an epoch, transformers would take one before it looks at --max_steps."""
    flags = ["--config", "configs/tiny_sft.yaml", "--model_name_or_path", "tiny/llasa", "--output_dir", str(tmp_path)]
    flags += "--max_steps 2 --per_device_train_batch_size 2 --save_strategy steps --save_steps 1".split()
    train.main(train.parse_args(flags))
    before = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    train.main(train.parse_args([*flags, "--resume_from_checkpoint", "true"]))
    assert all(torch.equal(before[name], after) for name, after in weights(tmp_path).items())
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2


def test_a_run_goes_on_with_its_settings_or_not_at_all(tmp_path, caplog):
    """A checkpoint brings learning rate and schedule with it: other ones would be ignored, without a word."""
    flags = ["--config", "configs/tiny_sft.yaml", "--model_name_or_path", "tiny/llasa", "--output_dir", str(tmp_path)]
    flags += "--per_device_train_batch_size 2 --save_strategy steps --save_steps 1".split()
    train.main(train.parse_args([*flags, "--max_steps", "1"]))
    (tmp_path / "model.safetensors").unlink()
    first, resume = json.loads((tmp_path / "run.json").read_text()), [*flags, "--resume_from_checkpoint", "true"]
    with pytest.raises(SystemExit):
        train.main(train.parse_args([*resume, "--learning_rate", "1e-6", "--seed", "7"]))
    assert "with other settings: seed (0, now 7), learning_rate (0.0003, now 1e-06). Resume" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text()) == first
    same_step = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "2"]
    train.main(train.parse_args([*resume, *same_step]))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["dataset_digest"] == content_digest(record["script"]["dataset"]) is not None
    assert record["resumed_from"] == str(tmp_path / "checkpoint-1") and record["resumed_run"] == first
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    caplog.clear()
    with pytest.raises(SystemExit):
        train.main(train.parse_args([*resume, "--max_steps", "3"]))
    assert "checkpoint-2: has no optimizer (was it saved with --save_only_model?)" in caplog.text


def test_dpo_moves_every_parameter_and_leaves_what_the_other_methods_do(tmp_path):
    pairs = [{"text": "Anna found two boxes.", "chosen_codes": [i, i + 1, 7], "rejected_codes": [i]} for i in range(4)]
    flags = ["--method", "dpo", "--model_name_or_path", "tiny/llasa", "--max_steps", "2", "--warmup_steps", "0"]
    flags += ["--dataset", write_rows(tmp_path / "pairs.jsonl", pairs), "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--eval_dataset", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "run")]
    train.main(train.parse_args(flags))
    before, after = Policy.from_pretrained("tiny/llasa").model.state_dict(), weights(tmp_path / "run")
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["rewards/margins"] == 0 and log[1]["rewards/margins"] > 0
    assert log[2]["eval_rewards/accuracies"] == 1 and log[2]["eval_loss"] < log[0]["loss"]
    run_json = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run_json["codec_id"] == "tiny/codec" and run_json["recipe"]["beta"] == 0.1 and run_json["reward"] is None
    assert "DPO on pairs of preferences" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "reward_curve.png").exists()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([{"text": "Hi.", "audio_codes": [1]}], "no column 'chosen_codes'"),
        ([{"text": "Hi.", "chosen_codes": [4096], "rejected_codes": [1]}], "row 0: chosen_codes must be"),
        ([{"text": "Hi.", "chosen_codes": [1], "rejected_codes": [1]}], "none of the 1 pairs can be used"),
    ],
)
def test_bad_pairs_of_dpo(pairs, message, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)  # refused before
    flags = ["--method", "dpo", "--model_name_or_path", "tiny/llasa", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train.main(train.parse_args([*flags, "--dataset", write_rows(tmp_path / "pairs.jsonl", pairs)]))
    assert stop.value.code == 2 and message in caplog.text + capsys.readouterr().err


def test_asr_moves_every_parameter_and_logs_its_rules(tmp_path):
    flags = ["--config", "configs/tiny_asr.yaml", "--output_dir", str(tmp_path), "--max_steps", "2"]
    flags += ["--per_device_train_batch_size", "16", "--sample_steps", "1"]
    train.main(train.parse_args(flags))
    before = Policy.from_pretrained("tiny/llasa_asr").model.state_dict()
    after = weights(tmp_path)
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    expected = {"wer", "insertions", "deletions", "substitutions", "frac_hallucination", "frac_truncated", "entropy"}
    assert expected <= log[0].keys() and log[0]["reward_std"] > 0
    lines = (tmp_path / "samples" / "step_000001" / "transcripts.jsonl").read_text().splitlines()
    assert {"text", "transcript", "wer", "failure"} <= json.loads(lines[0]).keys()
    policy = Policy.from_pretrained(str(tmp_path), task="asr")
    assert policy.transcribe([asr_prompt([1, 2, 3])], max_completion_length=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "both"], "RL trains one task at a time"),
        (["--task", "asr", "--reward_config", "reward_models/whisper.json"], "whisper is a reward of --task tts"),
        (["--task", "asr"], "no column 'audio_codes'"),
    ],
)
def test_bad_input_of_asr(flags, message, tmp_path, capsys, caplog):
    (tmp_path / "texts.jsonl").write_text('{"text": "Anna found two boxes."}\n')
    given = ["--model_name_or_path", "tiny/llasa", "--dataset", str(tmp_path / "texts.jsonl")]
    with pytest.raises(SystemExit) as stop:
        train.main(train.parse_args([*given, "--output_dir", str(tmp_path / "run"), *flags]))
    assert stop.value.code == 2
    assert message in caplog.text + capsys.readouterr().err


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_input(tmp_path, capsys, caplog):
    """Each is refused with a message that names it, and exit code 2."""
    output = ["--output_dir", str(tmp_path / "run")]
    texts = [{"text": "Anna found two boxes."}] * 9
    cases = [
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        (["--reward_config", "nowhere.json"], "nowhere.json"),
        (["--codec_id", "./nowhere"], "nowhere"),
        (["--whisper", "nowhere.pt"], "nowhere.pt"),
        (["--dataset", write_rows(tmp_path / "a.jsonl", [{"sentence": "hi"}])], "no column 'text'"),
        (
            ["--dataset", write_rows(tmp_path / "b.jsonl", [*texts, {"text": None}])],
            "row 9: text must be text (got None)",
        ),
        (["--dataset", write_rows(tmp_path / "c.jsonl", [*texts, {"text": " "}])], "row 9: text is empty"),
        (
            ["--dataset", write_rows(tmp_path / "f.jsonl", [*texts, {"text": "…"}])],
            "row 9: reference text '…' is empty",
        ),
        (["--report_to", "nowhere"], "nowhere is not supported"),
        (["--dataset", write_rows(tmp_path / "d.jsonl", [*texts, {"text": "word " * 600}])], "row 9: the prompt is"),
        (["--dataset", write_rows(tmp_path / "e.jsonl", texts[:1])], "has 1 rows and the first step takes 2 prompts"),
        (["--learnin_rate", "1"], "Did you mean 'learning_rate'"),
        (["--num_generations", "3"], "divisible by num_generations"),
        (["--load_in_4bit", "true"], "--load_in_4bit: quantized weights are not supported"),
        (["--load_in_8bit", "true"], "--load_in_8bit: quantized weights are not supported"),
        (["--use_vllm", "true"], "--use_vllm: vLLM is not installed here"),
        (
            ["--dataset", write_rows(tmp_path / "h.jsonl", [*texts, {"text": "hi", "language": "yue"}])],
            "this Whisper does not know the language 'yue'",
        ),
        (["--resume_from_checkpoint", str(tmp_path)], "no complete checkpoint there"),
        (["--method", "diffro"], "--method diffro needs --token2text"),
        (["--method", "diffro", "--token2text", "x", "--task", "asr"], "--method diffro: for --task tts only"),
        (["--method", "grpo+diffro", "--credit", "rollout", "--token2text", "nowhere"], "nowhere"),
        (["--method", "grpo+diffro", *DIFFRO, "--diffro_labels", "mood"], "no column 'mood'"),
        (["--reward_config", "reward_models/token2text.json"], "the reward token2text needs --token2text"),
    ]
    for flags, message in cases:
        caplog.clear()
        assert message in refused(capsys, caplog, *output, *flags), flags
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, caplog, "--output_dir", str(tmp_path / "file" / "run"))


def test_precomputed_references_are_refused_under_fsdp(monkeypatch, caplog):
    """TRL computes them from a reference that is not confined yet: the loss began at 0.07 in place of ln 2."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit):
        train.parse_args(["--method", "dpo", "--precompute_ref_log_probs", "true"])
    assert "--precompute_ref_log_probs: not under FSDP" in caplog.text


def test_precomputed_references_are_refused_on_several_machines(monkeypatch, caplog):
    """TRL writes them on the first machine, and the others do not find the file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(SystemExit):
        train.parse_args(["--method", "dpo", "--precompute_ref_log_probs", "true"])
    assert "--precompute_ref_log_probs: not on several machines" in caplog.text


def test_lora_for_vllm_is_added_to_a_base_in_float32(monkeypatch, caplog):
    """Added and taken off at every step, in bfloat16, the base would not stay what it was."""
    monkeypatch.setattr("training.recipes.check_machine", lambda *_: None)  # vLLM need not be installed here
    flags = ["--use_peft", "true", "--bf16", "true", "--use_cpu", "true"]
    dtypes = [train.parse_args([*flags, *more])[2].dtype for more in ([], ["--use_vllm", "true"])]
    assert dtypes == ["bfloat16", "float32"]
    with pytest.raises(SystemExit):
        train.parse_args([*flags, "--use_vllm", "true", "--dtype", "bfloat16"])
    assert "--dtype bfloat16: not for LoRA with --use_vllm" in caplog.text


@pytest.mark.parametrize("method", ["grpo", "sft", "dpo"])
def test_zero_3_is_refused_before_anything_is_loaded(method, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(SystemExit):
        train.parse_args(["--method", method])
    assert "ZeRO-3: not supported" in caplog.text


def test_a_reporter_that_is_not_installed_is_refused_before_anything_is_loaded(monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(SystemExit):
        train.parse_args(["--report_to", "tensorboard", "wandb"])
    assert "--report_to wandb: it is not installed here. pip install wandb" in caplog.text


def test_a_micro_batch_may_be_smaller_than_a_group(tmp_path):
    """Groups of 4 in micro-batches of 2: a group is scored before the batch is split."""
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--num_generations", "4"]
    run("--output_dir", str(tmp_path), "--max_steps", "1", "--max_completion_length", "140", *flags)
    assert logged(tmp_path)["grad_norm"] > 0


def test_what_is_left_on_the_disk_and_in_the_model(tmp_path):
    """Two checkpoints, or 2 TB an epoch of 100,000 texts; no dropout, or sampling and scoring are two models."""
    _, training_args, _ = train.parse_args(["--dataset", "x", "--model_name_or_path", "y"])
    assert training_args.save_total_limit == 2 and training_args.disable_dropout
    assert train.parse_args(["--method", "sft"])[1].save_total_limit == 2
    flags = ["--config", "configs/tiny.yaml", "--save_total_limit", "1", "--save_steps", "1", "--max_steps", "2"]
    flags += ["--per_device_train_batch_size", "4", "--num_generations", "2", "--max_completion_length", "20"]
    train.main(train.parse_args([*flags, "--use_peft", "true", "--sample_steps", "0", "--output_dir", str(tmp_path)]))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_bad_config_file(tmp_path, capsys, caplog):
    config = tmp_path / "bad.yaml"
    config.write_text("learning_rte: 1\n")
    with pytest.raises(SystemExit):
        train.parse_args(["--config", str(config)])
    message = caplog.text + capsys.readouterr().err
    assert "learning_rte" in message and "learning_rate" in message and str(config) in message


def test_a_model_without_speech_tokens(tmp_path, capsys, caplog):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))).save_pretrained(tmp_path)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=1, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    message = refused(capsys, caplog, "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "run"))
    assert "not a Llasa one" in message


def test_an_earlier_run_is_not_overwritten(trained, capsys, caplog):
    (trained / "checkpoint-1").mkdir()
    shutil.copy(trained / "trainer_state.json", trained / "checkpoint-1")
    assert "checkpoints of an earlier run" in refused(capsys, caplog, "--output_dir", str(trained))
    shutil.rmtree(trained / "checkpoint-1")


@pytest.mark.parametrize("config", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(config):
    script, _, _ = train.parse_args(["--config", str(config)])
    assert script.dataset is None or Path(script.dataset).exists() or "/" in script.dataset


def test_each_reward_normalised_in_its_group_before_the_sum(tmp_path, monkeypatch):
    """--multi_objective_aggregation normalize_then_sum: GDPO (arXiv 2601.05242), as TRL documents it."""
    config = {"token2text": {"weight": 1.0}, "duration": {"weight": 0.5}}
    (tmp_path / "two.json").write_text(json.dumps(config))
    batches = []

    class Recording(SpeechGRPOTrainer):
        def _calculate_rewards(self, *args):
            batches.append([super()._calculate_rewards(*args)])
            return batches[-1][0]

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            batches[-1].append(output["advantages"])
            return output

    monkeypatch.setattr(train, "SpeechGRPOTrainer", Recording)
    flags = ["--reward_config", str(tmp_path / "two.json"), *DIFFRO, "--max_steps", "1", "--save_strategy", "no"]
    gdpo = ["--multi_objective_aggregation", "normalize_then_sum", "--max_completion_length", "140"]
    run("--output_dir", str(tmp_path / "run"), *flags, *gdpo)
    for rewards, advantages in batches:
        groups = rewards.view(-1, 4, 2)
        each = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        total = each[..., 0] + 0.5 * each[..., 1]
        expected = (total - total.mean()) / (total.std() + 1e-4)
        assert torch.allclose(advantages, expected.flatten(), atol=1e-5)
        assert groups.std(1).min() > 0, "both rewards differ within each group"
    assert batches
