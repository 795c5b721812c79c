"""Train Llasa to be understood: GRPO on a Whisper reward (arXiv 2509.18798), or the supervised training before it.

    accelerate launch train.py --model_name_or_path HKUSTAudio/Llasa-1B-Multilingual --dataset your_dataset.json \\
      --reward_config reward_models/prosody_reward.json --output_dir llasa-grpo-exp1
    python train.py --config configs/tiny.yaml                       # the small world, two CPU cores
    python train.py --method sft --dataset tokenized_dataset --output_dir llasa-sft
    python train.py --method grpo+diffro --token2text token2text …   # the differentiable reward as well (diffro.py)
    python train.py --task asr --dataset rl_data.parquet …           # the other way round: to understand

--task asr: GRPO for recognition with rule-based rewards (arXiv 2509.18569), after --method sft --task asr, or both.

Every flag of TRL's GRPOConfig (SFTConfig with --method sft) and ModelConfig is a flag here, and a key of --config.
Differs from the paper: the NLL is a mean per token, as in every public code; PPO's clip is TRL's, and does nothing
while each rollout serves one update; the policy is confined to speech codes and END. The paper states no number of
steps, batch size or sampling settings. arXiv 2509.18569 has groups of 12 for recognition, here 8 unless told.
"""

import argparse
import json
import logging
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each run otherwise

import datasets
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import memory
from cli import bad_input_exits, check_writable
from dataset_io import load_any_dataset
from diffro import FILTERS, METHODS, DiffROTrainer
from policy import DEFAULT_CODEC, DEFAULT_WHISPER, load_tokenizer, recorded
from reward_models import DEFAULT_CONFIG, load_config, load_rewards, models_needed, unknown_key
from reward_models.asr_rules import Reader
from reward_models.rollouts import Listener
from reward_models.token2text import Token2Text
from reward_whisper import WhisperScorer
from run_record import SampleSaver, plot_curves, write_run
from speech_codec import SpeechCodec
from speech_tokens import prepare_model, prompt_ids
from speech_trainer import SpeechGRPOTrainer, causal_lm, prepare_vllm
from training_data import grpo_asr_rows, grpo_rows, one_long_epoch, sft_rows

logger = logging.getLogger("train")


