"""Where the time and the memory of a GRPO step go, beside the obvious way of making it.

    python benchmarks/train_step.py --size tiny
    python benchmarks/train_step.py --size real --repeats 2 --steps 1   # a GPU of 80 GB or more; random weights

Ours is what train.py builds. The obvious way is TRL's GRPOTrainer as it comes: the whole head with the text tokens
forbidden by a bias, a cache that grows by copying, float32 weights cast at every forward, and a reward that listens
to one rollout at a time. Both start from the same weights and seed, so their first steps must agree.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from harness import Timing, benchmark_parser, host_peak_bytes, ratios, synchronize, table, write_results
from reward import one_at_a_time, random_models
from rollout import LLASA_1B, forbid_by_bias
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOTrainer

import train
from common.cli import pick_device
from speech.codec import SpeechCodec
from speech.policy import load_tokenizer
from speech.whisper_scorer import WhisperScorer
from tiny.llasa import new_tokenizer
from training import memory

PHASES = ("sampling", "rewards", "loss forward", "backward", "optimizer and the rest")
WARM_UP = 1  # steps of each trainer that are not counted


class PhaseClock(TrainerCallback):
    """Seconds of each phase of each step, by wrapping the trainer's methods; a GPU is waited for at every border."""

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


def parsed(args: argparse.Namespace, folder: str, steps: int, flags: list[str]):
    """What train.py makes of its command line."""
    given = ["--config", f"configs/{args.recipe}", "--output_dir", folder, "--max_steps", str(steps), "--seed", "0"]
    return train.parse_args([*given, "--save_strategy", "no", "--sample_steps", "0", *flags])


def ours(args: argparse.Namespace, folder: str, steps: int) -> GRPOTrainer:
    script, recipe, model_args = parsed(args, folder, steps, args.flags)
    tokenizer, tokens = load_tokenizer(model_args.model_name_or_path)
    rows, length = train.grpo_dataset(script, recipe, tokenizer, tokens)
    return train.grpo_trainer(script, recipe, model_args, tokenizer, tokens, rows, length)


def obvious(args: argparse.Namespace, folder: str, steps: int) -> GRPOTrainer:
    script, recipe, model_args = parsed(args, folder, steps, args.flags)
    recipe.cache_implementation = None
    tokenizer, tokens = load_tokenizer(model_args.model_name_or_path)
    rows, _ = train.grpo_dataset(script, recipe, tokenizer, tokens)
    codec = SpeechCodec.from_pretrained(script.codec_id, recipe.device)
    scorer = WhisperScorer(script.whisper, recipe.device, torch.float32)

    def whisper_reward(completion_ids, text, **_) -> list[float]:
        parts = [tokens.codes(ids) for ids in completion_ids]
        heard = one_at_a_time(codec, scorer, [codes for codes, _ in parts], text)
        return [0.0 if truncated else item.reward for item, (_, truncated) in zip(heard, parts, strict=True)]

    model = train.load_model(model_args, tokenizer, tokens, script.task)
    forbid_by_bias(model, tokens)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[whisper_reward],
        args=recipe,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=train.get_peft_config(model_args),
    )
    if trainer.ref_model is not None:
        forbid_by_bias(trainer.accelerator.unwrap_model(trainer.ref_model), tokens)
    return trainer


