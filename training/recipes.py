"""The flags of train.py: what is ours, TRL's configs with the values of the experiment, and their parsing."""

import argparse
import math
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig, TrlParser

from common.cli import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    InputError,
    bad_input_exits,
    check_ranges,
    did_you_mean,
    library_errors_are_input,
    show_tracebacks,
)
from reward_models import DEFAULT_CONFIG
from speech.adapters import ADAPTER_CONFIG
from speech.speaker_encoder import DEFAULT_SPEAKER_ENCODER
from speech.tokens import MAX_COMPLETION_LENGTH, MAX_LENGTH
from speech.whisper_checkpoint import DEFAULT_WHISPER
from training.diffro import FILTERS, METHODS
from training.unsupported import check_flags, check_machine

LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]  # TRL's
# TRL's of DPO; exo_pair and robust need --label_smoothing
DPO_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
DPO_LOSSES += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
# Of the held-out metrics; of all others lower is better
HIGHER_IS_BETTER = ("text_log_prob", "log_f0_std", "frac_exact", "dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak")
# Ranges of numbers that transformers and TRL take unchecked: a NaN among them trains to NaN weights without a word
TRAINING_RANGES = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": FRACTION,
    "adam_beta2": FRACTION,
    "adam_epsilon": POSITIVE,
    "warmup_steps": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "max_length": COUNT,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "logging_steps": POSITIVE,
    "save_total_limit": COUNT,
    "seed": (0, True, 2**32 - 1, True),
}
GRPO_RANGES = TRAINING_RANGES | {
    "beta": NOT_NEGATIVE,
    "epsilon": POSITIVE,
    "temperature": POSITIVE,
    "top_p": (0, False, 1, True),
    "top_k": (-1, True, math.inf, False),  # −1 is vLLM's 0
    "min_p": (0, True, 1, True),
    "repetition_penalty": POSITIVE,
    "num_iterations": COUNT,
    "num_generations": (2, True, math.inf, False),  # an advantage needs a group
    "max_completion_length": COUNT,
    "vllm_gpu_memory_utilization": (0, False, 1, True),
}
DPO_RANGES = TRAINING_RANGES | {"beta": POSITIVE, "label_smoothing": (0, True, 0.5, False)}
SCRIPT_RANGES = {
    "diffro_weight": NOT_NEGATIVE,
    "gumbel_temperature": POSITIVE,
    "gumbel_temperature_end": POSITIVE,
    "gumbel_draws": COUNT,
    "sample_steps": NOT_NEGATIVE,
    "sample_count": NOT_NEGATIVE,
    "eval_temperature": NOT_NEGATIVE,  # 0 is greedy
}
LORA_RANGES = {"lora_r": COUNT, "lora_alpha": POSITIVE, "lora_dropout": FRACTION}


