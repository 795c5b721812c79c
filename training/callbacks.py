"""What train.py shows and keeps while it trains: one line a step on the console, and rollouts to listen to."""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from speech.audio import save_audio
from speech.tokens import SAMPLE_RATE
from training.recipes import ScriptArguments

logger = logging.getLogger("train")

# What a step's line shows of the log, where it has it: log key -> text. Everything else is in trainer_state.json.
COLUMNS = {
    "wer": lambda v: f"WER {100 * v:.1f} %",
    "nll": lambda v: f"NLL {v:.2f}",
    "text_log_prob": lambda v: f"log P(text) {v:.2f}",
    "diffro_reward": lambda v: f"DiffRO {v:.2f}",
    "frac_hallucination": lambda v: f"hallucinations {100 * v:.1f} %",
    "kl": lambda v: f"KL {v:.3f}",
    "duration_s": lambda v: f"{v:.2f} s",
    "rewards/accuracies": lambda v: f"pair accuracy {100 * v:.1f} %",
    "rewards/margins": lambda v: f"margin {v:.3f}",
    "frac_truncated": lambda v: f"truncated {100 * v:.1f} %",
    "mean_token_accuracy": lambda v: f"token accuracy {100 * v:.1f} %",
}
RECENT_LOGS = 20  # of which the time of a step is the mean
UNITS = {"sft": "rows", "dpo": "pairs"}  # what a batch is counted in; else rollouts


def console_header(
    trainer: Trainer, script_args: ScriptArguments, model_name: str, rewards: Iterable[str] | None
) -> str:
    """The line before the first step: method, policy, rewards, amount of work, folder."""
    args, size = trainer.args, sum(p.numel() for p in trainer.model.parameters())
    millions = f"{size / 1e6:.1f} M" if size < 1e9 else f"{size / 1e9:.2f} B"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    amount = f"{steps} steps × {batch} {UNITS.get(script_args.method, 'rollouts')}"
    parts = [f"{script_args.method.upper()} {script_args.task.upper()}", f"{model_name} ({millions})"]
    parts += [f"reward {' + '.join(rewards)}"] if rewards else []
    return " · ".join([*parts, amount, f"logs {args.output_dir}"])


class ConsoleLog(TrainerCallback):
    """A line a log entry: step, reward or loss, the metrics of COLUMNS, seconds a step, and the time left.

    On a terminal it is one live bar, elsewhere (a log file, a pipe) a line each.

    Args:
        header: the line before the first step.
    """

    def __init__(self, header: str):
        self.header = header
        self.bar = None
        self.times: deque[tuple[int, float]] = deque(maxlen=RECENT_LOGS + 1)

    def on_train_begin(self, args, state, control, **_):
        if not state.is_world_process_zero:
            return
        logger.info(self.header)
        self.times.append((state.global_step, time.monotonic()))
        if sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format="{bar:10} {desc}", leave=True)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        if any(name.startswith("eval_") for name in logs):
            held_out = held_out_line(logs, state.global_step, state.max_steps)
            logger.info(held_out) if self.bar is None else self.bar.write(held_out)
            return
        self.times.append((state.global_step, time.monotonic()))
        terminal = self.bar is not None
        line = step_line(logs, state.global_step, state.max_steps, self._seconds_a_step(), times_first=terminal)
        if self.bar is None:
            logger.info(line)
        else:
            self.bar.n = state.global_step
            self.bar.set_description_str(line)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()

    def _seconds_a_step(self) -> float | None:
        (first_step, first_time), (last_step, last_time) = self.times[0], self.times[-1]
        return (last_time - first_time) / (last_step - first_step) if last_step > first_step else None


