"""Flags of TRL and transformers that train.py refuses: they would do nothing here, or break the training."""

import importlib.util
import logging
import os
from dataclasses import MISSING, fields

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig

from common.cli import InputError
from training.vllm_settings import NEUTRAL_SAMPLING

logger = logging.getLogger("train")

# Flag → why another value than its default is refused, and what to do
EVERYWHERE = {
    "trust_remote_code": "no code of a checkpoint is run",
    "model_init_kwargs": "it does not reach the policy; --dtype and --attn_implementation do",
    "bf16_full_eval": "held-out rows are computed as the training is",
    "fp16_full_eval": "held-out rows are computed as the training is",
    "prediction_loss_only": "it has no effect",
    "batch_eval_metrics": "it has no effect",
    "include_for_metrics": "it has no effect",
    "eval_do_concat_batches": "it has no effect",
    "eval_accumulation_steps": "it has no effect",
    "enable_jit_checkpoint": "after its checkpoint the run would be saved as if it were finished. Use --save_steps",
}
OF_GRPO = {
    "reward_weights": 'the weights of the rewards are in the JSON file of --reward_config ({"whisper": {"weight": 2}})',
    "num_generations_eval": "a held-out row is sampled once. Repeat rows to sample them more often",
    "data_seed": "the order of the rows follows --seed",
    "train_sampling_strategy": "GRPO draws groups; the order of the rows follows --seed",
    "label_smoothing_factor": "GRPO has no labels",
    "average_tokens_across_devices": "GRPO counts its own tokens",
    "remove_unused_columns": "the rewards read the columns of the data set",
    "chat_template_kwargs": "the prompts are Llasa's, without settings",
    "neftune_noise_alpha": "the noise would be there while sampling too",
}
OF_SFT = {
    "completion_only_loss": "prompts hold tokens that the confined head cannot say",
    "assistant_only_loss": "the loss is on the answer anyway",
    "label_smoothing_factor": "it would smooth over tokens that the confined head cannot say",
    "chat_template_path": "rows are made of Llasa's own template, and inference.py reads no other",
    "eos_token": "END is Llasa's own token",
    "pad_token": "it is Llasa's own token",
    "dataset_text_field": "rows come from the columns of docs/data.md",
    "truncation_mode": "a row that does not fit into --max_length is left out",
}
OF_DPO = {
    "label_smoothing_factor": "DPO's is --label_smoothing",
    "neftune_noise_alpha": "the noise would be in the reference's log-probs too",
    "pad_token": "it is Llasa's own token",
    "truncation_mode": "a pair that does not fit into --max_length is left out",
    "dataset_num_proc": "rows are tokenized in one process",
    "padding_free": "TRL has no padding-free DPO",
    "train_sampling_strategy": "pairs have two lengths",
}
OF_MODEL = {
    "lora_modules_to_save": "whole modules beside a LoRA cannot be loaded again",
    "bnb_4bit_quant_type": "quantized weights are not supported",
    "use_bnb_nested_quant": "quantized weights are not supported",
    "bnb_4bit_quant_storage": "quantized weights are not supported",
}
LORA_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
LORA_SETTINGS += ("lora_target_modules", "lora_target_parameters")
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}


def check_flags(training_args: TrainingArguments, model_args: ModelConfig, lora: bool) -> None:
    """Raises InputError for a flag that would do nothing here, or break the training, with another value than default.

    Args:
        lora: whether a LoRA is trained, of --use_peft or of a LoRA folder as policy.
    """
    for config, reasons in ((GRPOConfig, OF_GRPO), (SFTConfig, OF_SFT), (DPOConfig, OF_DPO)):
        if isinstance(training_args, config):
            refuse_changed(training_args, EVERYWHERE | reasons)
    refuse_changed(model_args, OF_MODEL)
    if not lora:
        refuse_changed(model_args, dict.fromkeys(LORA_SETTINGS, "all weights are trained, without --use_peft true"))
    if isinstance(training_args, GRPOConfig):
        _check_grpo_flags(training_args)


