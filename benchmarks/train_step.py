"""Time and memory of a GRPO step by phase: ours and the baseline's.

    python benchmarks/train_step.py --size tiny
    python benchmarks/train_step.py --size real --repeats 2 --steps 1  # random weights; a GPU of 80 GB or more

The variants:

    baseline: TRL  TRL's GRPOTrainer as it comes: the whole head with a bias that forbids text tokens, a growing cache,
                   float32 weights cast at every forward, a reward that scores one rollout at a time
    ours           what train.py builds

Both start from the same weights and seed, so their first steps must agree; that is checked.
Flags of train.py may follow; they go to both.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

import reward_whisper
import train
from benchmarks.harness import (
    Timing,
    benchmark_parser,
    host_peak_bytes,
    ratios,
    set_up,
    silence,
    synchronize,
    write_results,
)
from benchmarks.reward import one_at_a_time, random_models
from benchmarks.rollout import BASELINE, LLASA_1B, forbid_by_bias
from common.cli import InputError, bad_input_exits
from common.tables import markdown_table
from reward_models import load_config
from speech.codec import SpeechCodec
from speech.policy import load_tokenizer
from speech.tokens import XCODEC2_CODES
from speech.whisper_scorer import WhisperScorer
from tiny.llasa import new_tokenizer
from training import memory
from training.recipes import Arguments
from training.rows import grpo_dataset

PHASES = ("sampling", "rewards", "loss forward", "backward", "optimizer and the rest")
WARM_UP = 1  # steps of each trainer that are not timed


class PhaseClock(TrainerCallback):
    """Seconds of each phase of each step, by wrapping the trainer's methods; synchronizes a GPU around each phase."""

    def __init__(self, trainer: GRPOTrainer):
        self.device = trainer.accelerator.device
        self.steps: list[dict[str, float]] = []
        self._spent = defaultdict(float)
        self._wrap(trainer, "_generate_single_turn", "sampling")
        self._wrap(trainer, "_calculate_rewards", "rewards")
        self._wrap(trainer, "_compute_loss", "loss forward")
        self._wrap(trainer.accelerator, "backward", "backward")
        trainer.add_callback(self)

    def _wrap(self, owner, name: str, phase: str) -> None:
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            synchronize(self.device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize(self.device)
            self._spent[phase] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    def on_step_begin(self, args, state, control, **_):
        self._spent.clear()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        synchronize(self.device)
        total = time.perf_counter() - self._start
        phases = {phase: self._spent[phase] for phase in PHASES[:-1]}
        self.steps.append(phases | {PHASES[-1]: total - sum(phases.values()), "step": total})


# --- The variants -----------------------------------------------------------------------------------------


def train_arguments(args: argparse.Namespace, folder: str, steps: int) -> Arguments:
    """What train.py parses from its flags: --config, what the benchmark fixes, and the user's."""
    fixed = ["--config", args.config, "--output_dir", folder, "--max_steps", str(steps), "--seed", "0"]
    fixed += ["--save_strategy", "no", "--sample_steps", "0", "--credit", "rollout"]  # TRL's own credit
    return train.parse_args([*fixed, *args.train_flags])


def ours(args: argparse.Namespace, folder: str, steps: int) -> GRPOTrainer:
    script_args, training_args, model_args = train_arguments(args, folder, steps)
    rewards = load_config(script_args.reward_config, script_args.task)
    tokenizer, tokens = load_tokenizer(model_args.model_name_or_path)
    return train.grpo_trainer(script_args, training_args, model_args, rewards, tokenizer, tokens)


def baseline(args: argparse.Namespace, folder: str, steps: int) -> GRPOTrainer:
    script_args, training_args, model_args = train_arguments(args, folder, steps)
    training_args.cache_implementation = None
    tokenizer, tokens = load_tokenizer(model_args.model_name_or_path)
    rows = grpo_dataset(script_args, training_args, tokenizer, tokens).train
    codec = SpeechCodec.from_pretrained(script_args.codec_id, training_args.device)
    scorer = WhisperScorer(script_args.whisper, training_args.device, torch.float32)

    def whisper_reward(completion_ids, text, **_) -> list[float]:
        parsed = [tokens.codes(ids) for ids in completion_ids]
        rollouts = one_at_a_time(codec, scorer, [codes for codes, _ in parsed], text)
        return [
            reward_whisper.reward(rollout.score, truncated)
            for rollout, (_, truncated) in zip(rollouts, parsed, strict=True)
        ]

    model = train.load_model(model_args, tokenizer, tokens, script_args.task)
    forbid_by_bias(model, tokens)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[whisper_reward],
        args=training_args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=train.get_peft_config(model_args),
    )
    if trainer.ref_model is not None:
        forbid_by_bias(trainer.accelerator.unwrap_model(trainer.ref_model), tokens)
    return trainer


VARIANTS = {BASELINE: baseline, "ours": ours}