def run(build, args: argparse.Namespace, steps: int) -> tuple[list[dict], dict, int | None]:
    """Seconds by phase of the steps after the warm-up, the first step's log, and bytes of the GPU at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(args, folder, steps)
        clock = PhaseClock(trainer)
        on_gpu = trainer.accelerator.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return clock.steps[WARM_UP:], trainer.state.log_history[0], peak


def build_real_sizes(folder: Path, seed: int) -> list[str]:
    """Llasa-1B, XCodec2 and Whisper large-v3 with random weights in `folder`: the flags that name them."""
    policy = folder / "llasa"
    tokenizer = new_tokenizer(["Anna found two boxes."], num_codes=65_536)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**LLASA_1B)).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    random_models(torch.device("cpu"), seed, folder / "whisper.pt").model.save_pretrained(folder / "codec")
    names = {"model_name_or_path": policy, "codec_id": folder / "codec", "whisper": folder / "whisper.pt"}
    flags = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    return [*flags, "--dataset", "tiny/texts/train.jsonl"]


def check_equal(first: dict[str, dict], tolerance: float) -> dict[str, list[float]]:
    """The first step's reward and completion length must be the same on both sides; SystemExit otherwise."""
    found = {}
    for key in ("reward", "reward_std", "completions/mean_length", "grad_norm"):
        values = [float(log[key]) for log in first.values()]
        found[key] = values
        print(f"first step, {key}: " + ", ".join(f"{name} {v:.5f}" for name, v in zip(first, values, strict=True)))
        if abs(values[0] - values[1]) > tolerance * max(1.0, abs(values[0])):
            sys.exit(f"error: {key} differs between the sides; their times would not be comparable")
    return found


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    device = torch.device(pick_device(args.device))
    if args.size == "real" and device.type != "cuda":
        sys.exit("error: --size real trains 1.4 B weights: it needs a GPU of 80 GB; on a CPU use --size tiny")
    with tempfile.TemporaryDirectory() as folder:
        if args.size == "real":
            args.flags = [*build_real_sizes(Path(folder), args.seed), *args.flags]
        measure(args, device)


def measure(args: argparse.Namespace, device: torch.device) -> None:
    sides = {"obvious": obvious, "ours": ours}
    steps, first, peaks = defaultdict(list), {}, {}
    for _ in range(args.repeats):  # in turn, so that a machine that slows down slows both
        for name, build in sides.items():
            timed, log, peak = run(build, args, WARM_UP + args.steps)
            steps[name] += timed
            first.setdefault(name, log)
            peaks[name] = peak
    first_steps = check_equal(first, tolerance=1e-3 if device.type == "cpu" else 5e-2)

    rows = []
    for phase in (*PHASES, "step"):
        seconds = {name: float(np.median([step[phase] for step in steps[name]])) for name in sides}
        whole = {name: float(np.median([step["step"] for step in steps[name]])) for name in sides}
        row = [phase]
        for name in sides:
            row.append(f"{seconds[name]:.2f} s ({seconds[name] / whole[name]:.0%})")
        rows.append([*row, f"{seconds['obvious'] / max(seconds['ours'], 1e-9):.2f}×"])
    print("\n" + table(["phase", *sides, "ratio"], rows))
    whole = {name: Timing([step["step"] for step in steps[name]]) for name in sides}
    ratio, low, high = ratios(whole["obvious"], whole["ours"])
    share = float(np.median([step["rewards"] / step["step"] for step in steps["ours"]]))
    print(f"\na step: {ratio:.2f}× ({low:.2f}–{high:.2f}); rewards are {share:.1%} of ours")
    if device.type == "cuda":
        print("memory at the peak: " + ", ".join(f"{n} {b / memory.GIB:.1f} GiB" for n, b in peaks.items()))
    else:
        print(f"memory at the peak, whole process, both sides: {host_peak_bytes() / memory.GIB:.2f} GiB")
    write_results(
        args.output_dir,
        f"train_step_{args.size}",
        {"steps": steps, "first_step": first_steps, "reward_share": share, "ratio": [ratio, low, high], "peak": peaks},
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each trainer")
    parser.add_argument("--recipe", help="file of configs/; default: tiny.yaml, or llasa_1b_a100_40gb.yaml")
    args, args.flags = parser.parse_known_args(argv)  # what is not ours goes to train.py
    args.recipe = args.recipe or ("tiny.yaml" if args.size == "tiny" else "llasa_1b_a100_40gb.yaml")
    return args


if __name__ == "__main__":
    main(parse_args())