def step_line(
    logs: dict[str, float], step: int, max_steps: int, seconds_a_step: float | None, times_first: bool = False
) -> str:
    """The line of one log entry; see `ConsoleLog`.

    Args:
        times_first: seconds a step and the time left come before the metrics, which a narrow terminal may cut off.
    """
    parts, times = [f"step {step:{len(str(max_steps))}}/{max_steps}"], []
    if seconds_a_step is not None:
        times = [f"{seconds_a_step:.1f} s/step", f"eta {clock(seconds_a_step * (max_steps - step))}"]
    if times_first:
        parts += times
    if logs.get("reward") is not None:
        parts.append(f"reward {logs['reward']:.3f} ± {logs.get('reward_std') or 0.0:.3f}")
    elif logs.get("loss") is not None:
        parts.append(f"loss {float(logs['loss']):.4f}")
    parts += [shown(logs[key]) for key, shown in COLUMNS.items() if logs.get(key) is not None]
    if not times_first:
        parts += times
    return "  ".join(parts)


def held_out_line(logs: dict[str, float], step: int, max_steps: int) -> str:
    """The line of an evaluation while training: COLUMNS of the held-out rows."""
    held_out = {name.removeprefix("eval_"): value for name, value in logs.items()}
    parts = [f"step {step:{len(str(max_steps))}}/{max_steps}", "held out:"]
    if "loss" in held_out:
        parts.append(f"loss {held_out['loss']:.4f}")
    parts += [shown(held_out[key]) for key, shown in COLUMNS.items() if held_out.get(key) is not None]
    return "  ".join([*parts, f"{held_out.get('runtime', 0.0):.1f} s"])


def clock(seconds: float) -> str:
    """7:31, or 1:07:31."""
    hours, minutes, seconds = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class SampleSaver(TrainerCallback):
    """Every `every` steps the first rollouts scored last: a record a line in transcripts.jsonl, and their wavs.

    The wavs also go to tensorboard, trackio and wandb, where --report_to names one of them.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` or a `TranscriptScorer`.
        callbacks: the trainer's, among which those that report are found.
    """

    def __init__(self, rollout_scorer, every: int, count: int, callbacks: list[TrainerCallback] = ()):
        self.rollout_scorer, self.every, self.count, self.callbacks = rollout_scorer, every, count, callbacks

    def on_step_end(self, args, state, control, **_):
        if self.every and state.global_step % self.every == 0 and state.is_world_process_zero:
            samples = self.rollout_scorer.last_samples(self.count)
            self.save(samples, Path(args.output_dir) / "samples" / f"step_{state.global_step:06d}")
            for callback in self.callbacks:
                report_audio(callback, samples, state.global_step)

    @staticmethod
    def save(samples: list[tuple[dict, np.ndarray | None]], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "transcripts.jsonl").open("w", encoding="utf-8") as lines:
            for record, wav in samples:
                if wav is not None:
                    save_audio(folder / f"rollout_{record['rollout']}.wav", wav)
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def report_audio(callback: TrainerCallback, samples: list[tuple[dict, np.ndarray | None]], step: int) -> None:
    """Log rollouts as audio where `callback` reports to tensorboard, trackio or wandb; any other does nothing."""
    wavs, captions = {}, {}
    for record, wav in samples:
        if wav is not None:
            name = f"samples/rollout_{record['rollout']}"
            wavs[name] = wav.clip(-1.0, 1.0)
            captions[name] = f"{record['text']} → {record.get('transcript', '')}"
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        for name, wav in wavs.items():
            callback.tb_writer.add_audio(name, torch.from_numpy(wav)[None], step, sample_rate=SAMPLE_RATE)
            callback.tb_writer.add_text(name, captions[name], step)
    elif isinstance(callback, WandbCallback):
        import wandb

        clips = {name: wandb.Audio(wav, sample_rate=SAMPLE_RATE, caption=captions[name]) for name, wav in wavs.items()}
        wandb.log({**clips, "train/global_step": step})
    elif isinstance(callback, TrackioCallback):
        import trackio

        # As integers: trackio would bring a float waveform to full loudness.
        pcm = {name: (wav * 32767).astype(np.int16) for name, wav in wavs.items()}
        clips = {name: trackio.Audio(wav, sample_rate=SAMPLE_RATE, caption=captions[name]) for name, wav in pcm.items()}
        trackio.log({**clips, "train/global_step": step})