def refuse_changed(settings: object, reasons: dict[str, str]) -> None:
    """Raises InputError for a field of a dataclass that has another value than its default.

    Args:
        reasons: field → why it is refused, and what to do.
    """
    for one in fields(settings):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = getattr(settings, one.name)
        if one.name in reasons and value is not None and value != default:
            raise InputError(f"--{one.name} {value}: {reasons[one.name]}. Leave it out, also where a config sets it")


def _check_grpo_flags(args: GRPOConfig) -> None:
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise InputError(f"--{name}: must be one of {', '.join(choices)} (got {getattr(args, name)})")
    for name in ("eval_strategy", "save_strategy"):
        if getattr(args, name) == "epoch":
            raise InputError(
                f"--{name} epoch: the epochs of GRPO are joined to one, so that a run can resume within any. "
                f"Use steps, and --{name.removesuffix('_strategy')}_steps"
            )
    taken = [name for name in SAMPLING_FLAGS if name in (args.generation_kwargs or {})]
    if taken:
        raise InputError(f"--generation_kwargs: holds {taken[0]}, which has a flag of its own. Use --{taken[0]}")
    cut = [name for name, neutral in NEUTRAL_SAMPLING.items() if getattr(args, name) not in neutral]
    if cut and not args.use_vllm:  # with vLLM prepare_vllm refuses it
        logger.warning(
            "--%s %s: rollouts are sampled from a cut distribution and scored by the whole one, so the policy that is "
            "trained is not the one that speaks. Sample by --temperature alone",
            cut[0],
            getattr(args, cut[0]),
        )
    if args.scale_rewards != "group" and args.multi_objective_aggregation == "normalize_then_sum":
        raise InputError(
            f"--scale_rewards {args.scale_rewards}: --multi_objective_aggregation normalize_then_sum scales each "
            "reward by its group's deviation. Use group, or sum_then_normalize"
        )
    largest = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo" and largest < 1:
        raise InputError(
            f"--loss_type cispo: the largest importance weight, --epsilon_high, must be >= 1 (got {largest:g}, which "
            "every token would be weighed by). Use --epsilon_high 5"
        )
    if args.top_k == -1 and not args.use_vllm:
        raise InputError("--top_k -1: is vLLM's way to say off. Use 0")


def check_machine(training_args: TrainingArguments, model_args: ModelConfig) -> None:
    """Raises InputError for ways to compute that TRL accepts and this project does not do, or this machine cannot."""
    for bits in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, bits):
            raise InputError(
                f"--{bits}: quantized weights are not supported. Use --use_peft true --dtype bfloat16, which fits a "
                "policy of 1 B into 12 GiB"
            )
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise InputError(
            "DeepSpeed ZeRO-3: not supported, a policy of 1 B fits on every GPU. Use DDP, or ZeRO-2 or FSDP2 to save "
            "memory"
        )
    if getattr(training_args, "use_transformers_continuous_batching", False):
        raise InputError(
            "--use_transformers_continuous_batching: TRL rounds the weights themselves to half precision for it, and "
            "most of AdamW's steps are lost. Leave it out, or use --use_vllm true"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and getattr(training_args, "precompute_ref_log_probs", False):
        raise InputError(
            "--precompute_ref_log_probs: not under FSDP, where TRL computes them before the reference is confined to "
            "speech codes, and so over other tokens than the policy's. Leave it out, or use DDP"
        )
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    several_machines = num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if several_machines and getattr(training_args, "precompute_ref_log_probs", False):
        raise InputError(
            "--precompute_ref_log_probs: not on several machines: TRL writes them on the first one alone. Leave it out"
        )
    if getattr(training_args, "use_vllm", False) and importlib.util.find_spec("vllm") is None:
        raise InputError("--use_vllm: vLLM is not installed here. pip install -r requirements-vllm.txt")
    for reporter in ("tensorboard", "trackio", "wandb"):
        packages = [reporter, "tensorboardX"] if reporter == "tensorboard" else [reporter]
        if reporter in training_args.report_to and not any(map(importlib.util.find_spec, packages)):
            raise InputError(f"--report_to {reporter}: it is not installed here. pip install {reporter}")
