r"""The whole chain once at full size, before GPUs are rented for it: build, train, save, load, synthesize, and check.

    python benchmarks/readiness.py              # a GPU: the published sizes with random weights, some minutes
    python benchmarks/readiness.py --size tiny  # the toy setup, a minute on a CPU
    python benchmarks/readiness.py --model_name_or_path HKUSTAudio/Llasa-1B-Multilingual \
      --codec_id HKUSTAudio/xcodec2 --whisper large-v3  # the published weights; each may be named alone

train.py makes --steps updates and saves, inference.py loads that and synthesizes. Flags of train.py may follow, those
of the run that is planned (--use_peft true, --per_device_train_batch_size 4). Exit code 1 where a check falls short:

    finite         every number that train.py logs; a pitch may be missing where nothing is voiced
    gradient       above 0: rewards differ within groups, and the loss reaches the weights
    number format  the policy's layers compute in half precision; float32 takes several times as long
    log-probs      what the sampler drew from (with its cache of keys and values) is what the loss scores; with
                   --use_vllm true as vLLM reports it, in the last step
    memory         peak of the GPU against the estimate that train.py prints (training/memory.py)
    attention      values and gradients are finite at every length from 1 to 256, with left padding
                   (common/arithmetic.py); on a GPU also what cuDNN, which trainings do without, would give
    speech         inference.py writes finite clips with what was saved

Seconds are those of the steps after the first, which compiles kernels; sampling stands beside what reading weights and
keys and values at the measured memory bandwidth would take.

Random weights: END is made so likely that a rollout ends after --max_completion_length codes on average: some earn a
reward, some are truncated. The transcripts of a random Whisper neither end nor agree with a text, its worst case.
"""

import argparse
import contextlib
import gc
import logging
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import scaled_dot_product_attention
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

import inference
import train
from benchmarks.harness import memory_bandwidth, write_results
from benchmarks.published_layout import save_llasa
from benchmarks.reward import clocked, random_models
from common.arithmetic import set_up_arithmetic
from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_writable,
    set_up_logging,
)
from common.tables import markdown_table
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.policy import MIN_ROOM
from speech.tokens import prompt_ids, tts_prompt
from speech.whisper_scorer import WhisperScorer
from training import memory
from training.grpo_trainer import SpeechGRPOTrainer
from training.scoring import causal_lm

logger = logging.getLogger("benchmarks")

# Of a code, on average, in nats for each nat of the logits' standard deviation: rounding is relative, and in bfloat16
# random models have 0.002 to 0.018 of it, the toy policy 0.003 (docs/experiments/gpu_numerics.md)
MAX_LOG_PROB_DIFFERENCE = 0.02
MAX_MEMORY_ERROR = 0.15  # of the estimate
MAY_BE_MISSING = {"log_f0_std"}
COMPARED_CODES = 64  # of each of two rollouts
ATTENTION_LENGTHS = 256  # two periods of the bug in common/arithmetic.py
HEAD_SIZES = (48, 64)  # of the toy policies and of Llasa-1B
BUILT_BYTES = 14e9  # the three checkpoints, and what train.py saves
TEXTS = "tiny/texts/train.jsonl"
PHASES = ("sampling", "codec", "Whisper", "loss", "step")
NAMED = ("model_name_or_path", "codec_id", "whisper")
CONFIGS = {"tiny": "configs/tiny.yaml", "real": "configs/llasa_1b_a100_40gb.yaml"}
# With random weights no transcript resembles its text: WER and NLL earn 1e-11, so duration and pitch must differ
REAL = ["--reward_config", "reward_models/prosody_reward.json"]
# What makes the toy setup's step short, and a CPU compute as a GPU does
TINY = [
    "--per_device_train_batch_size",
    "8",
    "--num_generations",
    "4",
    "--max_completion_length",
    "140",
    "--beta",
    "0.1",
]
ON_A_CPU = ["--use_cpu", "true", "--bf16", "true"]


@dataclass
class Check:
    """One row of the table; `passed` is None where nothing was measured."""

    name: str
    limit: str
    measured: str
    passed: bool | None


@dataclass
class Run:
    """What is seen of a run of train.py.

    Attributes:
        dtypes: in which the policy's first layer computes, sampling and loss alike.
        estimate: of memory, bytes by part.
        seconds: by phase.
    """

    trainer: SpeechGRPOTrainer | None = None
    dtypes: set[torch.dtype] = field(default_factory=set)
    shapes: memory.Shapes | None = None
    estimate: dict[str, int] = field(default_factory=dict)
    seconds: Counter = field(default_factory=Counter)