@dataclass
class ScriptArguments:
    """The flags that are ours rather than TRL's."""

    dataset: str = field(
        default=None,
        metadata={"help": "training rows: hub id, saved folder, or a .json/.jsonl/.csv/.tsv/.parquet file"},
    )
    split: str = field(default="train", metadata={"help": "split of --dataset to train on"})
    eval_dataset: str = field(
        default=None,
        metadata={"help": "held-out rows, in any form of --dataset, evaluated at every --eval_steps"},
    )
    eval_split: str = field(default="train", metadata={"help": "split of --eval_dataset"})
    eval_temperature: float = field(
        default=0.3, metadata={"help": "sampling temperature of the held-out rows; 0 is greedy"}
    )
    method: str = field(
        default="grpo",
        metadata={
            "help": "training method; diffro is the differentiable reward, sft supervised training, dpo learns from "
            "pairs of preferences",
            "choices": ["grpo", *METHODS, "sft", "dpo"],
        },
    )
    task: str = field(
        default="tts",
        metadata={
            "help": "tts: text to speech; asr: speech to text; both: multitask, for --method sft only",
            "choices": ["tts", "asr", "both"],
        },
    )
    reward_config: str = field(
        default=None,
        metadata={
            "help": "JSON file of rewards and weights (default: reward_models/whisper.json; asr: asr_rules.json)"
        },
    )
    codec_id: str = field(
        default=None, metadata={"help": "XCodec2, hub id or folder (default: the policy's run.json, else the hub's)"}
    )
    whisper: str = field(
        default=None,
        metadata={
            "help": "Whisper of the reward, as in docs/rewards.md (default: the policy's run.json, else "
            f"{DEFAULT_WHISPER})"
        },
    )
    speaker_encoder: str = field(
        default=DEFAULT_SPEAKER_ENCODER,
        metadata={"help": "x-vector model of the reward speaker_similarity, hub id or folder in transformers' format"},
    )
    token2text: str = field(
        default=None, metadata={"help": "folder of DiffRO's reward model, from train_token2text.py"}
    )
    preference_model: str = field(
        default=None, metadata={"help": "folder of the reward preference's model, from train_preference_model.py"}
    )
    diffro_weight: float = field(
        default=1.0, metadata={"help": "weight of DiffRO's loss beside GRPO's, for grpo+diffro"}
    )
    diffro_filter: str = field(
        default=None,
        metadata={
            "help": "rollouts DiffRO learns from: all, positive advantage, or of these the clean ones (neither "
            "truncated nor repetitive); default: none for diffro, clean for grpo+diffro",
            "choices": list(FILTERS),
        },
    )
    diffro_labels: list[str] = field(
        default_factory=list,
        metadata={"help": "columns whose labels DiffRO rewards too (heads of the token-to-text model)"},
    )
    gumbel_temperature: float = field(default=1.0, metadata={"help": "temperature of DiffRO's Gumbel-softmax"})
    gumbel_temperature_end: float = field(
        default=None, metadata={"help": "Gumbel temperature at the last step, linear in between"}
    )
    gumbel_hard: bool = field(
        default=True, metadata={"help": "straight-through codes (the paper's); false: mixtures of codes"}
    )
    gumbel_draws: int = field(default=1, metadata={"help": "Gumbel draws averaged for each rollout"})
    sample_steps: int = field(default=50, metadata={"help": "steps between saved rollouts (wav, transcript); 0: never"})
    sample_count: int = field(default=8, metadata={"help": "number of rollouts saved each time"})
    offload_rewards: bool = field(
        default=False, metadata={"help": "keep codec, Whisper and speaker encoder on the CPU while they do not score"}
    )


@dataclass
class GRPORecipe(GRPOConfig):
    """TRL's GRPOConfig. Stated here: the paper's values, ours, and those of TRL's that the experiment hangs on.

    The rest, AdamW's numbers and the asymmetric clip among them, has TRL's and transformers' defaults; run.json records
    all of them.
    """

    output_dir: str = "llasa-grpo"
    # arXiv 2509.18798, §4: G = 8, β = 0.1, lr 1e-5 fixed, the loss a mean per sequence; k3 KL, not bias-corrected
    num_generations: int = 8
    beta: float = 0.1
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant_with_warmup"  # fixed, unless --warmup_steps is above 0
    loss_type: str = field(default="grpo", metadata={"help": "the loss over tokens", "choices": LOSSES})
    scale_rewards: str = field(
        default="group",
        metadata={"help": "by whose standard deviation advantages are divided", "choices": ["group", "batch", "none"]},
    )
    # Of several rewards: their weighted sum is normalised in its group; normalize_then_sum is GDPO (arXiv 2601.05242)
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "several rewards: normalise their sum in the group, or each reward, then sum (GDPO)",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )
    use_bias_correction_kl: bool = False
    credit: str = field(
        default="rollout",
        metadata={
            "help": "what a reward moves: all codes of a rollout, or those of the word or the end that it is about",
            "choices": ["rollout", "time"],
        },
    )
    # One distribution for sampling and training: temperature only
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    # The KV cache is allocated once; a growing one is copied whole at every code (docs/speed.md)
    cache_implementation: str = "static"
    # With vLLM: over 1,000 codes the default's ratio of whole sequences is about 0 (prepare_vllm)
    vllm_importance_sampling_mode: str = "token_truncate"
    # Not stated there: 64 rollouts a step, each used once
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 8
    num_iterations: int = 1
    epsilon: float = 0.2
    max_length: int = MAX_LENGTH
    max_completion_length: int | None = None  # filled in: MAX_COMPLETION_LENGTH of the task
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    num_train_epochs: float = 1.0
    disable_dropout: bool = True  # LoRA's 0.05 would make sampling and scoring two different models
    mask_truncated_completions: bool = False  # a truncated rollout earns 0, and is learnt from
    gradient_checkpointing: bool = True  # docs/memory.md counts on it
    # Held-out rows (held_out.py): each is sampled once, so many at a time
    num_generations_eval: int = 1
    per_device_eval_batch_size: int = 64
    eval_steps: float = 100
    # Bookkeeping
    bf16: bool | None = None  # filled in; a bool's default_factory is not called by transformers' parser
    dataloader_pin_memory: bool = torch.cuda.is_available()
    logging_steps: float = 1
    save_steps: float = 100
    save_total_limit: int = 2  # a checkpoint of Llasa-1B is 16 GB
    report_to: list[str] = field(default_factory=lambda: ["none"])
    seed: int = 0

    def __post_init__(self):
        check_training(self, GRPO_RANGES)
        fill_in_number_format(self)
        if self.load_best_model_at_end or self.save_strategy == "best" or self.metric_for_best_model:
            self.metric_for_best_model = self.metric_for_best_model or "wer"
            if self.greater_is_better is None:
                self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") in HIGHER_IS_BETTER
        super().__post_init__()


