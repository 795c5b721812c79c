"""Bad input of every script: one line that names it, exit code 2, before anything long begins, nothing overwritten."""

import errno
import json
import logging
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluation
import inference
import sample_preferences
import select_rl_data
import train
import train_token2text
from common import cli
from common.cli import InputError
from reward_models.token2text import Token2Text
from speech.audio import save_audio
from speech.policy import Policy, load_tokenizer, recorded
from training.checkpoints import find_checkpoint

SCRIPTS = {
    "train": (train, "--config configs/tiny.yaml --max_steps 1"),
    "sft": (train, "--config configs/tiny_sft.yaml --model_name_or_path tiny/llasa --max_steps 1"),
    "asr": (train, "--config configs/tiny_asr.yaml --max_steps 1"),
    "dpo": (train, "--method dpo --model_name_or_path tiny/llasa --dataset pairs.jsonl --max_steps 1"),
    "token2text": (train_token2text, "--dataset tiny/asr/heldout.parquet --num_codes 4096"),
    "inference": (inference, "--model_name_or_path tiny/llasa --text Hi."),
    "transcribe": (inference, "--task asr --model_name_or_path tiny/llasa_asr"),
    "evaluation": (evaluation, "--models tiny/llasa --texts tiny/texts/heldout.txt"),
    "sample": (sample_preferences, "--model_name_or_path tiny/llasa --dataset tiny/texts/train.jsonl"),
    "select": (select_rl_data, "--dataset tiny/asr/heldout.parquet --select random --num 4"),
}


def refusal(script: str, flags: list[str], capsys, caplog, output: Path) -> str:
    """The message of a script that ends with exit code 2; `output` must not have been made."""
    module, given = SCRIPTS[script]
    where = {"select": str(output / "rows.parquet"), "transcribe": str(output / "t.jsonl")}
    where |= {"inference": str(output / "x.wav"), "sample": str(output / "pairs.jsonl")}
    flag = "--output" if script in where else "--output_dir"
    caplog.clear()
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args([*given.split(), flag, where.get(script, str(output)), *flags]))
    assert stop.value.code == 2, (script, flags)
    assert not output.exists(), f"{script} {flags} left {output} behind"
    return caplog.text + capsys.readouterr().err


NAN = ("nan", "inf", "-1")
NUMBERS = {
    ("train", "sft", "dpo"): {
        **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), NAN),
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps"), ("0", "-1")),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), ("nan", "1")),
        "max_steps": ("0", "-2"),
        "num_train_epochs": ("nan", "0"),
        "logging_steps": ("0",),
        "max_length": ("0",),
        "seed": ("-1", "4294967296"),
        "save_total_limit": ("0",),
        "lora_r": ("0",),
        "lora_dropout": ("nan", "1"),
    },
    ("train",): {
        **dict.fromkeys(("beta", "gumbel_temperature", "diffro_weight"), NAN),
        **dict.fromkeys(("temperature", "repetition_penalty"), ("0", *NAN)),
        **dict.fromkeys(("num_iterations", "max_completion_length", "gumbel_draws"), ("0", "-1")),
        "num_generations": ("0", "1"),
        "epsilon": ("0", *NAN),
        "top_p": ("0", "1.1", "nan"),
        "top_k": ("-5",),
        "min_p": ("nan", "2"),
        "eval_temperature": ("nan", "-1"),
        "sample_count": ("-1",),
        "sample_steps": ("-1",),
        "loss_type": ("foo",),
        "scale_rewards": ("foo",),
        "multi_objective_aggregation": ("foo",),
    },
    ("dpo",): {"beta": ("0", *NAN), "label_smoothing": ("0.5", *NAN), "loss_type": ("foo",)},
    ("sample",): {
        "temperature": ("0", *NAN),
        "top_p": ("0", "nan", "1.1"),
        "min_margin": NAN,
        **dict.fromkeys(("batch_size", "max_length", "max_completion_length", "num_texts"), ("0",)),
        "num_samples": ("1",),
        "seed": ("-1", "4294967296"),
    },
    ("token2text",): {
        **dict.fromkeys(("learning_rate", "ctc_weight", "label_weight", "embedding_noise"), NAN),
        **dict.fromkeys(("dropout", "label_smoothing", "code_noise"), ("nan", "1", "-1")),
        **dict.fromkeys(("steps", "batch_size", "logging_steps", "save_steps", "num_codes"), ("0",)),
        "heldout_frac": ("nan", "0", "1", "-1"),
        "seed": ("-1", "4294967296"),
    },
    ("inference", "evaluation"): {
        "temperature": NAN,
        "top_p": ("0", "nan", "1.1"),
        **dict.fromkeys(("batch_size", "max_length", "best_of", "max_completion_length"), ("0",)),
    },
    ("inference",): {"seed": ("-1", "4294967296"), "num_samples": ("0",)},
    ("evaluation",): {"seeds": ("-1",), "long_s": ("nan",), "num_players": ("-1",)},
    ("select",): {"num": ("0",), "seed": ("-1",), "min_long_s": ("nan", "-1"), "longest_frac": ("nan", "2")},
}
NUMBER_CASES = [
    (script, f"--{flag}", value)
    for scripts, flags in NUMBERS.items()
    for script in scripts
    for flag, values in flags.items()
    for value in values
]