@dataclass
class RolloutRate:
    """How fast a step's codes are sampled, and how fast memory alone would let them be.

    Attributes:
        codes: sampled in a step; calls: of the policy, one after another, until the last rollout has ended.
        call_bytes: read by one call: the weights of its matrices once, and all keys and values of a static cache.
        bandwidth: of this device, bytes a second, measured.
        seconds: of sampling in a step.
    """

    codes: float
    calls: float
    call_bytes: int
    bandwidth: float
    seconds: float

    def line(self) -> str:
        floor = self.calls * self.call_bytes / self.bandwidth
        return (
            f"sampling: {self.codes / self.seconds:,.0f} codes a second, {1000 * self.seconds / self.calls:.1f} ms a "
            f"code of all rollouts; reading {self.call_bytes / 1e9:.2f} GB for each at "
            f"{self.bandwidth / 1e12:.2f} TB/s would take {1000 * floor / self.calls:.1f} ms, "
            f"{floor / self.seconds:.1%}"
        )


# --- The run ----------------------------------------------------------------------------------------------


def build_checkpoints(folder: Path, codes: int, device: torch.device, seed: int) -> dict[str, str]:
    """Write Llasa-1B, XCodec2 and Whisper large-v3 with random weights; paths by train.py's flag.

    Args:
        codes: most codes of a rollout.
    """
    if shutil.disk_usage(folder).free < BUILT_BYTES:
        raise InputError(
            f"{folder}: has less than {BUILT_BYTES / 1e9:.0f} GB free. Use --checkpoints with another folder"
        )
    text = Path("tiny/texts/heldout.txt").read_text().splitlines()[0]
    save_llasa(folder / "llasa", [text], seed=seed, device=device, codes=codes)
    random_models(torch.device("cpu"), seed, folder / "whisper.pt").model.save_pretrained(folder / "codec")
    gc.collect()
    return {name: str(folder / part) for name, part in zip(NAMED, ("llasa", "codec", "whisper.pt"), strict=True)}


def timed_steps(steps: int) -> int:
    """Steps that the clocks count: the first of several is left out."""
    return max(1, steps - 1)


class ForgetFirstStep(TrainerCallback):
    """Starts the clocks anew after the first of several steps, in which kernels are compiled."""

    def __init__(self, seconds: Counter):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1 < state.max_steps:
            self.seconds.clear()


@contextlib.contextmanager
def observed(device: torch.device) -> Iterator[Run]:
    """Within it, what train.py builds, estimates and spends is written down."""
    run = Run()
    build, shapes_of, report = train.grpo_trainer, memory.shapes_of, memory.report

    def keep_trainer(*args):
        run.trainer = build(*args)
        run.trainer.add_callback(ForgetFirstStep(run.seconds))
        layer = causal_lm(run.trainer.accelerator.unwrap_model(run.trainer.model)).model.layers[0]
        layer.mlp.register_forward_hook(lambda module, inputs, output: run.dtypes.add(output.dtype))
        return run.trainer

    def keep_shapes(*args):
        run.shapes = shapes_of(*args)
        return run.shapes

    def keep_estimate(parts: dict[str, int]) -> str:
        run.estimate = parts
        return report(parts)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(train, "grpo_trainer", keep_trainer))
        stack.enter_context(mock.patch.object(memory, "shapes_of", keep_shapes))
        stack.enter_context(mock.patch.object(memory, "report", keep_estimate))
        for owner, name, phase in (
            (SpeechGRPOTrainer, "_generate_single_turn", "sampling"),
            (SpeechCodec, "decode", "codec"),
            (WhisperScorer, "score", "Whisper"),
            (SpeechGRPOTrainer, "_compute_loss", "loss"),
            (Accelerator, "backward", "loss"),
            (SpeechGRPOTrainer, "training_step", "step"),
        ):
            stack.enter_context(clocked(owner, name, run.seconds, phase, device))
        yield run


@dataclass
class LogProbs:
    """How far apart the sampler's log-probabilities and the loss's are.

    Attributes:
        difference: mean |sampled − scored| of a code, in nats.
        spread: standard deviation of the allowed logits that the sampler draws from, in nats; 1 where it is not known.
    """

    difference: float
    spread: float = 1.0


