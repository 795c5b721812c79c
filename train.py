"""Train Llasa with GRPO on a Whisper reward (arXiv 2509.18798), DiffRO, or both; or with SFT, or DPO on preferences.

    accelerate launch train.py --model_name_or_path HKUSTAudio/Llasa-1B-Multilingual --dataset your_dataset.json \\
      --reward_config reward_models/prosody_reward.json --output_dir llasa-grpo-exp1
    python train.py --config configs/tiny.yaml                       # the toy setup, two CPU cores
    python train.py --method sft --model_name_or_path … --dataset tokenized_dataset --output_dir llasa-sft
    python train.py --method dpo --dataset pairs.jsonl …             # preferences (docs/dpo.md)
    python train.py --method grpo+diffro --token2text token2text …   # with the differentiable reward
    python train.py --task asr --dataset rl_data.parquet …           # speech recognition (arXiv 2509.18569)

Every flag of TRL's GRPOConfig (sft: SFTConfig; dpo: DPOConfig) and ModelConfig is a flag here, and a key of --config.

Differs from textbook GRPO: 1. the policy is confined to speech codes and END, in sampling and scoring alike. 2. Each
rollout serves one update, so PPO's clip does nothing. 3. The prompts of a run are one long shuffled epoch, so that it
resumes exactly. Differs from the papers: 4. the NLL is a mean per token, as in every public code. 5. arXiv 2509.18798
states no steps, batch size or sampling settings: ours are in training/recipes.py. 6. arXiv 2509.18569 has groups of 12
for recognition, here 8 by default.
"""

import logging
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each run otherwise

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer
from trl import ModelConfig, get_peft_config

from common.arithmetic import set_up_arithmetic
from common.cli import (
    InputError,
    bad_input_exits,
    check_writable,
    give_usual_mode,
    library_errors_are_input,
    run_script,
    set_up_logging,
)
from common.run_record import content_digest, plot_curves, write_run
from reward_models import RewardConfig, build_rewards, load_config, needs_voice_prompt
from reward_models.rollouts import SpeechRolloutScorer
from reward_models.transcripts import TranscriptScorer
from speech.policy import DEFAULT_CODEC, load_tokenizer, recorded
from speech.tokens import SpeechTokens
from speech.whisper_checkpoint import DEFAULT_WHISPER
from training import memory, recipes
from training.callbacks import ConsoleLog, SampleSaver, console_header
from training.checkpoints import check_continues, check_same_shapes, find_checkpoint, stop_where_all_steps_are_done
from training.diffro import DiffROTrainer
from training.dpo_trainer import SpeechDPOTrainer
from training.gradients import stop_at_broken_gradients
from training.grpo_trainer import SpeechGRPOTrainer
from training.held_out import HeldOutEvaluation
from training.model_card import model_card
from training.models import load_model, load_rollout_scorer
from training.preference_rows import preference_datasets
from training.recipes import DPORecipe, GRPORecipe, ScriptArguments, SFTRecipe
from training.rows import grpo_dataset, sft_datasets
from training.scoring import causal_lm
from training.sft_trainer import SpeechSFTTrainer
from training.vllm_settings import check_vllm_head, prepare_vllm

logger = logging.getLogger("train")

parse_args = partial(recipes.parse_args, description=__doc__)


# --- Trainers ---------------------------------------------------------------------------------------------