def test_numbers_out_of_range(capsys, caplog, tmp_path):
    """By every script, in milliseconds each: before a model or a dataset is loaded."""
    for script, flag, value in NUMBER_CASES:
        message = refusal(script, [flag, value], capsys, caplog, tmp_path / "out")
        assert flag.lstrip("-") in message or flag[:-1] in message, (script, flag, value, message)


# --- Rows -------------------------------------------------------------------------------------------------

GOOD = {"text": "Anna found two boxes.", "audio_codes": [1, 2, 3], "language": "en"}
ROWS = [
    (("train",), {"text": 5}, "row 1: text must be text"),
    (("train",), {"text": None}, "row 1: text must be text"),
    (("train",), {"text": "..."}, "row 1: reference text '...' is empty after"),
    (("train",), {"text": "😀"}, "row 1: reference text '😀' is empty after"),
    (("train",), {"text": "a <|speech_generation_start|>"}, "row 1: text holds a control token"),
    (("train",), {"language": "xx"}, "xx"),
    (("train",), {"ref_text": "Hello."}, "row 1: a voice prompt needs both"),
    (("train",), {"ref_codes": [1]}, "row 1: a voice prompt needs both"),
    (("train",), {"ref_text": "Hello.", "ref_codes": [-1]}, "row 1: ref_codes must be"),
    (("train",), {"ref_text": "Hello.", "ref_codes": [4096]}, "row 1: ref_codes must be"),
    (("sft", "asr"), {"audio_codes": []}, "row 1: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": None}, "row 1: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": [4096]}, "row 1: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": [-1]}, "row 1: audio_codes must be"),
    (("asr",), {"keywords": [1]}, "keywords must be"),
]
COLUMNS = [  # of the whole file, whose rows have one type
    (("sft", "asr"), {"audio_codes": "1 2 3"}, "row 0: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": ["1", "2"]}, "row 0: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": [1.5]}, "row 0: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": [True]}, "row 0: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": [[1]]}, "row 0: audio_codes must be"),
    (("sft", "asr"), {"audio_codes": 7}, "row 0: audio_codes must be"),
    (("train",), {"text": 5}, "row 0: text must be text"),
    (("train",), {"language": 5}, "row 0: language must be text"),
    (("train",), {"ref_text": 5, "ref_codes": [1]}, "row 0: ref_text must be text"),
    (("train",), {"ref_text": "Hi.", "ref_codes": ["x"]}, "row 0: ref_codes must be"),
    (("asr",), {"keywords": "Anna"}, "row 0: keywords must be"),
]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_wrong_types_and_values(capsys, caplog, tmp_path):
    for scripts, damage, expected in ROWS:
        file = write_rows(tmp_path / "rows.jsonl", [GOOD, GOOD | damage, *[GOOD] * 8])
        for script in scripts:
            message = refusal(script, ["--dataset", file], capsys, caplog, tmp_path / "out")
            assert expected in message, (script, damage, message)
    for scripts, damage, expected in COLUMNS:
        file = write_rows(tmp_path / "rows.jsonl", [GOOD | damage] * 10)
        for script in scripts:
            message = refusal(script, ["--dataset", file], capsys, caplog, tmp_path / "out")
            assert expected in message, (script, damage, message)


# --- Weights ----------------------------------------------------------------------------------------------


def damaged(source: str, damage: str, folder: Path) -> Path:
    """A copy of a model's folder with broken weights or files."""
    shutil.copytree(source, folder)
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(name for name, value in weights.items() if value.dim() == 2)[-1]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "garbage":
        file.write_bytes(b"garbage" * 1000)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "lacks a weight":
        del weights[name]
        save_file(weights, file, metadata={"format": "pt"})
    elif damage == "another shape":
        save_file(weights | {name: weights[name][:, :-1].contiguous()}, file, metadata={"format": "pt"})
    elif damage == "NaN":
        weights[name][0, 0] = torch.nan
        save_file(weights, file, metadata={"format": "pt"})
    else:
        path, content = damage.split(": ", 1)
        (folder / path).write_text(content)
    return folder


