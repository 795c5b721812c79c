"""Find the checkpoint that a run resumes from, and check that it can."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Trainer, TrainingArguments

from common.cli import InputError
from common.run_record import changed_settings

logger = logging.getLogger("train")

TRAINED_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# Of one process, of FSDP's shards, of DeepSpeed
CHECKPOINT_WEIGHTS = ("*.safetensors", "pytorch_model_fsdp_*", "global_step*")
OPTIMIZER_STATES = ("optimizer*", "global_step*")
# Settings of run.json that decide the steps to come; the checkpoint brings some of them with it, the learning rate and
# AdamW's, and another one would be ignored
DECISIVE = {
    "script": ("method", "task"),
    "recipe": """
        seed data_seed learning_rate lr_scheduler_type warmup_steps optim weight_decay
        adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_generations num_iterations
        max_length max_completion_length temperature top_p min_p beta epsilon loss_type
        loss_weights label_smoothing scale_rewards multi_objective_aggregation credit
        importance_sampling_level mask_truncated_completions train_sampling_strategy
        top_k repetition_penalty generation_kwargs epsilon_high delta
        use_bias_correction_kl disable_dropout lr_scheduler_kwargs optim_args
        entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta
        entropy_target top_entropy_quantile off_policy_mask_threshold cast_lm_head_to_fp32
        use_vllm vllm_importance_sampling_correction vllm_importance_sampling_mode
        vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
        sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
        vespo_k_neg vespo_lambda_neg packing packing_strategy
        ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau
    """.split(),
    "model": ("use_peft",),
}
DIFFRO = ("diffro_weight", "diffro_filter", "diffro_labels")
DIFFRO += ("gumbel_temperature", "gumbel_temperature_end", "gumbel_hard", "gumbel_draws")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
# Files and models, which may have another name by now
SOURCES = ("dataset", "split", "codec_id", "whisper", "speaker_encoder", "token2text", "preference_model")


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint of --resume_from_checkpoint: a folder, or true for the last complete one; None to start anew.

    Raises:
        InputError: no such checkpoint, one without an optimizer, or the run would overwrite an earlier one's.
    """
    wanted = training_args.resume_from_checkpoint
    if wanted in (None, False, "false", "False"):
        if last_complete_checkpoint(training_args.output_dir):
            raise InputError(
                f"--output_dir {training_args.output_dir}: holds checkpoints of an earlier run. Resume it with "
                "--resume_from_checkpoint true, or use another --output_dir"
            )
        check_no_model(training_args.output_dir)
        return None
    if wanted in ("true", "True", True):
        last = last_complete_checkpoint(training_args.output_dir)
        if last:
            logger.info("resuming from %s", last)
            check_optimizer(Path(last))
            warn_of_other_processes(Path(last), training_args.world_size)
        else:
            check_no_model(training_args.output_dir)
        return last
    if not is_complete(Path(wanted)):
        raise InputError(
            f"--resume_from_checkpoint {wanted}: no complete checkpoint there. Use a checkpoint-N folder, or true"
        )
    check_optimizer(Path(wanted))
    warn_of_other_processes(Path(wanted), training_args.world_size)
    return wanted


def decisive_settings(record: dict) -> dict:
    """Of what run.json records, the settings that decide the steps, by name; those that it has."""
    groups = {group: list(names) for group, names in DECISIVE.items()}
    if "diffro" in record["script"]["method"]:
        groups["script"] += DIFFRO
    if record["model"]["use_peft"]:
        groups["model"] += LORA
    settings = {name: record[group][name] for group, names in groups.items() for name in names if name in record[group]}
    modules = record["model"].get("lora_target_modules")
    if record["model"]["use_peft"] and isinstance(modules, list):
        settings["lora_target_modules"] = sorted(modules)
    recipe = record["recipe"]
    micro_batch = recipe["per_device_train_batch_size"]  # how a step is divided is free
    for name in ("gradient_accumulation_steps", "steps_per_generation"):
        if recipe.get(name) is not None:
            settings[f"per_device_train_batch_size × {name}"] = micro_batch * recipe[name]
    # `shuffle_dataset` of an earlier version says False whatever the rows were
    settings |= {"shuffled": record["shuffled"]} if "shuffled" in record else {}
    return settings | {"rewards": record["reward"]}


def sources(record: dict) -> dict:
    """Of what run.json records, the data and the models, by name."""
    names = {name: record["script"].get(name) for name in SOURCES}
    return names | {"model_name_or_path": record["model"]["model_name_or_path"]}