def grpo_trainer(
    script_args: ScriptArguments,
    training_args: GRPORecipe,
    model_args: ModelConfig,
    rewards: RewardConfig,
    tokenizer,
    tokens: SpeechTokens,
) -> SpeechGRPOTrainer:
    rows = grpo_dataset(script_args, training_args, tokenizer, tokens, needs_voice_prompt(rewards, script_args.task))
    with training_args.main_process_first(desc="reward models"):  # Whisper's download knows no lock
        rollout_scorer = load_rollout_scorer(script_args, training_args, rewards, rows.languages, tokenizer, tokens)
    reward_functions, training_args.reward_weights = build_rewards(rewards, rollout_scorer, script_args.task)
    held_out = HeldOutEvaluation(rollout_scorer, script_args.eval_temperature)
    held_out.check_metric(training_args, tokens.answer_end_id(script_args.task))
    allowed_ids = tokens.answer_ids(script_args.task)
    if training_args.use_vllm:
        prepare_vllm(training_args, allowed_ids, tokens.answer_end_id(script_args.task), training_args.max_length)
    if script_args.method == "grpo":
        trainer_class = partial(SpeechGRPOTrainer, allowed_ids=allowed_ids, credit=training_args.credit)
    else:
        trainer_class = partial(DiffROTrainer, **diffro_settings(script_args, training_args, rollout_scorer))
    if model_args.model_revision not in (None, "main"):  # the reference model too
        training_args.model_init_kwargs = {"revision": model_args.model_revision}
    model = load_model(model_args, tokenizer, tokens, script_args.task)
    if training_args.use_vllm:
        check_vllm_head(model)
    with library_errors_are_input("train.py", ValueError, OSError):  # --report_to foo, --lora_target_modules foo …
        trainer = trainer_class(
            model=model,
            reward_funcs=reward_functions,
            args=training_args,
            train_dataset=rows.train,
            eval_dataset=rows.held_out,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            held_out=held_out,
        )
    if training_args.use_vllm:  # it has them by now; 65,537 numbers are nothing for run.json
        given = training_args.generation_kwargs.items()
        training_args.generation_kwargs = {name: value for name, value in given if name != "allowed_token_ids"}
    reporters = trainer.callback_handler.callbacks
    trainer.add_callback(SampleSaver(rollout_scorer, script_args.sample_steps, script_args.sample_count, reporters))
    if trainer.is_world_process_zero():
        logger.info("an epoch of %s is %d steps", script_args.dataset, rows.epoch_steps)
        report_memory(trainer, rollout_scorer, rows.longest)
    return trainer


def diffro_settings(
    script_args: ScriptArguments, training_args: GRPORecipe, rollout_scorer: SpeechRolloutScorer
) -> dict:
    """What DiffROTrainer takes besides GRPOTrainer's arguments."""
    if script_args.method == "diffro" and training_args.beta == 0:
        logger.warning(
            "--method diffro with --beta 0: nothing holds the policy near its start, and on the first toy setup "
            "it over-optimized the token-to-text score (docs/experiments/first_toy/diffro.md); the papers have 0.1"
        )
    return {
        "tokens": rollout_scorer.tokens,
        "token2text": rollout_scorer.token2text,
        "method": script_args.method,
        "diffro_weight": script_args.diffro_weight,
        "filter": script_args.diffro_filter,
        "gumbel_temperature": script_args.gumbel_temperature,
        "gumbel_temperature_end": script_args.gumbel_temperature_end,
        "gumbel_hard": script_args.gumbel_hard,
        "gumbel_draws": script_args.gumbel_draws,
        "label_columns": tuple(script_args.diffro_labels),
    }


def report_memory(
    trainer: SpeechGRPOTrainer, rollout_scorer: SpeechRolloutScorer | TranscriptScorer, longest: int
) -> None:
    """Log what a step will need, and warn where the GPU has less."""
    policy = causal_lm(trainer.accelerator.unwrap_model(trainer.model))
    draws, exact_kl = getattr(trainer, "gumbel_draws", 0), getattr(trainer, "diffro_beta", 0.0) > 0
    parts = memory.estimate_run(policy, trainer.ref_model, rollout_scorer, trainer.args, longest, draws, exact_kl)
    total = math.inf
    if trainer.accelerator.device.type == "cuda":
        total = torch.cuda.get_device_properties(trainer.accelerator.device).total_memory
        parts = memory.with_vllm(parts, trainer.args, total)
    logger.info(memory.report(parts))
    if parts["peak"] > total:
        logger.warning("the GPU has %.1f GiB: see docs/memory.md", total / memory.GIB)


def sft_trainer(
    script_args: ScriptArguments, training_args: SFTRecipe, model_args: ModelConfig, tokenizer, tokens: SpeechTokens
) -> SpeechSFTTrainer:
    train_rows, held_out_rows = sft_datasets(script_args, training_args, tokenizer, tokens)
    model = load_model(model_args, tokenizer, tokens, script_args.task)
    with library_errors_are_input("train.py", ValueError, OSError):
        return SpeechSFTTrainer(
            model=model,
            args=training_args,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )


