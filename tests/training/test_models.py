"""The policy and the reward models as train.py loads them: LoRA folders, heads, revisions, what is left out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

import train
from common.cli import InputError
from reward_models import load_config
from speech import weights
from speech.policy import Policy, load_tokenizer
from training import models
from training.vllm_settings import check_vllm_head

SHORT = [
    "--config",
    "configs/tiny.yaml",
    "--max_steps",
    "1",
    "--per_device_train_batch_size",
    "8",
    "--sample_steps",
    "0",
]
SHORT += ["--num_generations", "4", "--max_completion_length", "140", "--save_strategy", "no"]
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear"]


def trained(folder: Path, *flags: str) -> Path:
    train.main(train.parse_args([*SHORT, "--output_dir", str(folder), *flags]))
    return folder


def load(path: str | Path, task: str = "tts", **settings) -> torch.nn.Module:
    tokenizer, tokens = load_tokenizer(str(path), task)
    settings = {"dtype": "float32"} | settings
    return models.load_model(ModelConfig(model_name_or_path=str(path), **settings), tokenizer, tokens, task)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A LoRA folder as SFT leaves it, far enough from its base to be told apart."""
    folder = tmp_path_factory.mktemp("sft_lora")
    flags = ["--config", "configs/tiny_sft.yaml", "--model_name_or_path", "tiny/llasa", "--max_steps", "3", *LORA]
    flags += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "2", "--output_dir", str(folder)]
    train.main(train.parse_args(flags))
    return folder


def test_a_lora_folder_is_trained_further_and_is_the_reference(adapter, tmp_path, monkeypatch):
    before = load_file(adapter / "adapter_model.safetensors")
    assert max(weight.abs().max() for name, weight in before.items() if "lora_B" in name) > 0
    folder = trained(tmp_path, "--model_name_or_path", str(adapter), "--beta", "0.1", "--learning_rate", "1e-3")
    after = load_file(folder / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert all(0 < distance <= 2e-3 for distance in moved.values()), "one Adam step away from where SFT ended"
    [entry, *_] = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert abs(entry["kl"]) < 1e-5  # the reference has the adapter too
    assert Policy.from_pretrained(str(folder)).model is not None


def test_a_lora_folder_and_use_peft_are_refused(adapter):
    with pytest.raises(InputError, match="is a LoRA adapter already"):
        load(adapter, use_peft=True)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "no JSON"])
def test_a_broken_lora_folder_is_named(adapter, tmp_path, damage):
    folder = tmp_path / "broken"
    shutil.copytree(adapter, folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config.write_text("{")
    with pytest.raises(InputError, match="--model_name_or_path .*broken: its LoRA"):
        load(folder)


def test_half_precision_without_lora_is_warned_of(caplog):
    load("tiny/llasa", dtype="bfloat16")
    assert "--dtype bfloat16 without LoRA: AdamW's steps are smaller than bfloat16 resolves" in caplog.text
    caplog.clear()
    load("tiny/llasa", dtype="auto")  # float16 on the disk
    assert "--dtype auto without LoRA: AdamW's steps are smaller than float16 resolves" in caplog.text
    caplog.clear()
    load("tiny/llasa", dtype="bfloat16", use_peft=True)
    load("tiny/llasa")
    assert caplog.text == ""


def test_two_different_matrices_under_a_tied_config_are_saved_as_they_are(tmp_path):
    """The published Llasa-1B has both matrices in its file, and a config that ties them."""
    folder = tmp_path / "both"
    shutil.copytree("tiny/llasa", folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone() * 2
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    policy = load(folder)
    assert policy.get_output_embeddings().weight is not policy.get_input_embeddings().weight
    with pytest.raises(InputError, match="--use_vllm: the config of .*both ties head and embeddings"):
        check_vllm_head(policy)
    policy.save_pretrained(tmp_path / "saved")
    check_vllm_head(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False  # vLLM and transformers 4 would take one matrix for both
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.lm_head.weight, 2 * again.model.embed_tokens.weight)
    # Where both are equal they are one matrix, saved once.
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    policy = load(folder)
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight


def test_the_revision_is_that_of_policy_tokenizer_and_reference(tmp_path, monkeypatch):
    asked = {}

    def record(name, function):
        def recorded(*args, **kwargs):
            asked.setdefault(name, kwargs.pop("revision", None))
            return function(*args, **kwargs)

        return recorded

    monkeypatch.setattr("speech.policy.AutoTokenizer.from_pretrained", record("tokenizer", models_tokenizer()))
    monkeypatch.setattr(
        weights.AutoModelForCausalLM, "from_pretrained", record("policy", AutoModelForCausalLM.from_pretrained)
    )
    from trl.trainer import grpo_trainer

    reference = record("reference", grpo_trainer.create_model_from_path)
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", reference)
    trained(tmp_path, "--model_revision", "v1", "--beta", "0.1")
    assert asked == {"tokenizer": "v1", "policy": "v1", "reference": "v1"}


def test_a_language_that_whisper_does_not_know_is_refused_before_training():
    script_args, training_args, _ = train.parse_args(SHORT)
    rewards, llasa = load_config("reward_models/whisper.json"), load_tokenizer("tiny/llasa")
    scorer = models.load_rollout_scorer(script_args, training_args, rewards, {"en"}, *llasa)
    assert scorer.whisper is not None
    with pytest.raises(InputError, match="this Whisper does not know the language 'yue'"):
        models.load_rollout_scorer(script_args, training_args, rewards, {"en", "yue"}, *llasa)


def models_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained


def test_reward_models_are_loaded_by_one_process_first_and_without_the_codecs_encoder(tmp_path, monkeypatch):
    """openai-whisper downloads into its cache without a lock: four processes would break each other's file."""
    import contextlib

    from training.recipes import GRPORecipe

    inside, loaded = [], []

    @contextlib.contextmanager
    def main_process_first(self, local=True, desc=""):
        inside.append(desc)
        yield
        inside.pop()

    load_scorer = models.load_rollout_scorer

    def recorded(*args):
        loaded.append((list(inside), load_scorer(*args)))
        return loaded[-1][1]

    monkeypatch.setattr(GRPORecipe, "main_process_first", main_process_first)
    monkeypatch.setattr(train, "load_rollout_scorer", recorded)
    trained(tmp_path)
    [(context, scorer)] = loaded
    assert context == ["reward models"]
    names = {name.split(".")[0] for name, _ in scorer.codec.model.named_parameters()}
    assert names == {"quantizer", "acoustic_decoder"}