def check_continues(checkpoint: str | None, record: dict) -> dict | None:
    """Check that a run goes on from a checkpoint with the settings it had.

    Args:
        record: what run.json is to record of this run.
    Returns:
        The run.json of the run that wrote the checkpoint; None without a checkpoint, or where it has none.
    Raises:
        InputError: a setting that decides the steps is another, or the file of --dataset has changed.
    """
    if checkpoint is None:
        return None
    try:
        earlier = json.loads((Path(checkpoint).parent / "run.json").read_text(encoding="utf-8"))
        before = decisive_settings(earlier)
    except (OSError, ValueError, KeyError):  # none, or of an older version
        return None
    if earlier["recipe"].get("sync_ref_model"):
        raise InputError(
            f"{checkpoint}: of a run with --sync_ref_model, whose reference model is in no checkpoint. Start anew from "
            f"its weights: --model_name_or_path {checkpoint}, and another --output_dir"
        )
    now = decisive_settings(json.loads(json.dumps(record, default=str)))
    shared = [name for name in before if name in now]  # another version may have other settings
    changed = changed_settings({name: before[name] for name in shared}, {name: now[name] for name in shared})
    if changed:
        raise InputError(
            f"{checkpoint}: is of a run with other settings: {changed}. Resume with the same ones, or use another "
            f"--output_dir. To go on from its weights as a new run: --model_name_or_path {checkpoint}"
        )
    (name_then, digest_then), (name, digest) = [
        (sources(run)["dataset"], run.get("dataset_digest")) for run in (earlier, record)
    ]
    if name == name_then and digest != digest_then and None not in (digest, digest_then):  # None: no file
        raise InputError(
            f"{checkpoint}: {name} has changed since, and the next steps would have other rows. Resume with the file "
            f"as it was, or go on from the weights as a new run: --model_name_or_path {checkpoint}, and another "
            "--output_dir"
        )
    moved = changed_settings(sources(earlier), sources(record))
    if moved:
        logger.warning("%s: is of a run with another %s", checkpoint, moved)
    steps, schedule = [run["recipe"]["max_steps"] for run in (earlier, record)], record["recipe"]["lr_scheduler_type"]
    if steps[0] != steps[1] and not str(schedule).startswith("constant"):
        message = "%s: is of a run of %s steps. With %s the %s schedule of the learning rate is another from here on"
        logger.warning(message, checkpoint, *steps, schedule)
    return earlier


def check_optimizer(checkpoint: Path) -> None:
    """Raises InputError where a checkpoint has no optimizer: the run would go on with a new one and a new schedule."""
    if not any(next(checkpoint.glob(pattern), None) for pattern in OPTIMIZER_STATES):
        raise InputError(
            f"{checkpoint}: has no optimizer (was it saved with --save_only_model?), so the run cannot go on from it. "
            f"To start anew from its weights: --model_name_or_path {checkpoint}, and another --output_dir"
        )


def check_same_shapes(checkpoint: str | None, model: PreTrainedModel) -> None:
    """Raises InputError where a checkpoint's weights have not the shapes of `model`'s, or none of its names.

    Of what one process wrote; FSDP's and DeepSpeed's shards are left to the library.
    """
    if checkpoint is None:
        return
    expected = {name.replace(".default", ""): list(weight.shape) for name, weight in model.named_parameters()}
    stored = {}
    for path in Path(checkpoint).glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            stored |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    shared = stored.keys() & expected.keys()
    differing = sorted(name for name in shared if stored[name] != expected[name])
    if differing or (stored and not shared):
        name = differing[0] if differing else min(stored)
        here = f"shape {expected[name]}" if differing else "no such weight"
        raise InputError(
            f"{checkpoint}: is of another model: {name} has shape {stored[name]} there, and this run's model has "
            f"{here}. Resume with the policy and the adapter of the run that wrote it, or use another --output_dir"
        )


def warn_of_other_processes(checkpoint: Path, processes: int) -> None:
    """Warn where a run goes on with more or fewer processes than wrote the checkpoint; each left its random state."""
    written = len(list(checkpoint.glob("rng_state*.pth")))
    if written not in (0, processes):
        logger.warning(
            "%s was written by %d processes, and %d resume it: a step has another number of rollouts, and prompts and "
            "random numbers are not those of the run as it was",
            checkpoint,
            written,
            processes,
        )


def check_no_model(output_dir: str) -> None:
    """Raises InputError where a trained model would be overwritten."""
    present = [name for name in TRAINED_WEIGHTS if Path(output_dir, name).is_file()]
    if present:
        raise InputError(
            f"--output_dir {output_dir}: holds a trained model ({present[0]}). Use another --output_dir, or delete it"
        )


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint-N that was written to its end."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_complete(folder):
            return str(folder)
        logger.warning("%s is incomplete (an interruption has cut it off) and is passed over", folder)
    if folders:
        logger.warning("%s: no checkpoint is complete, so the run starts anew", output_dir)
    return None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has weights, and a whole trainer_state.json, its last file; and none that `is_cut_off`."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    has_weights = any(next(folder.glob(pattern), None) is not None for pattern in CHECKPOINT_WEIGHTS)
    return has_weights and not any(is_cut_off(file) for file in folder.rglob("*"))  # DeepSpeed and FSDP have folders


def is_cut_off(file: Path) -> bool:
    """Whether a file of weights or states has lost its end: a node that goes down keeps no order of what it writes.

    By a .safetensors file's header and by the end of a zip file, which torch.save writes; neither is read as a whole.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return False
        except (SafetensorError, OSError):  # OSError: a link to what is gone
            return True
    return file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file)


def stop_where_all_steps_are_done(trainer: Trainer) -> None:
    """Let a run resumed from the checkpoint of its last step end with it.

    transformers looks at --max_steps after a step only, so within an epoch it would take one too many.
    """
    run_epoch = trainer._run_epoch

    def run_epoch_unless_done(**state) -> None:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            run_epoch(**state)

    trainer._run_epoch = run_epoch_unless_done