def dpo_trainer(
    script_args: ScriptArguments, training_args: DPORecipe, model_args: ModelConfig, tokenizer, tokens: SpeechTokens
) -> SpeechDPOTrainer:
    train_rows, held_out_rows = preference_datasets(script_args, training_args, tokenizer, tokens)
    if model_args.model_revision not in (None, "main"):  # the reference model too
        training_args.model_init_kwargs = {"revision": model_args.model_revision}
    model = load_model(model_args, tokenizer, tokens, script_args.task)
    with library_errors_are_input("train.py", ValueError, OSError):
        return SpeechDPOTrainer(
            model=model,
            args=training_args,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            allowed_ids=tokens.answer_ids(script_args.task),
        )


SUPERVISED = {"sft": sft_trainer, "dpo": dpo_trainer}  # without rewards


# --- The run ----------------------------------------------------------------------------------------------


def use_own_console_and_card(
    trainer: Trainer, script_args: ScriptArguments, model_args: ModelConfig, rewards: RewardConfig | None
) -> None:
    """Our one-line console in place of transformers' bar and dict, our model card in place of TRL's."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ConsoleLog(console_header(trainer, script_args, model_args.model_name_or_path, rewards)))
    args = trainer.args

    def write_card(*_, **__) -> None:
        if trainer.is_world_process_zero():
            text = model_card(
                name=getattr(trainer, "hub_model_id", None) or args.hub_model_id or args.output_dir,
                base_model=model_args.model_name_or_path,
                method=script_args.method,
                task=script_args.task,
                dataset=script_args.dataset,
                rewards=rewards,
                codec_id=script_args.codec_id,
                log_history=trainer.state.log_history,
                max_length=args.max_length,
            )
            (Path(args.output_dir) / "README.md").write_text(text, encoding="utf-8")

    trainer.create_model_card = write_card


def main(arguments: recipes.Arguments) -> None:
    script_args, training_args, model_args = arguments
    set_up_logging("train")
    set_up_arithmetic()
    with bad_input_exits():
        policy = model_args.model_name_or_path
        for flag, value in (("dataset", script_args.dataset), ("model_name_or_path", policy)):
            if not value:
                raise InputError(f"--{flag}: is missing. See python train.py --help")
        check_writable(Path(training_args.output_dir))
        checkpoint = find_checkpoint(training_args)
        tokenizer, tokens = load_tokenizer(policy, script_args.task, model_args.model_revision)
        script_args.codec_id = script_args.codec_id or recorded(policy, "codec_id", DEFAULT_CODEC)
        script_args.whisper = script_args.whisper or recorded(policy, "whisper", DEFAULT_WHISPER)
        if script_args.method in SUPERVISED:
            rewards = None
            trainer = SUPERVISED[script_args.method](script_args, training_args, model_args, tokenizer, tokens)
        else:
            rewards = load_config(script_args.reward_config, script_args.task)
            trainer = grpo_trainer(script_args, training_args, model_args, rewards, tokenizer, tokens)
        check_same_shapes(checkpoint, trainer.model)
        facts = {"script": asdict(script_args), "recipe": training_args.to_dict(), "model": asdict(model_args)}
        facts |= {"reward": rewards, "shuffled": getattr(training_args, "shuffle_dataset", True)}
        if checkpoint or trainer.is_world_process_zero():  # a large file is not read by all without need
            facts["dataset_digest"] = content_digest(script_args.dataset)
        earlier = check_continues(checkpoint, facts)
    use_own_console_and_card(trainer, script_args, model_args, rewards)
    if trainer.is_world_process_zero():
        models = {"codec_id": script_args.codec_id, "whisper": script_args.whisper}
        resumed = {"resumed_from": checkpoint, "resumed_run": earlier} if checkpoint else {}
        write_run(training_args.output_dir, **models, seed=training_args.seed, **facts, **resumed)
    stop_where_all_steps_are_done(trainer)
    stop_at_broken_gradients(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_fsdp_enabled:  # accelerate's default writes shards, and no model that loads elsewhere
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if trainer.is_world_process_zero():
        output_dir = Path(training_args.output_dir)
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        plot_curves(trainer.state.log_history, output_dir / "reward_curve.png")
    trainer.save_model(training_args.output_dir)  # with --push_to_hub it also uploads the folder, with the card
    trainer.create_model_card()  # after it: PEFT writes its own
    if trainer.is_world_process_zero():
        give_usual_mode(Path(training_args.output_dir))
        logger.info("saved to %s", training_args.output_dir)
    trainer.accelerator.wait_for_everyone()  # else a group may hang at its last message (gloo, without a word)
    trainer.end()


if __name__ == "__main__":
    run_script(main, parse_args)
