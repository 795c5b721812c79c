"""Flags of TRL that would do nothing here, or break the training, are refused by name."""

import json
from dataclasses import fields

import pytest
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig

import train
from training import unsupported

FLAGS = "--model_name_or_path tiny/llasa --dataset tiny/texts/train.jsonl --output_dir x --use_cpu true"


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("grpo", "--reward_weights 2 1", "--reward_weights [2.0, 1.0]: the weights of the rewards are in the JSON"),
        ("grpo", "--num_generations_eval 4", "--num_generations_eval 4: a held-out row is sampled once"),
        ("grpo", "--data_seed 3", "--data_seed 3: the order of the rows follows --seed"),
        ("grpo", "--remove_unused_columns true", "--remove_unused_columns True: the rewards read the columns"),
        ("grpo", "--save_strategy epoch", "--save_strategy epoch: the epochs of GRPO are joined to one"),
        ("diffro", "--token2text tiny/token2text --save_strategy epoch", "--save_strategy epoch: the epochs"),
        ("grpo", "--importance_sampling_level word", "--importance_sampling_level: must be one of token, sequence"),
        ("grpo", "--vllm_importance_sampling_mode tokens", "--vllm_importance_sampling_mode: must be one of"),
        ("grpo", "--loss_type cispo", "--loss_type cispo: the largest importance weight, --epsilon_high, must be >= 1"),
        ("grpo", "--top_k -1", "--top_k -1: is vLLM's way to say off. Use 0"),
        (
            "grpo+diffro",
            "--token2text tiny/token2text --diffro_weight 0",
            "--diffro_weight 0: GRPO alone is --method grpo",
        ),
        (
            "grpo",
            "--multi_objective_aggregation normalize_then_sum --scale_rewards none",
            "--scale_rewards none: --multi_objective_aggregation normalize_then_sum scales each",
        ),
        ("sft", "--completion_only_loss false", "--completion_only_loss False: prompts hold tokens that the confined"),
        ("sft", "--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1: it would smooth over tokens"),
        ("sft", "--eos_token <pad>", "--eos_token <pad>: END is Llasa's own token"),
        ("dpo", "--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1: DPO's is --label_smoothing"),
        ("dpo", "--lora_r 4", "--lora_r 4: all weights are trained, without --use_peft true"),
        ("sft", "--use_peft true --lora_modules_to_save lm_head", "--lora_modules_to_save ['lm_head']: whole modules"),
        ("grpo", "--enable_jit_checkpoint true", "--enable_jit_checkpoint True: after its checkpoint the run would be"),
        ("sft", "--trust_remote_code true", "--trust_remote_code True: no code of a checkpoint is run"),
    ],
)
def test_refused(method, flags, message, caplog):
    with pytest.raises(SystemExit) as stop:
        train.parse_args([*FLAGS.split(), "--method", method, *flags.split()])
    assert stop.value.code == 2 and message in caplog.text


@pytest.mark.parametrize(("name", "value"), [("model_init_kwargs", {"dtype": "bfloat16"}), ("generation_kwargs", {})])
def test_dictionaries(name, value, caplog):
    flags = [*FLAGS.split(), f"--{name}", json.dumps(value)]
    if not value:
        train.parse_args(flags)
        flags = [*flags[:-1], json.dumps({"temperature": 0.7})]
    with pytest.raises(SystemExit):
        train.parse_args(flags)
    assert f"--{name}" in caplog.text


def test_a_cut_distribution_is_warned_of(caplog):
    train.parse_args([*FLAGS.split(), "--top_k", "50"])
    assert "--top_k 50: rollouts are sampled from a cut distribution" in caplog.text


def test_what_says_the_same_passes(tmp_path):
    train.parse_args([*FLAGS.split(), "--loss_type", "cispo", "--epsilon", "5"])
    (tmp_path / "config.yaml").write_text("method: sft\ncompletion_only_loss: null\n")
    train.parse_args([*FLAGS.split(), "--config", str(tmp_path / "config.yaml")])


def test_a_lora_folder_has_the_settings_it_has(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    train.parse_args([*FLAGS.replace("tiny/llasa", str(tmp_path)).split(), "--lora_r", "2"])


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            GRPOConfig,
            [*unsupported.EVERYWHERE, *unsupported.OF_GRPO, *unsupported.SAMPLING_FLAGS, *unsupported.CHOICES],
        ),
        (SFTConfig, [*unsupported.EVERYWHERE, *unsupported.OF_SFT]),
        (DPOConfig, [*unsupported.EVERYWHERE, *unsupported.OF_DPO]),
        (ModelConfig, [*unsupported.OF_MODEL, *unsupported.LORA_SETTINGS]),
    ],
)
def test_what_is_refused_is_a_flag(config, names):
    assert set(names) <= {one.name for one in fields(config)}