@dataclass
class SFTRecipe(SFTConfig):
    """TRL's SFTConfig; the loss is on the answer only: speech codes, or text, and END."""

    output_dir: str = "llasa-sft"
    # Llasa (arXiv 2502.04128): lr 5e-5, cosine, warm-up 3 %, 2,048 tokens
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    max_length: int = MAX_LENGTH
    completion_only_loss: bool = True
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.01
    num_train_epochs: float = 1.0
    train_sampling_strategy: str = "random"
    bf16: bool | None = None  # filled in; a bool's default_factory is not called by transformers' parser
    dataloader_pin_memory: bool = torch.cuda.is_available()
    logging_steps: float = 10
    save_steps: float = 500
    eval_steps: float = 500
    save_total_limit: int = 2
    report_to: list[str] = field(default_factory=lambda: ["none"])
    seed: int = 0

    def __post_init__(self):
        check_training(self, TRAINING_RANGES)
        fill_in_number_format(self)
        super().__post_init__()


@dataclass
class DPORecipe(DPOConfig):
    """TRL's DPOConfig. Stated here: the paper's values, ours, and those of TRL's that the experiment hangs on."""

    output_dir: str = "llasa-dpo"
    # DPO (arXiv 2305.18290): β = 0.1, the sigmoid loss on log-probs summed over an answer, no label smoothing
    beta: float = 0.1
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": f"losses that are summed, of {', '.join(DPO_LOSSES)}"}
    )
    label_smoothing: float = 0.0
    # Ours. There lr 1e-6 and 64 pairs a step, for 100,000s of pairs; a round of preferences is a few hundred
    # (arXiv 2509.18531, which states neither)
    learning_rate: float = 5e-6
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    max_length: int = MAX_LENGTH
    disable_dropout: bool = True  # policy and reference are one model at the start
    precompute_ref_log_probs: bool = False
    sync_ref_model: bool = False
    gradient_checkpointing: bool = True
    train_sampling_strategy: str = "random"
    # Bookkeeping
    bf16: bool | None = None  # filled in; a bool's default_factory is not called by transformers' parser
    dataloader_pin_memory: bool = torch.cuda.is_available()
    logging_steps: float = 1
    save_steps: float = 100
    eval_steps: float = 100
    save_total_limit: int = 2
    report_to: list[str] = field(default_factory=lambda: ["none"])
    seed: int = 0

    def __post_init__(self):
        check_training(self, DPO_RANGES)
        fill_in_number_format(self)
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        for loss in self.loss_type:
            if loss not in DPO_LOSSES:
                raise InputError(f"--loss_type: must be of {', '.join(DPO_LOSSES)} (got {loss!r})")
        super().__post_init__()