def compare_log_probs(trainer: SpeechGRPOTrainer, texts: list[str]) -> LogProbs:
    """Of a rollout of each text; with vLLM of the last step's, as TRL logged it.

    Sampled: from the logits that `generate` drew each code from. Scored: as the loss does, in one pass.
    """
    if trainer.use_vllm:
        entry = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
        return LogProbs(float(entry["sampling/sampling_logp_difference/mean"]))
    config, model, pad_id = trainer.generation_config, trainer.model, trainer.processing_class.pad_token_id
    length = min(COMPARED_CODES, config.max_new_tokens)
    config.update(output_logits=True, return_dict_in_generate=True, max_new_tokens=length)
    generate, outputs = model.generate, []

    def recorded(*args, **kwargs):
        outputs.append(generate(*args, **kwargs))
        return outputs[-1].sequences

    prompts = [prompt_ids(trainer.processing_class, tts_prompt(text)) for text in texts]
    with mock.patch.object(model, "generate", recorded):
        trainer._generate_single_turn(prompts, None, {}, 1)
    [output] = outputs
    completion = output.sequences[:, -len(output.logits) :]
    logits = torch.stack(output.logits, dim=1).float() / trainer.temperature  # (rows, codes, vocabulary)
    sampled = logits.log_softmax(-1).gather(2, completion[..., None])[..., 0]
    allowed = causal_lm(trainer.accelerator.unwrap_model(model)).get_output_embeddings().bias == 0
    written = completion != pad_id
    mask = (output.sequences != pad_id).long()
    for row, prompt in zip(mask, prompts, strict=True):  # a published prompt holds the padding token, which ends turns
        row[: -completion.shape[1]][-len(prompt) :] = 1
    with torch.no_grad(), trainer.accelerator.autocast():
        scored, *_ = trainer._get_per_token_logps_and_entropies(model, output.sequences, mask, completion.shape[1])
    difference, spread = (sampled - scored)[written].abs().mean(), logits[..., allowed].std(-1)[written].mean()
    return LogProbs(difference.item(), spread.item())