def run(build: Callable, args: argparse.Namespace, steps: int) -> tuple[list[dict], dict, int | None]:
    """Seconds by phase of the steps after the warm-up, the first step's log, and bytes of the GPU at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        with bad_input_exits():
            trainer = build(args, folder, steps)
        silence(trainer)
        clock = PhaseClock(trainer)
        on_gpu = trainer.accelerator.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return clock.steps[WARM_UP:], trainer.state.log_history[0], peak


def build_real_sizes(folder: Path, seed: int) -> list[str]:
    """Save Llasa-1B, XCodec2 and Whisper large-v3 with random weights to `folder`; returns the flags that name them."""
    policy = folder / "llasa"
    tokenizer = new_tokenizer(["Anna found two boxes."], num_codes=XCODEC2_CODES)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**LLASA_1B)).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    random_models(torch.device("cpu"), seed, folder / "whisper.pt").model.save_pretrained(folder / "codec")
    names = {"model_name_or_path": policy, "codec_id": folder / "codec", "whisper": folder / "whisper.pt"}
    flags = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    return [*flags, "--dataset", "tiny/texts/train.jsonl"]


# --- The script -------------------------------------------------------------------------------------------


def check_equal(first: dict[str, dict], tolerance: float) -> dict[str, list[float]]:
    """Values of the first step's log by key, the baseline's before ours.

    Args:
        first: the first step's log of each variant.
        tolerance: relative above 1, absolute below.
    Raises:
        SystemExit: the variants do not agree.
    """
    compared = {}
    for key in ("reward", "reward_std", "completions/mean_length", "grad_norm"):
        values = [float(log[key]) for log in first.values()]
        compared[key] = values
        print(f"first step, {key}: " + ", ".join(f"{name} {v:.5f}" for name, v in zip(first, values, strict=True)))
        if not abs(values[0] - values[1]) <= tolerance * max(1.0, abs(values[0])):  # NaN fails too
            sys.exit(f"error: {key} differs between the variants; their times would not be comparable")
    return compared


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        device = set_up(args)
        if args.size == "real" and device.type != "cuda":
            raise InputError("--size real: trains 1.4 B weights, which needs a GPU of 80 GB. On a CPU use --size tiny")
    with tempfile.TemporaryDirectory() as folder:
        if args.size == "real":
            args.train_flags = [*build_real_sizes(Path(folder), args.seed), *args.train_flags]
        measure(args, device)


def measure(args: argparse.Namespace, device: torch.device) -> None:
    steps = defaultdict(list)
    first = {}
    peaks = {}
    for _ in range(args.repeats):  # in turn, so that a machine that slows down slows both
        for name, build in VARIANTS.items():
            timed, log, peak = run(build, args, WARM_UP + args.steps)
            steps[name] += timed
            first.setdefault(name, log)
            peaks[name] = peak
    first_step = check_equal(first, tolerance=1e-3 if device.type == "cpu" else 5e-2)

    print("\n" + phase_table(steps))
    whole = {name: Timing([step["step"] for step in steps[name]]) for name in VARIANTS}
    ratio, low, high = ratios(whole[BASELINE], whole["ours"])
    frac_rewards = float(np.median([step["rewards"] / step["step"] for step in steps["ours"]]))
    print(f"\nspeed-up of a step: {ratio:.2f}× ({low:.2f}–{high:.2f}); rewards are {frac_rewards:.1%} of ours")
    if device.type == "cuda":
        print("peak memory: " + ", ".join(f"{name} {peak / memory.GIB:.1f} GiB" for name, peak in peaks.items()))
    else:
        print(f"peak memory of the process, both variants: {host_peak_bytes() / memory.GIB:.2f} GiB")
    results = {
        "steps": steps,
        "first_step": first_step,
        "frac_rewards": frac_rewards,
        "ratio": [ratio, low, high],
        "peak": peaks,
    }
    write_results(args.output_dir, f"train_step_{args.size}", results)


def phase_table(steps: dict[str, list[dict[str, float]]]) -> str:
    """In Markdown, a row for each phase: median seconds of each variant, their fraction of its step, the speed-up."""
    step_seconds = {name: float(np.median([step["step"] for step in steps[name]])) for name in VARIANTS}
    rows = []
    for phase in (*PHASES, "step"):
        seconds = {name: float(np.median([step[phase] for step in steps[name]])) for name in VARIANTS}
        cells = [f"{seconds[name]:.2f} s ({seconds[name] / step_seconds[name]:.0%})" for name in VARIANTS]
        rows.append([phase, *cells, f"{seconds[BASELINE] / max(seconds['ours'], 1e-9):.2f}×"])
    return markdown_table(["phase", *VARIANTS, "speed-up"], rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.usage = "%(prog)s [flags] [flags of train.py]"
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps of each trainer")
    config_help = "YAML file of train.py (default: configs/tiny.yaml; the real size: configs/llasa_1b_a100_40gb.yaml)"
    parser.add_argument("--config", help=config_help)
    args, args.train_flags = parser.parse_known_args(argv)
    args.config = args.config or f"configs/{'tiny' if args.size == 'tiny' else 'llasa_1b_a100_40gb'}.yaml"
    return args


if __name__ == "__main__":
    main(parse_args())