def check_training(args: TrainingArguments, ranges: dict) -> None:
    """Raises InputError for numbers that nothing can be trained with."""
    check_ranges(args, ranges)
    if args.max_steps == 0 or args.max_steps < -1:
        raise InputError(f"--max_steps: must be >= 1, or -1 for --num_train_epochs (got {args.max_steps})")
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        raise InputError(
            f"--warmup_steps {args.warmup_steps:g}: --lr_scheduler_type constant does not warm up. "
            "Use constant_with_warmup, or --warmup_steps 0"
        )


def fill_in_number_format(args: TrainingArguments) -> None:
    """bfloat16 autocast on a GPU, unless the flags say otherwise."""
    if args.bf16 is None:
        args.bf16 = torch.cuda.is_available() and not (args.use_cpu or args.fp16)


Recipe = GRPORecipe | SFTRecipe | DPORecipe
TEXTS = {field.name for field in fields(ScriptArguments) if field.type is str} | {"model_name_or_path", "output_dir"}
RECIPES = {"sft": SFTRecipe, "dpo": DPORecipe}  # of the other methods GRPORecipe
Arguments = tuple[ScriptArguments, Recipe, ModelConfig]

# TRL's flags that --help shows beside ours; --help_all has them all
COMMON_FLAGS = {
    "model_name_or_path": "the policy to start from: hub id or folder (LoRA too)",
    "output_dir": "folder of checkpoints, log, samples and the trained model",
    "resume_from_checkpoint": "true: resume from the last checkpoint of --output_dir; or a checkpoint-N folder",
    "max_steps": "number of optimizer steps; else --num_train_epochs",
    "num_train_epochs": "number of passes over the data set",
    "learning_rate": "learning rate of AdamW",
    "per_device_train_batch_size": "rollouts (sft: rows, dpo: pairs) of one forward of the loss",
    "gradient_accumulation_steps": "forwards per optimizer step",
    "num_generations": "rollouts per prompt, the group size G",
    "max_length": "tokens of prompt and answer together",
    "max_completion_length": "tokens of an answer (default: {tts} for tts, 30 s; {asr} for asr)".format(
        **MAX_COMPLETION_LENGTH
    ),
    "temperature": "sampling temperature of the rollouts",
    "multi_objective_aggregation": "normalize_then_sum: each reward is normalised in its group before the sum (GDPO)",
    "credit": "time: a reward moves the codes of the words it is about, not the whole rollout (docs/rewards.md)",
    "beta": "weight of the KL to the reference policy; 0 drops the reference (dpo: above 0)",
    "bf16": "bfloat16 autocast (default: true on a GPU)",
    "dtype": "dtype of the weights, float32 or (with LoRA) bfloat16",
    "gradient_checkpointing": "recompute activations in the backward pass",
    "use_peft": "train a LoRA adapter instead of all weights",
    "lora_r": "rank of the LoRA adapter",
    "use_vllm": "sample with vLLM (docs/vllm.md)",
    "save_steps": "steps between checkpoints",
    "eval_strategy": "steps: evaluate --eval_dataset while training (docs/metrics.md)",
    "eval_steps": "steps between evaluations",
    "load_best_model_at_end": "end with the best evaluated checkpoint, by --metric_for_best_model (wer)",
    "report_to": "tensorboard, trackio or wandb: curves and audio samples (default: none)",
    "push_to_hub": "upload model, card and samples to the hub (--hub_model_id)",
    "seed": "random seed",
    "debug": "show the traceback of an input error",
}