def broken_lengths(device: torch.device, head_size: int) -> dict[int, list[str]]:
    """Lengths from 1 to ATTENTION_LENGTHS at which attention, or a gradient of it, is not finite, and which of them.

    In bfloat16, by the kernel that PyTorch chooses; as in training, as in sampling's first call, and as in a later one.
    A quarter of the positions of one row of two are left padding, which sees nothing.
    """
    broken = {}
    for length in range(1, ATTENTION_LENGTHS + 1):
        inputs = torch.randn(3, 2, length, 4, head_size, device=device, dtype=torch.bfloat16).transpose(2, 3).unbind()
        query, key, value = (part.requires_grad_() for part in inputs)
        seen = torch.ones(2, length, dtype=torch.bool, device=device)
        seen[0, : length // 4] = False
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril() & seen[:, None, None]
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output.float().sum().backward()
        with torch.no_grad():
            prefill = scaled_dot_product_attention(query, key, value, attn_mask=mask)
            code = scaled_dot_product_attention(query[:, :, -1:], key, value, attn_mask=mask[:, :, -1:])
        gradients = {"query gradient": query.grad, "key gradient": key.grad, "value gradient": value.grad}
        tensors = {"output": output, **gradients, "output without gradients": prefill, "output of one query": code}
        not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if not_finite:
            broken[length] = not_finite
    return broken


def rollout_rate(run: Run, steps: int, device: torch.device) -> RolloutRate:
    """Of the steps that were timed; codes and calls are those of the last step."""
    entry = [entry for entry in run.trainer.state.log_history if "reward" in entry][-1]
    shapes, args = run.shapes, run.trainer.args
    rollouts = args.per_device_train_batch_size * args.steps_per_generation
    cache = 2 * shapes.layers * shapes.key_width * shapes.activation_bytes * rollouts * shapes.length
    return RolloutRate(
        codes=rollouts * float(entry["completions/mean_length"]),
        calls=float(entry["completions/max_length"]),
        call_bytes=memory.linear_bytes(run.trainer.accelerator.unwrap_model(run.trainer.model)) + cache,
        bandwidth=memory_bandwidth(device),
        seconds=run.seconds["sampling"] / steps,
    )


def synthesize(model: Path, text: str, max_length: int, device: torch.device) -> list[np.ndarray]:
    """The clips that inference.py writes; none where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--model_name_or_path", str(model), "--text", text, "--output", folder, "--num_samples", "4"]
        argv += ["--temperature", "1", "--max_length", str(max_length), "--device", str(device)]
        try:
            inference.main(inference.parse_args(argv))
        except SystemExit:  # it has said why
            return []
        return [load_audio(path) for path in sorted(Path(folder).glob("*.wav"))]


# --- The checks -------------------------------------------------------------------------------------------


def check_log(log_history: list[dict]) -> list[Check]:
    """Finite numbers and a gradient, in the log's entries of steps."""
    entries = [entry for entry in log_history if "reward" in entry]
    numbers = {
        f"{name} at step {entry['step']}": float(math.nan if value is None else value)
        for entry in entries
        for name, value in entry.items()
        if name not in MAY_BE_MISSING
    }
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    measured = f"{len(numbers) - len(bad)} of {len(numbers)}" + (f", not {', '.join(bad[:4])}" if bad else "")
    norms = [float(entry["grad_norm"]) for entry in entries]
    return [
        Check("finite", "all", measured, bool(numbers) and not bad),
        Check("gradient", "> 0", ", ".join(f"{norm:.3g}" for norm in norms), any(norm > 0 for norm in norms)),
    ]


def check_number_format(dtypes: set[torch.dtype]) -> Check:
    measured = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return Check("number format", "bfloat16", measured, bool(dtypes) and dtypes <= {torch.bfloat16, torch.float16})


def check_log_probs(log_probs: LogProbs) -> Check:
    limit = MAX_LOG_PROB_DIFFERENCE * max(1.0, log_probs.spread)
    measured = f"{log_probs.difference:.4f} nats"
    return Check("log-probs", f"<= {limit:.3f} nats", measured, log_probs.difference <= limit)  # NaN fails


def check_memory(estimate: int, peak: int | None) -> Check:
    limit = f"{estimate / memory.GIB:.2f} GiB ± {MAX_MEMORY_ERROR:.0%}"
    if peak is None:
        return Check("memory", limit, "not measured (no GPU)", None)
    return Check("memory", limit, f"{peak / memory.GIB:.2f} GiB", abs(peak / estimate - 1) <= MAX_MEMORY_ERROR)


def check_attention(device: torch.device) -> list[Check]:
    """As a training has it; on a GPU also with cuDNN's kernels, which a training does without, for the record."""
    set_up_arithmetic()
    checks = [attention_row(f"attention, heads of {size}", broken_lengths(device, size)) for size in HEAD_SIZES]
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(True)
        for size in HEAD_SIZES:
            with_cudnn = attention_row(f"the same with cuDNN, {size}", broken_lengths(device, size))
            checks.append(replace(with_cudnn, limit="not used", passed=None))
        set_up_arithmetic()
    return checks


def attention_row(name: str, broken: dict[int, list[str]]) -> Check:
    """Args: broken: what is not finite at a length."""
    measured = f"{ATTENTION_LENGTHS - len(broken)} of {ATTENTION_LENGTHS} lengths"
    if broken:
        what = sorted({part for parts in broken.values() for part in parts})
        measured += f", not {', '.join(map(str, list(broken)[:6]))} ({', '.join(what)})"
    return Check(name, "finite", measured, not broken)


def check_speech(wavs: list[np.ndarray]) -> Check:
    good = [wav for wav in wavs if len(wav) and np.isfinite(wav).all()]
    seconds = sum(map(len, good)) / 16_000
    return Check("speech", "finite clips", f"{len(good)} of {len(wavs)}, {seconds:.1f} s", 0 < len(good) == len(wavs))


# --- The script -------------------------------------------------------------------------------------------


def tables(checks: list[Check], seconds: Counter, timed_steps: int, rate: RolloutRate) -> str:
    results = {True: "ok", False: "FALLS SHORT", None: "–"}
    rows = [[check.name, check.limit, check.measured, results[check.passed]] for check in checks]
    phases = [[phase, f"{seconds[phase] / timed_steps:.2f}"] for phase in PHASES]
    checked = markdown_table(["check", "expected", "measured", "result"], rows)
    return f"{checked}\n\n{markdown_table(['phase', 'seconds a step'], phases)}\n\n{rate.line()}"


def train_flags(args: argparse.Namespace, named: dict[str, str], output_dir: Path) -> list[str]:
    """The flags of train.py; the user's come last and win."""
    flags = ["--config", args.config, "--dataset", TEXTS, "--output_dir", str(output_dir), "--seed", str(args.seed)]
    flags += ["--max_steps", str(args.steps), "--save_strategy", "no", "--sample_steps", "0"]
    flags += TINY if args.size == "tiny" else REAL
    flags += [] if torch.cuda.is_available() else ON_A_CPU
    for name, path in named.items():
        flags += [f"--{name}", path]
    return [*flags, *args.train_flags]


def measure(args: argparse.Namespace, folder: Path, device: torch.device) -> tuple[list[Check], Run, RolloutRate]:
    named = {name: getattr(args, name) for name in NAMED if getattr(args, name)}
    output_dir = folder / "trained"
    if args.size == "real" and len(named) < len(NAMED):
        _, recipe, _ = train.parse_args(train_flags(args, named, output_dir))
        named = build_checkpoints(folder, recipe.max_completion_length, device, args.seed) | named
    arguments = train.parse_args(train_flags(args, named, output_dir))
    attention = check_attention(device)
    for check in attention:  # before what it might end
        logger.info("%s: finite at %s", check.name, check.measured)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with observed(device) as run:
        train.main(arguments)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None

    texts = Path("tiny/texts/heldout.txt").read_text().splitlines()[:2]
    longest = max(len(prompt_ids(run.trainer.processing_class, tts_prompt(text))) for text in texts)
    checks = [*check_log(run.trainer.state.log_history), check_number_format(run.dtypes)]
    checks += [check_log_probs(compare_log_probs(run.trainer, texts)), check_memory(run.estimate["peak"], peak)]
    checks += attention
    rate = rollout_rate(run, timed_steps(args.steps), device)
    max_length = longest + max(MIN_ROOM, arguments[1].max_completion_length)
    run.trainer = None
    gc.collect()
    return [*checks, check_speech(synthesize(output_dir, texts[0], max_length, device))], run, rate


def check_one_gpu() -> None:
    """Raises InputError for several processes or GPUs, before gigabytes are written for train.py to refuse them."""
    processes, gpus = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1 or gpus > 1:
        raise InputError(
            f"benchmarks/readiness.py: checks one process on one GPU (got {processes} processes, {gpus} GPUs). Use "
            "CUDA_VISIBLE_DEVICES=0 python benchmarks/readiness.py"
        )


def main(args: argparse.Namespace) -> None:
    set_up_logging("benchmarks")
    with bad_input_exits():
        check_at_least(args, steps=2)  # Adam's state is made at the end of the first: its peak is not a run's
        check_writable(args.output_dir)
        check_one_gpu()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.checkpoints or Path(temporary)
            check_writable(folder)
            checks, run, rate = measure(args, folder, device)
    print("\n" + tables(checks, run.seconds, timed_steps(args.steps), rate))
    results = {"checks": [vars(check) for check in checks], "seconds": run.seconds, "memory_estimate": run.estimate}
    results |= {"sampling": vars(rate), "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    write_results(args.output_dir, f"readiness_{args.size}", results)
    if any(check.passed is False for check in checks):
        sys.exit(1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.usage = "%(prog)s [flags] [flags of train.py]"
    add = parser.add_argument
    size_help = "tiny: the toy setup; real: the published sizes (default: real on a GPU, tiny on a CPU)"
    add("--size", choices=tuple(CONFIGS), help=size_help)
    for name, what in zip(NAMED, ("policy", "XCodec2", "Whisper"), strict=True):
        add(f"--{name}", help=f"{what} to take; default: random weights of the published size, or the toy setup's")
    add("--config", help="YAML file of train.py (default: " + ", ".join(f"{s}: {c}" for s, c in CONFIGS.items()) + ")")
    add("--steps", type=int, default=2, help="number of updates, at least 2")
    add("--checkpoints", type=Path, help="folder for the random checkpoints and the trained model; default: temporary")
    add("--seed", type=int, default=0, help="random seed of the weights and of train.py")
    add("--output_dir", type=Path, default=Path("benchmarks/results"), help="folder of the results, a JSON file")
    args, args.train_flags = parser.parse_known_args(argv)
    args.size = args.size or ("real" if torch.cuda.is_available() else "tiny")
    args.config = args.config or CONFIGS[args.size]
    return args


if __name__ == "__main__":
    main(parse_args())
