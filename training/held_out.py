"""Evaluation while training: every held-out row is sampled once at a low temperature, and scored as rollouts are."""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from common.cli import InputError
from reward_models.rollouts import SpeechRolloutScorer
from reward_models.transcripts import TranscriptScorer

RATES = ("wer", "substitutions", "deletions", "insertions")  # over a batch's words; all else is a mean over rows


@dataclass
class HeldOutEvaluation:
    """What `SpeechGRPOTrainer.evaluate` measures.

    Attributes:
        scorer: the one of the run's rewards: its codec and its ASR.
        temperature: of the samples; 0 is greedy.
    """

    scorer: SpeechRolloutScorer | TranscriptScorer
    temperature: float

    def check_metric(self, args: GRPOConfig, end_id: int) -> None:
        """Raises InputError, before anything is trained, where --metric_for_best_model is none of the metrics."""
        if args.metric_for_best_model is None:
            return
        _, metrics = self.scorer.score_held_out([[end_id]], ["one"], ["en"])  # of an empty completion
        known = set(metrics) - set(RATES[1:])
        if args.metric_for_best_model.removeprefix("eval_") not in known:
            raise InputError(
                f"--metric_for_best_model: must be one of {', '.join(sorted(known))}, what these rewards measure (got "
                f"{args.metric_for_best_model!r})"
            )

    def __call__(self, trainer: GRPOTrainer, rows: Dataset) -> dict[str, float]:
        """Metrics of one sample of each row, the same random draws each time; the training's stream is left alone.

        Every process samples its share of the rows, in as many batches as the others.

        Returns:
            `wer` over the corpus (all edits over all reference words or characters; absent without an ASR), and means
            over the rows of what the scorer's `metrics` has.
        """
        accelerator, batch_size = trainer.accelerator, trainer.args.per_device_eval_batch_size
        rank, processes = accelerator.process_index, accelerator.num_processes
        share = math.ceil(len(rows) / processes)
        numbers = [rank + i * processes for i in range(share)]  # past the end the last row is sampled, and not counted
        mine = rows.select([min(number, len(rows) - 1) for number in numbers])
        completions = []
        with frozen_random_state(accelerator.device, trainer.args.seed + rank), sampling_at(trainer, self.temperature):
            for start in range(0, share, batch_size):
                prompts = mine[start : start + batch_size]["prompt"]
                prompt_ids, *_ = trainer._tokenize_prompts(prompts)
                completion_ids, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
                completions += completion_ids
        count = sum(number < len(rows) for number in numbers)
        part = {"count": count, "edits": 0, "ref_length": 0, "means": {}}
        if count:
            counted = mine.select(range(count))
            texts, languages = list(counted["text"]), list(counted["language"])
            scored, metrics = self.scorer.score_held_out(completions[:count], texts, languages)
            part["means"] = {name: value for name, value in metrics.items() if name not in RATES}
            part["edits"], part["ref_length"] = scored.edits_and_ref_length()
        return whole(gather_object([part]))


def whole(parts: list[dict]) -> dict[str, float]:
    """The metrics of all rows from those of each process's share."""
    metrics, ref_length = {}, sum(part["ref_length"] for part in parts)
    if ref_length:
        metrics["wer"] = sum(part["edits"] for part in parts) / ref_length
    for name in next(part["means"] for part in parts if part["count"]):
        values = [(part["means"][name], part["count"]) for part in parts if part["count"]]
        values = [(value, count) for value, count in values if not math.isnan(value)]  # F0 where nothing is voiced
        if values:
            metrics[name] = sum(value * count for value, count in values) / sum(count for _, count in values)
    return metrics


@contextlib.contextmanager
def sampling_at(trainer: GRPOTrainer, temperature: float) -> Iterator[None]:
    """Within it the trainer samples at another temperature; 0 is greedy."""
    if trainer.use_vllm:
        holder, name, value = trainer.vllm_generation, "temperature", temperature
    else:
        holder, name, value = trainer, "generation_config", copy.deepcopy(trainer.generation_config)
        if temperature > 0:
            value.temperature = temperature
        else:
            value.do_sample, value.temperature, value.top_p, value.top_k = False, None, None, None
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def frozen_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Within it torch's random numbers follow from `seed`; behind it they go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