def parse_args(argv: list[str] | None = None, description: str = "") -> Arguments:
    """The flags of train.py, from the command line and from the YAML file of --config.

    Raises:
        SystemExit: after --help and --help_all; with code 2 for bad input, after a message of one line.
    """
    # transformers 5.23 warns of names that TRL 1.16 uses; nothing that a user of train.py could change
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    first, argv = _first_look(sys.argv[1:] if argv is None else argv)
    show_tracebacks(first.debug is True)
    with bad_input_exits():
        if first.config is not None and len(first.config) > 1:
            raise InputError(f"--config: give one file (got {' and '.join(first.config)})")
        config_path = first.config[0] if first.config else None
        config = {} if config_path is None else _read_config(config_path)
        recipe = RECIPES.get(str(first.method or config.get("method")), GRPORecipe)
        # A lone --help is answered below, with fewer flags than the parser would print.
        parser = TrlParser((ScriptArguments, recipe, ModelConfig), description=description, usage="train.py [flags]")
        if {"-h", "--help", "--help_all"} & set(argv):
            _print_help(parser, everything="--help_all" in argv)
            sys.exit(0)
        _check_names(parser, argv, config, config_path)
        with library_errors_are_input("train.py", ValueError):
            script_args, training_args, model_args = parser.parse_args_and_config(argv)
        check_machine(training_args, model_args)
        lora = model_args.use_peft or Path(model_args.model_name_or_path or "", ADAPTER_CONFIG).is_file()
        check_flags(training_args, model_args, lora)
        # autocast would cast the frozen float32 weights anew for every code; vLLM does not sample under it
        sampled_here = not getattr(training_args, "use_vllm", False)
        dtype_given = "dtype" in config or first.dtype is not None
        if lora and not dtype_given and training_args.bf16 and sampled_here:
            model_args.dtype = "bfloat16"
        if lora and not sampled_here and model_args.dtype not in (None, "float32"):
            raise InputError(
                f"--dtype {model_args.dtype}: not for LoRA with --use_vllm. For vLLM the adapter is added to the base "
                "weights and taken off again at every step, and in half precision that leaves them changed. Use "
                "--dtype float32"
            )
        check_ranges(script_args, SCRIPT_RANGES)
        check_ranges(model_args, LORA_RANGES)
        _check_evaluation(script_args, training_args)
        if script_args.method == "dpo" and script_args.task != "tts":
            raise InputError(f"--task {script_args.task}: for --method dpo tts only, its pairs are of speech")
        if script_args.method == "grpo+diffro" and script_args.diffro_weight == 0:
            raise InputError("--diffro_weight 0: GRPO alone is --method grpo. Use that, or a weight above 0")
        if script_args.method not in RECIPES:
            _fill_in(script_args)
            if training_args.credit == "time" and (script_args.method, script_args.task) != ("grpo", "tts"):
                raise InputError(
                    f"--credit time: for --method grpo --task tts only (got {script_args.method}, {script_args.task}). "
                    "Give --credit rollout, also where a config sets it"
                )
            if training_args.credit == "time" and training_args.scale_rewards != "group":
                raise InputError(
                    f"--scale_rewards {training_args.scale_rewards}: --credit time normalises each reward by its "
                    "group's deviation. Use group, or --credit rollout"
                )
            longest = training_args.max_completion_length or MAX_COMPLETION_LENGTH[script_args.task]
            training_args.max_completion_length = longest
    return script_args, training_args, model_args


