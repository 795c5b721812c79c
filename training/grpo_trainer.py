"""TRL's GRPOTrainer, made to fit speech: what is different here from TRL 1.16 is in this file.

- Scoring: over the head's allowed rows alone (scoring.py), and with long prompts read once (shared_prompts.py).
- Sampling: half-precision weights are cast once a batch of rollouts, not once a code, and the cache of keys and values
  is in half precision too.
- Credit: `credit` "time" gives what a reward says of a part of a rollout to the codes of that part (credit.py).
- Metrics: held-out rows by held_out.py; NaN is no value; the fraction of groups that teach nothing.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers.cache_utils import StaticLayer
from trl import GRPOTrainer

from reward_models import values_of
from speech.confined_head import ConfinedHead, confine_head
from training.credit import EPSILON, token_advantages
from training.held_out import HeldOutEvaluation
from training.scoring import OutputsKeepTheirDtype, causal_lm, score_confined
from training.shared_prompts import groups_together


class SpeechGRPOTrainer(OutputsKeepTheirDtype, GRPOTrainer):
    """GRPOTrainer for a policy that `confine_head` was applied to.

    Args:
        allowed_ids: what that policy may say; the reference model, which TRL loads anew, is confined likewise.
        held_out: how `evaluate` measures; None: as TRL does, by the loss of rollouts at the training's temperature.
        credit: "rollout": a rollout's codes have one advantage, as TRL gives it; "time": see credit.py.
    """

    def __init__(
        self,
        *args,
        allowed_ids: list[int],
        held_out: HeldOutEvaluation | None = None,
        credit: str = "rollout",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.shuffle_dataset = False  # rows.one_long_epoch has done it
        self.held_out = held_out
        self.credit = credit
        if credit == "time":
            for reward in self.reward_funcs:
                reward.rollout_scorer.word_times = reward.rollout_scorer.whisper is not None
        if self.ref_model is not None:
            confine_head(self.accelerator.unwrap_model(self.ref_model), allowed_ids)
        for model in (self.model, self.ref_model):
            if model is not None and not self.args.cast_lm_head_to_fp32:
                score_confined(causal_lm(self.accelerator.unwrap_model(model)), self.temperature)

    def _generate_single_turn(self, *args, **kwargs):
        if self.use_vllm:  # it computes by itself, and merges LoRA weights in full precision
            return super()._generate_single_turn(*args, **kwargs)
        # Autocast keeps its half-precision copies of the weights until its outermost region ends: with a region
        # around all steps they are made once; TRL's regions, one a step, would make them for every code.
        with self.accelerator.autocast(), self._kept_head(), keys_like_values():
            return super()._generate_single_turn(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._order_is_free() and self._buffered_inputs is not before:
            self._buffered_inputs = groups_together(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _order_is_free(self) -> bool:
        """Whether an update is a sum over the rows of whole generations, however they are divided."""
        args = self.args
        one_update = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0
        # Of these something is a mean or a quantile over the tokens of a micro-batch
        by_micro_batch = args.loss_type == "bnpo" or args.top_entropy_quantile < 1 or args.entropy_coef > 0
        return one_update and not (by_micro_batch or args.use_adaptive_entropy)

    def _log_metric(self, name: str, value: float):
        """TRL's, but NaN, of a process that had nothing to measure, is no value: it would take the others' with it."""
        if not math.isnan(value):
            super()._log_metric(name, value)

    def _calculate_rewards(self, inputs, *args):
        functions = self.reward_funcs
        self.reward_funcs = [partial(values_of, reward) for reward in functions]
        try:
            rewards = super()._calculate_rewards(inputs, *args)  # of all processes, in their order
        finally:
            self.reward_funcs = functions
        first = self.accelerator.process_index * len(inputs)
        self._own_rewards = rewards[first : first + len(inputs)]
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        summed = self.multi_objective_aggregation == "sum_then_normalize" and self.credit == "rollout"
        self._frac_without_signal = frac_without_signal(rewards, self.reward_weights, num_generations, summed)
        return rewards

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["frac_reward_zero_std"][-1] = self._frac_without_signal  # TRL's is of the batch with several rewards
        if self.credit == "time" and self.model.training:
            mask = outputs["completion_mask"]
            outputs["advantages"] = self._token_advantages(mask)
            if self.log_completions:
                means = outputs["advantages"].sum(dim=1) / mask.sum(dim=1).clamp(min=1)
                # There is room for the rollouts of one batch, so TRL's advantages go
                self._logs["advantages"].extend(self.accelerator.gather(means).tolist())
        return outputs

    def _token_advantages(self, completion_mask: torch.Tensor) -> torch.Tensor:
        """`credit.token_advantages` of this process's rollouts, which are whole groups; (rollouts, time).

        Their RMS over the tokens of all processes is 1.
        """
        parts = []
        for reward in self.reward_funcs:
            rollouts = reward.rollout_scorer.rollouts
            can_tell = hasattr(reward, "parts")
            parts.append([reward.parts(rollouts, i) if can_tell else None for i in range(len(completion_mask))])
        advantages = token_advantages(
            self._own_rewards.cpu().double().numpy(),
            parts,
            self.reward_weights.tolist(),
            [getattr(reward, "whole_frac", 0.0) for reward in self.reward_funcs],
            completion_mask.sum(dim=1).tolist(),
            self.num_generations,
        )
        padded = torch.zeros(completion_mask.shape, device=completion_mask.device)
        padded[:, : advantages.shape[1]] = torch.from_numpy(advantages)
        own = torch.stack([padded.square().sum(), completion_mask.sum().float()])
        squares, tokens = self.accelerator.reduce(own, "sum")
        return padded / ((squares / tokens.clamp(min=1)).sqrt() + EPSILON)  # no token where all are masked

    def evaluate(self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Log and return the metrics of `held_out`, each with the prefix, and the seconds that they took."""
        if self.held_out is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        start, training = time.perf_counter(), self.model.training
        self.model.eval()  # also: TRL's log() does not mix what the training has gathered into this entry
        metrics = self.held_out(self, self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics["runtime"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _kept_head(self) -> contextlib.AbstractContextManager:
        head = causal_lm(self.accelerator.unwrap_model(self.model)).get_output_embeddings()
        device = self.accelerator.device.type
        sharded = isinstance(head.weight, DTensor)  # FSDP2: its slices cannot be kept outside of a forward
        if sharded or not (isinstance(head, ConfinedHead) and torch.is_autocast_enabled(device)):
            return contextlib.nullcontext()
        return head.kept_rows(torch.get_autocast_dtype(device))


def frac_without_signal(rewards: torch.Tensor, weights: torch.Tensor, num_generations: int, summed: bool) -> float:
    """The fraction of groups whose rollouts have equal rewards, which teach nothing.

    Args:
        rewards: (rollouts, rewards), the rollouts of a group side by side, NaN where a reward does not concern one.
        weights: (rewards,).
        summed: whether it is the weighted sum that is compared; else each reward by itself.
    """
    values = rewards * weights.to(rewards.device)
    if summed:
        nothing = values.isnan().all(dim=1, keepdim=True)
        values = values.nansum(dim=1, keepdim=True).masked_fill(nothing, math.nan)
    groups = values.unflatten(0, (-1, num_generations))
    largest, least = groups.nan_to_num(-math.inf).amax(dim=1), groups.nan_to_num(math.inf).amin(dim=1)
    return (largest - least < 1e-6).all(dim=1).float().mean().item()


@contextlib.contextmanager
def keys_like_values() -> Iterator[None]:
    """Within it a static cache takes keys of another dtype than its values, in the values' dtype.

    Under autocast with float32 weights RoPE gives float32 keys (its cos and sin have the residual stream's dtype)
    beside half-precision values, and a static cache has one dtype for both. Attention rounds the keys to half
    precision anyway, so nothing is lost, and the cache takes two bytes a number.
    """
    before, StaticLayer.update = StaticLayer.update, _update_in_one_dtype
    try:
        yield
    finally:
        StaticLayer.update = before


_static_update = StaticLayer.update


def _update_in_one_dtype(layer: StaticLayer, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):
    """One function for all steps: a new one for each would have torch.compile compile anew."""
    return _static_update(layer, keys.to(values.dtype), values, *args, **kwargs)