WEIGHTS = ("truncated", "garbage", "empty", "lacks a weight", "another shape", "NaN")
POLICY_FILES = (
    'config.json: {"model_type": "llama"}',
    "config.json: {}",
    "config.json: [",
    "config.json: []",
    "tokenizer.json: {}",
    "tokenizer.json: {",
    "chat_template.jinja: {% for x in %}",
)


def test_a_warm_up_that_the_schedule_would_ignore(capsys, caplog, tmp_path):
    flags = ["--warmup_steps", "5", "--lr_scheduler_type", "constant"]
    for script in ("train", "sft", "dpo"):
        message = refusal(script, flags, capsys, caplog, tmp_path / "out")
        assert "--warmup_steps 5: --lr_scheduler_type constant does not warm up" in message


@pytest.mark.parametrize("damage", [*WEIGHTS, *POLICY_FILES])
def test_a_broken_policy(damage, tmp_path):
    folder = damaged("tiny/llasa", damage, tmp_path / "broken")
    with pytest.raises(InputError, match="broken"):
        Policy.from_pretrained(str(folder))


@pytest.mark.parametrize("damage", [*WEIGHTS, "config.json: {}", "config.json: []", "tokenizer.json: {}"])
def test_a_broken_token2text(damage, tmp_path):
    folder = damaged("tiny/token2text", damage, tmp_path / "broken")
    with pytest.raises(InputError, match="broken"):
        Token2Text.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[1]", "{", '"x"'])
def test_a_broken_run_json(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="run.json"):
        recorded(str(tmp_path), "codec_id")


def test_a_tokenizer_of_another_model(tmp_path):
    folder = damaged("tiny/llasa", "tokenizer.json: {}", tmp_path / "broken")
    with pytest.raises(InputError, match="broken: the tokenizer cannot be loaded"):
        load_tokenizer(str(folder))


# --- Outputs ----------------------------------------------------------------------------------------------


def test_a_trained_model_is_not_overwritten(tmp_path, capsys, caplog):
    for script, file in (("train", "model.safetensors"), ("sft", "adapter_model.safetensors")):
        module, given = SCRIPTS[script]
        folder = tmp_path / script
        folder.mkdir()
        (folder / file).write_bytes(b"weights")
        for resume in ("false", "true"):
            caplog.clear()
            with pytest.raises(SystemExit):
                flags = ["--output_dir", str(folder), "--resume_from_checkpoint", resume]
                module.main(module.parse_args([*given.split(), *flags]))
            assert "holds a trained model" in caplog.text
        assert (folder / file).read_bytes() == b"weights"
    shutil.copytree("tiny/token2text", tmp_path / "token2text")
    module, given = SCRIPTS["token2text"]
    with pytest.raises(SystemExit):
        module.main(module.parse_args([*given.split(), "--output_dir", str(tmp_path / "token2text")]))
    assert "holds a finished model" in caplog.text


def test_a_checkpoint_without_weights_is_none(tmp_path):
    class Args:
        output_dir = str(tmp_path)
        resume_from_checkpoint = str(tmp_path / "checkpoint-1")

    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    with pytest.raises(InputError, match="no complete checkpoint there"):
        find_checkpoint(Args)
    Args.resume_from_checkpoint = "true"
    assert find_checkpoint(Args) is None


# --- Interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "the disk or its quota is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 1, "the disk or its quota is full"),
        (RuntimeError(f"Error while serializing: {os.strerror(errno.ENOSPC)} (os error 28)"), 1, "quota is full"),
    ],
)
def test_one_line_for_ctrl_c_and_a_full_disk(error, code, message, caplog):
    def main(args):
        raise error

    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as stop:
        cli.run_script(main, lambda: None)
    assert stop.value.code == code and message in caplog.text


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"weight": torch.zeros(300_000)}, path),
        lambda path: np.save(path, np.zeros(300_000)),
        lambda path: save_audio(path, np.zeros(600_000)),
    ],
    ids=["torch", "numpy", "audio"],
)
def test_one_line_for_a_file_that_does_not_fit(write, tmp_path, caplog, monkeypatch):
    """With a limit to the size of files in place of a full disk: the libraries' writes end short in the same way."""
    monkeypatch.setattr(cli, "FULL_DISK", (*cli.FULL_DISK, os.strerror(errno.EFBIG)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as stop:
            cli.run_script(write, lambda: tmp_path / "file.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 1 and "the disk or its quota is full" in caplog.text


def test_a_bug_keeps_its_traceback():
    def main(args):
        raise RuntimeError("f() got an unexpected positional argument")

    with pytest.raises(RuntimeError, match="unexpected positional"):
        cli.run_script(main, lambda: None)