def _first_look(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that decide how the others are read; and all of them as TrlParser takes them."""
    parser = argparse.ArgumentParser(usage="train.py [flags]", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="", action="append")
    parser.add_argument("--debug", nargs="?", const=True)  # ours has no value, transformers' has one
    parser.add_argument("--method")
    parser.add_argument("--dtype")
    first, _ = parser.parse_known_args(argv)
    # It looks for --config FILE in two words
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    return first, [word for word in words if word != "--debug" or first.debug is not True]


def _read_config(path: str) -> dict:
    """What the file of --config says."""
    if not path:
        raise InputError("--config: needs the path of a YAML file, such as configs/tiny.yaml")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"--config {path}: expected a mapping of settings (got {type(config).__name__})")
    return config


def _check_names(parser: TrlParser, argv: list[str], config: dict, path: str | None) -> None:
    """Raises InputError for a flag or a config key that does not exist, naming the nearest that does."""
    known = {name.lstrip("-").replace("-", "_") for action in parser._actions for name in action.option_strings}
    flags = [word.split("=")[0] for word in argv if word.startswith("--")]
    names = [flag.lstrip("-").replace("-", "_") for flag in flags]
    for flag, name in zip(flags, names, strict=True):
        if name not in known | {"config"}:
            raise InputError(f"unknown flag {flag}{_instead(name, known)} See python train.py --help")
    for key in config.keys() - known - {"env"}:
        raise InputError(f"{path}: unknown key {key!r}{_instead(str(key), known)} See python train.py --help")
    for action in parser._actions:
        if action.dest in config:
            _check_value(f"{path}: {action.dest}", action, config[action.dest])
    stated = str(config.get("max_steps", -1))
    if "num_train_epochs" in names and stated != "-1" and "max_steps" not in names:
        raise InputError(f"--num_train_epochs: has no effect beside max_steps: {stated} of {path}. Add --max_steps -1")


def _instead(name: str, known: set[str]) -> str:
    """What to use in place of a name that is none here: whose setting it is, or the nearest name."""
    for recipe, method in ((GRPORecipe, "grpo"), (DPORecipe, "dpo"), (SFTRecipe, "sft")):
        if name in {field.name for field in fields(recipe)}:
            return f": it is a setting of --method {method}."
    return did_you_mean(name, known) or "."


def _check_value(where: str, action: argparse.Action, value: object) -> None:
    """Raises InputError for a value of a config file that its flag does not take; TrlParser takes them unchecked."""
    if action.choices and value not in action.choices:
        raise InputError(f"{where} must be one of {', '.join(map(str, action.choices))} (got {value!r})")
    if value is None and action.default is None:  # as if it were left out
        return
    if action.dest in TEXTS and not isinstance(value, str):
        raise InputError(f"{where} must be text (got {value!r}). Leave it out for its default")
    if action.type not in (int, float) or action.nargs is not None or isinstance(value, str):  # argparse reads these
        return
    whole = action.type is int
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise InputError(f"{where} must be a {'whole ' if whole else ''}number (got {value!r})")


def _print_help(parser: TrlParser, everything: bool) -> None:
    """Our flags and COMMON_FLAGS, a line each; with `everything` TRL's and transformers' too."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these flags; the command line wins")
    parser.add_argument("--help_all", action="store_true", help="show the flags of TRL and transformers too")
    ours = {one.name for one in fields(ScriptArguments)} | {"config", "help", "help_all"}
    needed = ["help", "config", "model_name_or_path", "dataset", "output_dir"]
    parser._optionals._group_actions.sort(key=lambda action: action.dest not in needed)  # stable: the others stay put
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]  # --a_b; --a-b is understood too
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
        elif action.dest in COMMON_FLAGS:
            action.help = COMMON_FLAGS[action.dest]
        elif action.dest not in ours and not everything:
            action.help = argparse.SUPPRESS
        if action.dest == "debug":
            action.nargs = 0
        elif action.nargs != 0 and not action.choices and action.dest != "config":
            action.metavar = "X"
        no_default = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if action.dest in {*ours, *COMMON_FLAGS} and not no_default and "default:" not in action.help:
            action.help += f" (default: {action.default})"
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=40, width=120)
    parser.print_help()


def _check_evaluation(script_args: ScriptArguments, training_args: Recipe) -> None:
    """Raises InputError for held-out rows that would not be used, and for an evaluation without them."""
    evaluates = training_args.eval_strategy != "no" or training_args.eval_on_start
    if evaluates and not script_args.eval_dataset:
        raise InputError("--eval_strategy: needs --eval_dataset, the held-out rows to evaluate")
    if script_args.eval_dataset and not evaluates:
        raise InputError("--eval_dataset: is not used without --eval_strategy. Add --eval_strategy steps")


def _fill_in(script_args: ScriptArguments) -> None:
    """The defaults that --task and --method decide, and the combinations that they rule out."""
    method, task = script_args.method, script_args.task
    if task == "both":
        raise InputError("--task both: for --method sft only, RL trains one task at a time. Use --task tts or asr")
    if "diffro" in method and task == "asr":
        raise InputError(f"--method {method}: for --task tts only, text is no speech that token2text could read")
    if "diffro" in method and not script_args.token2text:
        raise InputError(
            f"--method {method} needs --token2text, a folder from train_token2text.py such as tiny/token2text"
        )
    default = "reward_models/token2text.json" if method == "diffro" else DEFAULT_CONFIG[task]
    script_args.reward_config = script_args.reward_config or default
    if isinstance(script_args.diffro_labels, str):  # one label in a YAML file
        script_args.diffro_labels = [script_args.diffro_labels]
    script_args.diffro_filter = script_args.diffro_filter or ("none" if method == "diffro" else "clean")