@dataclass
class ScriptArguments:
    """What is ours rather than TRL's."""

    dataset: str = field(default=None, metadata={"help": "Hub id, saved folder, or a .json/.jsonl/.csv/.parquet file."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    method: str = field(
        default="grpo",
        metadata={
            "help": "grpo; diffro, the differentiable reward; both; or sft before them.",
            "choices": [*METHODS, "sft"],
        },
    )
    task: str = field(
        default="tts",
        metadata={
            "help": "tts speaks, asr recognises; both makes a supervised example each way of every row (sft only).",
            "choices": ["tts", "asr", "both"],
        },
    )
    reward_config: str = field(
        default=None,
        metadata={"help": "Rewards and their weights; default: reward_models/whisper.json, for asr asr_rules.json."},
    )
    codec_id: str = field(default=None, metadata={"help": "XCodec2; default: the policy's run.json, else the hub's."})
    whisper: str = field(default=None, metadata={"help": "Whisper of the reward; default likewise, else large-v3."})
    token2text: str = field(default=None, metadata={"help": "DiffRO's reward model, from train_token2text.py."})
    diffro_weight: float = field(default=1.0, metadata={"help": "Of DiffRO's loss beside GRPO's (grpo+diffro)."})
    diffro_filter: str = field(
        default=None,
        metadata={
            "help": "Rollouts DiffRO learns from: none (all), positive (advantage above 0), clean (these, if they "
            "ended and do not repeat themselves). Default: none for diffro, clean for grpo+diffro.",
            "choices": list(FILTERS),
        },
    )
    diffro_labels: list[str] = field(
        default_factory=list, metadata={"help": "Columns whose labels DiffRO is to bring out too (token2text's heads)."}
    )
    gumbel_temperature: float = field(default=1.0, metadata={"help": "Of DiffRO's Gumbel-softmax."})
    gumbel_temperature_end: float = field(default=None, metadata={"help": "At the last step; linear in between."})
    gumbel_hard: bool = field(
        default=True, metadata={"help": "token2text reads one code a step (the paper's); false: mixtures of codes."}
    )
    gumbel_draws: int = field(
        default=1, metadata={"help": "DiffRO's reward is the mean over so many draws of each rollout; less noise."}
    )
    sample_steps: int = field(
        default=50, metadata={"help": "Keep a few rollouts as wav every so many steps; 0: never."}
    )
    sample_count: int = field(default=8, metadata={"help": "How many of them."})
    offload_rewards: bool = field(
        default=False, metadata={"help": "Keep codec and Whisper on the CPU while they do not listen."}
    )
    max_length_total: int = field(default=2048, metadata={"help": "Llasa's context: prompt and answer, in tokens."})


# Speech of up to 30 s, Whisper's window; what is said in 30 s
MAX_COMPLETION_LENGTH = {"tts": 1500, "asr": 256}


def _on_gpu() -> bool:
    return torch.cuda.is_available()


@dataclass
class GRPORecipe(GRPOConfig):
    """TRL's GRPOConfig, with every value that shapes the experiment stated here."""

    output_dir: str = "llasa-grpo"
    # arXiv 2509.18798, §4: G = 8, β = 0.1, lr 1e-5 fixed, the loss a mean per sequence; k3 KL, not bias-corrected
    num_generations: int = 8
    beta: float = 0.1
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant"
    loss_type: str = "grpo"
    scale_rewards: str = "group"
    use_bias_correction_kl: bool = False
    # One distribution for sampling and training: temperature only
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    # The cache of keys and values is laid out once; a growing one is copied whole at every code (RESULTS.md)
    cache_implementation: str = "static"
    # With vLLM: over 1,000 codes the default's ratio of whole sequences is about 0 (prepare_vllm)
    vllm_importance_sampling_mode: str = "token_truncate"
    # Not stated there: 64 rollouts a step, each used once
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 8
    num_iterations: int = 1
    epsilon: float = 0.2
    max_completion_length: int | None = None  # filled in: MAX_COMPLETION_LENGTH of the task
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    num_train_epochs: float = 1.0
    mask_truncated_completions: bool = False  # a rollout that never ends earns 0, and learns from it
    # Bookkeeping
    bf16: bool = field(default_factory=_on_gpu)
    use_cpu: bool = field(default_factory=lambda: not _on_gpu())
    logging_steps: float = 1
    save_steps: float = 100
    report_to: str = "none"
    seed: int = 0


@dataclass
class SFTRecipe(SFTConfig):
    """TRL's SFTConfig; the loss is on the answer only: speech codes, or text, and END."""

    output_dir: str = "llasa-sft"
    # Llasa (arXiv 2502.04128): lr 5e-5, cosine, warm-up 3 %, 2,048 tokens
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    max_length: int = 2048
    completion_only_loss: bool = True
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.01
    num_train_epochs: float = 1.0
    train_sampling_strategy: str = "random"
    bf16: bool = field(default_factory=_on_gpu)
    use_cpu: bool = field(default_factory=lambda: not _on_gpu())
    logging_steps: float = 10
    save_steps: float = 500
    report_to: str = "none"
    seed: int = 0


def _method(argv: list[str]) -> str:
    """--method, from the flags or the config file: it decides which other flags there are."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--method")
    peek.add_argument("--config")
    flags, _ = peek.parse_known_args(argv)
    if flags.method is None and flags.config:
        try:
            config = yaml.safe_load(Path(flags.config).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--config {flags.config}: cannot be read: {error}") from None
        flags.method = config.get("method") if isinstance(config, dict) else None
    return flags.method or "grpo"


def _check_names(parser: TrlParser, argv: list[str]) -> None:
    """ValueError for a flag or a config key that does not exist, naming the nearest that does."""
    known = {name.lstrip("-").replace("-", "_") for action in parser._actions for name in action.option_strings}
    for word in argv:
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name not in known | {"config"}:
            raise ValueError(f"{word.split('=')[0]}: {_nearest(name, known)}")
    if "--config" in argv:
        path = argv[argv.index("--config") + 1]
        config = yaml.safe_load(Path(path).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{path}: expected a mapping of settings, got {type(config).__name__}")
        for key in config.keys() - known - {"env"}:
            raise ValueError(f"{path}: {_nearest(key, known)}")


def _nearest(name: str, known: set[str]) -> str:
    # All of TRL's flags would fill the screen.
    return unknown_key(name, sorted(known)).split(" Known:")[0] + " See python train.py --help"


def parse_args(argv: list[str] | None = None) -> tuple[ScriptArguments, GRPORecipe | SFTRecipe, ModelConfig]:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    with bad_input_exits():
        recipe = SFTRecipe if _method(argv) == "sft" else GRPORecipe
        parser = TrlParser((ScriptArguments, recipe, ModelConfig), description=__doc__.split("\n\n")[0])
        _check_names(parser, argv)
        script, args, model_args = parser.parse_args_and_config(argv)
        if script.method != "sft":
            fill_in(script)
            args.max_completion_length = args.max_completion_length or MAX_COMPLETION_LENGTH[script.task]
        return script, args, model_args


def fill_in(script: ScriptArguments) -> None:
    """What --task and --method leave open, and what they rule out."""
    if script.task == "both":
        raise ValueError("--task both is for --method sft; GRPO trains one task at a time: give tts or asr")
    reads = "diffro" in script.method
    if reads and script.task == "asr":
        raise ValueError(f"--method {script.method} is for --task tts: text is no speech that token2text could read")
    if reads and not script.token2text:
        raise ValueError(
            f"--method {script.method} needs --token2text, a folder from train_token2text.py (tiny/token2text)"
        )
    default = "reward_models/token2text.json" if script.method == "diffro" else DEFAULT_CONFIG[script.task]
    script.reward_config = script.reward_config or default
    script.diffro_filter = script.diffro_filter or ("none" if script.method == "diffro" else "clean")


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint-N that was written to its end: trainer_state.json is the last file of one."""
    folders = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            logger.warning("%s is incomplete, the run was stopped while writing it; going back one", folder)
            continue
        return str(folder)
    return None


def find_checkpoint(args: GRPORecipe | SFTRecipe) -> str | None:
    """The checkpoint to go on from: --resume_from_checkpoint takes a folder, or true for the last one."""
    wanted = args.resume_from_checkpoint
    if wanted in (None, "false", "False"):
        if last_complete_checkpoint(args.output_dir):
            raise ValueError(
                f"{args.output_dir} holds checkpoints of an earlier run; go on with --resume_from_checkpoint true, "
                "or give another --output_dir"
            )
        return None
    if wanted in ("true", "True", True):
        last = last_complete_checkpoint(args.output_dir)
        logger.info("going on from %s", last or "the beginning: there is no checkpoint yet")
        return last
    if not Path(wanted, "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {wanted}: no checkpoint there; give a checkpoint-N folder, or true")
    return wanted


def prompts_per_step(args: GRPORecipe) -> int:
    """Different prompts behind one optimizer step; ValueError for a run that could not resume or learn."""
    if args.num_generations < 2:
        raise ValueError(f"--num_generations {args.num_generations}: an advantage needs a group of at least 2")
    rollouts = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.generation_batch_size % args.num_generations or args.per_device_train_batch_size % args.num_generations:
        raise ValueError(
            f"--per_device_train_batch_size {args.per_device_train_batch_size} must be a multiple of "
            f"--num_generations {args.num_generations}: a group is scored together"
        )
    # Between these a checkpoint would lose the rollouts not yet used.
    steps_per_batch = max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
    if args.save_strategy == "steps" and args.save_steps % steps_per_batch:
        raise ValueError(
            f"--save_steps {args.save_steps} must be a multiple of {steps_per_batch}, the optimizer steps made from "
            "one batch of rollouts; a run resumed in between would not go on as it was"
        )
    return max(1, rollouts // args.num_generations // args.num_iterations)


def grpo_dataset(script: ScriptArguments, args: GRPORecipe, tokenizer, tokens) -> tuple[datasets.Dataset, int]:
    """The run's rows in the order they are used, and the tokens of its longest prompt and completion together."""
    rows = load_any_dataset(script.dataset, script.dataset_split)
    lengths = args.max_completion_length, script.max_length_total
    if script.task == "asr":
        rows = grpo_asr_rows(rows, script.dataset, tokenizer, tokens, *lengths)
    else:
        rows = grpo_rows(rows, script.dataset, tokenizer, *lengths, script.diffro_labels)
    per_step = prompts_per_step(args)
    if len(rows) < per_step:
        raise ValueError(
            f"{script.dataset} has {len(rows)} rows and one step takes {per_step} prompts "
            f"(per_device_train_batch_size × gradient_accumulation_steps × processes / num_generations); "
            "add texts or lower the batch"
        )
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * (len(rows) // per_step))
    args.max_steps, args.num_train_epochs, args.shuffle_dataset = steps, 1, False
    longest = max(len(prompt_ids(tokenizer, prompt)) for prompt in rows["prompt"]) + args.max_completion_length
    return one_long_epoch(rows, steps * per_step, args.seed), longest


def load_model(model_args: ModelConfig, tokenizer, tokens, task: str):
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        **{k: v for k, v in options.items() if v is not None},
    )
    prepare_model(model, tokenizer, tokens, task)
    return model


def make_listener(script, args, tokenizer, tokens) -> Listener | Reader:
    """What the rewards of the task look at; text needs neither codec nor Whisper."""
    if script.task == "asr":
        return Reader(tokenizer, tokens.text_end_id)
    needs, codec, scorer, token2text = models_needed(script.reward_config), None, None, None
    if "diffro" in script.method or "token2text" in needs:
        if not script.token2text:
            raise ValueError(f"{script.reward_config}: the reward token2text needs --token2text, its model's folder")
        token2text = Token2Text.from_pretrained(script.token2text, args.device)
    if "codec" in needs:
        codec = SpeechCodec.from_pretrained(script.codec_id, device=args.device)
    if "whisper" in needs:
        scorer = WhisperScorer(script.whisper, device=args.device)
    return Listener(tokens, codec, scorer, args.num_generations, script.offload_rewards, token2text)


def grpo_trainer(script, args, model_args, tokenizer, tokens, rows, longest: int) -> SpeechGRPOTrainer:
    listener = make_listener(script, args, tokenizer, tokens)
    rewards, args.reward_weights = load_rewards(script.reward_config, listener, script.task)
    allowed_ids = tokens.answer_ids(script.task)
    if args.use_vllm:
        prepare_vllm(args, allowed_ids, tokens.answer_end_id(script.task), script.max_length_total)
    if script.method == "grpo":
        trainer_class, own = SpeechGRPOTrainer, {"allowed_ids": allowed_ids}
    else:
        if script.method == "diffro" and args.beta == 0:
            logger.warning(
                "--method diffro with --beta 0: nothing holds the policy near where it started, and on the small world "
                "it learnt to please token2text while listeners understood less (RESULTS.md); the papers have 0.1"
            )
        trainer_class = DiffROTrainer
        own = {
            "tokens": tokens,
            "token2text": listener.token2text,
            "method": script.method,
            "diffro_weight": script.diffro_weight,
            "filter": script.diffro_filter,
            "gumbel_temperature": script.gumbel_temperature,
            "gumbel_temperature_end": script.gumbel_temperature_end,
            "gumbel_hard": script.gumbel_hard,
            "gumbel_draws": script.gumbel_draws,
            "label_columns": tuple(script.diffro_labels),
        }
    trainer = trainer_class(
        **own,
        model=load_model(model_args, tokenizer, tokens, script.task),
        reward_funcs=rewards,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[SampleSaver(listener, script.sample_steps, script.sample_count)],
    )
    if trainer.is_world_process_zero():
        report_memory(trainer, listener, longest)
    return trainer


def report_memory(trainer: SpeechGRPOTrainer, listener: Listener | Reader, longest: int) -> None:
    """Say what a step will need, and warn where the GPU has less."""
    policy = causal_lm(trainer.accelerator.unwrap_model(trainer.model))
    codec, scorer = (getattr(listener, name, None) for name in ("codec", "scorer"))
    parts = memory.estimate(
        policy,
        trainer.ref_model,
        [part.model for part in (codec, scorer) if part],
        memory.listening_bytes(scorer) if scorer else 0,
        memory.shapes_of(policy, trainer.args, longest),
        bool(codec) and listener.offload,
    )
    logger.info(memory.report(parts))
    if trainer.accelerator.device.type == "cuda":
        total = torch.cuda.get_device_properties(trainer.accelerator.device).total_memory
        if parts["peak"] > total:
            logger.warning("the GPU has %.1f GiB: see README.md, When memory runs out", total / memory.GIB)


def sft_trainer(script, args, model_args, tokenizer, tokens, rows) -> SFTTrainer:
    return SFTTrainer(
        model=load_model(model_args, tokenizer, tokens, script.task),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )


def main(arguments: tuple[ScriptArguments, GRPORecipe | SFTRecipe, ModelConfig]) -> None:
    script, args, model_args = arguments
    torch.set_flush_denormal(True)  # on a CPU, weights near zero cost a hundred times as much
    with bad_input_exits():
        for name, value in (("dataset", script.dataset), ("model_name_or_path", model_args.model_name_or_path)):
            if not value:
                raise ValueError(f"--{name} is missing; see python train.py --help")
        check_writable(Path(args.output_dir))
        checkpoint = find_checkpoint(args)
        tokenizer, tokens = load_tokenizer(model_args.model_name_or_path, script.task)
        script.codec_id = script.codec_id or recorded(model_args.model_name_or_path, "codec_id", DEFAULT_CODEC)
        script.whisper = script.whisper or recorded(model_args.model_name_or_path, "whisper", DEFAULT_WHISPER)
        if script.method != "sft":
            rewards = load_config(script.reward_config, script.task)
            rows, longest = grpo_dataset(script, args, tokenizer, tokens)
            trainer = grpo_trainer(script, args, model_args, tokenizer, tokens, rows, longest)
        else:
            rewards = None
            rows = load_any_dataset(script.dataset, script.dataset_split)
            rows = sft_rows(rows, script.dataset, tokenizer, tokens, args.max_length, script.task)
            trainer = sft_trainer(script, args, model_args, tokenizer, tokens, rows)

    facts = {"script": asdict(script), "recipe": args.to_dict(), "model": asdict(model_args), "reward": rewards}
    if trainer.is_world_process_zero():
        write_run(args.output_dir, codec_id=script.codec_id, whisper=script.whisper, seed=args.seed, **facts)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        plot_curves(trainer.state.log_history, Path(args.output_dir) / "reward_curve.png")
        logger.info("saved to %s", args.output_dir)
    # A group that ends while the answer to its last message is still being taken in never ends (gloo, without a word).
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(parse_args())
