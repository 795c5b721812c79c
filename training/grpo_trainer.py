"""TRL's GRPOTrainer, made to fit speech: what is different here from TRL 1.16 is in this file.

- Scoring: the head's allowed rows only (confined_head.py), at the completions' positions only; a prompt that is long
  beside its completions (speech to be recognised) is read once for its whole group.
- Sampling: half-precision weights are cast once a batch of rollouts, not once a code, and the cache of keys and values
  is in half precision too.
- Credit: `credit` "time" gives what a reward says of a part of a rollout to the codes of that part (credit.py).
- vLLM: what it needs to stop at END and say nothing but speech, and the settings that would teach it nothing.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers.cache_utils import StaticLayer
from trl import GRPOConfig, GRPOTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, FusedCausalLMOutput, maybe_gather_lm_head_ctx

from common.cli import InputError
from speech.confined_head import ConfinedHead, confine_head
from training.credit import EPSILON, token_advantages
from training.held_out import HeldOutEvaluation


class OutputsKeepTheirDtype:
    """For a trainer of TRL's: FSDP2 leaves the model's outputs in the dtype they were computed in."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            keep_output_dtype(self.accelerator.state.fsdp_plugin)


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
        rewards = super()._calculate_rewards(inputs, *args)  # of all processes, in their order
        first = self.accelerator.process_index * len(inputs)
        self._own_rewards = rewards[first : first + len(inputs)]
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        summed = self.multi_objective_aggregation == "sum_then_normalize"
        self._frac_without_signal = frac_without_signal(rewards, self.reward_weights, num_generations, summed)
        return rewards

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["frac_reward_zero_std"][-1] = self._frac_without_signal  # TRL's is of the batch with several rewards
        if self.credit == "time" and self.model.training:
            outputs["advantages"] = self._token_advantages(outputs["completion_mask"])
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
            [getattr(reward, "whole_share", 0.0) for reward in self.reward_funcs],
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
    weighted = (rewards * weights.to(rewards.device)).nan_to_num()
    groups = (weighted.sum(dim=1, keepdim=True) if summed else weighted).unflatten(0, (-1, num_generations))
    spread = groups.amax(dim=1) - groups.amin(dim=1)
    return (spread < 1e-6).all(dim=1).float().mean().item()


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


def keep_output_dtype(fsdp_plugin) -> None:
    """Have FSDP2 leave a model's outputs as they are; accelerate's policy rounds them to half precision. In place.

    Log-probs are computed in float32: in bfloat16 a log-prob of −8 is off by up to 0.016, more than most KLs.
    """
    policy = fsdp_plugin.mixed_precision_policy
    if policy is not None:
        fsdp_plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def causal_lm(model):
    """The causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass
class ScoredOutput(FusedCausalLMOutput):
    """`from_head`: what the argument of that name computed from the hidden states."""

    from_head: Any = None


@contextlib.contextmanager
def whole_rows(head: ConfinedHead) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`head.rows()`, also where the weight is spread over processes."""
    with maybe_gather_lm_head_ctx(head.weight, None):  # of ZeRO-3
        weight, bias = head.rows()
        yield weight.full_tensor() if isinstance(weight, DTensor) else weight, bias  # of FSDP2


def score_confined(model, temperature: float, outputs: tuple[str, ...] = ("log_probs", "entropy")) -> None:
    """Have TRL's trainers score completions over the head's rows alone, and at the completions' positions alone.

    `model(..., labels=, fused_lm_head=True)` is how TRL's trainers ask for log-probs and entropies; TRL's own answer
    takes every row of the head and, on a CPU, every position of the prompt. Call it after the trainer is built.
    With `from_head=` the output has `from_head` = from_head(hidden, weight, bias), of the same pass: hidden
    (batch, time − 1, width), which predicts the tokens from the second on, and the head's `whole_rows`.

    Args:
        model: the causal LM under PEFT and other wrappers, with a ConfinedHead.
        temperature: of sampling; the logits are divided by it.
        outputs: what is computed of each token, by TRL's names in `FusedCausalLMOutput`; the others are None.
    """
    forward = model.forward

    @functools.wraps(forward)
    def forward_or_score(*args, labels=None, fused_lm_head=False, from_head=None, **kwargs):
        if not fused_lm_head and from_head is None:
            return forward(*args, **kwargs) if labels is None else forward(*args, labels=labels, **kwargs)
        kwargs.pop("use_cache", None)  # DPOTrainer says False, and nothing else is of use here
        hidden = _hidden_states(model, args, kwargs, None if from_head else labels)
        head, output = model.get_output_embeddings(), ScoredOutput()
        with whole_rows(head) as (weight, bias):
            if from_head is not None:
                output.from_head = from_head(hidden, weight, bias)
            if fused_lm_head:
                targets = labels[:, 1:]
                values = _token_values(hidden, weight, bias, targets, head.first_row, temperature, outputs)
                for name, value in values.items():
                    setattr(output, name, value)
                output.label_mask = targets != -100
        return output

    model.forward = forward_or_score


def _hidden_states(model, args: tuple, inputs: dict, labels: torch.Tensor | None) -> torch.Tensor:
    """Last hidden states without the last position, (batch, time − 1, width).

    Args:
        labels: −100 on the prompt; with them a prompt that is long beside its completions is read once for all its
            rows, and the states before its last token are 0.
    """
    if labels is not None and not args:
        scored = (labels != -100).any(dim=0)
        prompt_length = int(scored.int().argmax())
        # Nothing is scored where all completions are truncated and --mask_truncated_completions leaves them out
        groups = shared_prompts(model, inputs, prompt_length) if scored.any() else None
        if groups is not None:
            return states_of_groups(model, inputs["input_ids"], inputs["attention_mask"], prompt_length, groups)
    return model.base_model(*args, **inputs, use_cache=False).last_hidden_state[:, :-1]


TOKEN_VALUES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the kernel's order


def _token_values(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    first_row: int,
    temperature: float,
    outputs: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    """Each of `outputs` at the targets, shape (batch, time − 1); 0 where a target is −100.

    Args:
        weight, bias: of the head's allowed rows, the first of which is `first_row` of the vocabulary.
        outputs: some of TOKEN_VALUES.
    """
    mask = targets != -100
    rows = targets[mask] - first_row
    if ((rows < 0) | (rows >= len(weight))).any():  # the kernel would take 0 for the logit of such a token
        raise ValueError("a token is to be scored that the confined head cannot say")
    values = ChunkedLogProbFunction.apply(
        hidden[mask],
        weight,
        bias,
        rows,
        temperature,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,  # no softcap and no scale: Llama has neither
        1.0,
        outputs,
    )
    # masked_scatter keeps the output connected to the model where no position is scored
    return {
        name: value.new_zeros(mask.shape).masked_scatter(mask, value)
        for name, value in zip(TOKEN_VALUES, values, strict=True)
        if value is not None
    }


def groups_together(batches: list[dict]) -> list[dict]:
    """Micro-batches of one update with the rows of a prompt side by side, where prompts are longer than completions.

    TRL shuffles the rollouts before it divides them: 8 of 64 rollouts of 8 clips are of 5 clips, and `shared_prompts`
    finds little to share. Where the update is a sum over all rows (`_order_is_free`) their order does not matter.

    Args:
        batches: TRL's, of equal size: tensors and lists of rows; what has no rows stays where it is.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])
    if len(batches) == 1 or prompts.shape[1] <= batches[0]["completion_ids"].shape[1]:
        return batches
    _, groups = torch.unique(prompts, dim=0, return_inverse=True)
    order, size = groups.argsort(stable=True), len(prompts) // len(batches)
    regrouped = [dict(batch) for batch in batches]
    for name, first in batches[0].items():
        if isinstance(first, list):
            rows = [value for batch in batches for value in batch[name]]
            rows = [rows[i] for i in order.tolist()]
        elif isinstance(first, torch.Tensor) and first.ndim:
            rows = torch.cat([batch[name] for batch in batches])[order]
        else:
            continue
        for number, batch in enumerate(regrouped):
            batch[name] = rows[number * size : (number + 1) * size]
    return regrouped


PACKED_FRAC = 0.5  # of the tokens: attention to a packed row costs more than to a causal one


def shared_prompts(model, inputs: dict, prompt_length: int) -> torch.Tensor | None:
    """The prompt of each row by number, shape (rows,), where reading each prompt once is worth it; else None.

    Speech of 5 s has 250 tokens and its transcript 20: of 8 rollouts of one clip nine tenths are the same tokens.
    """
    given = {name for name, value in inputs.items() if value is not None}  # PEFT adds arguments that are None
    if given != {"input_ids", "attention_mask"} or model.config._attn_implementation != "sdpa":
        return None  # packed rows need a mask of their own
    prompts = torch.cat([inputs[name][:, :prompt_length] for name in ("input_ids", "attention_mask")], dim=1)
    unique, groups = torch.unique(prompts, dim=0, return_inverse=True)
    rows, length = inputs["input_ids"].shape
    packed = len(unique) * (prompt_length + int(groups.bincount().max()) * (length - prompt_length))
    return groups if packed <= PACKED_FRAC * rows * length else None


def states_of_groups(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_length: int, groups: torch.Tensor
) -> torch.Tensor:
    """Last hidden states as the model gives them row by row, each prompt read once for all rows that share it.

    A packed row is one prompt and behind it its completions, none of which sees another: [prompt, c_1, c_2, …], every
    c_i at the positions that follow the prompt. Equal to the model's own up to rounding.

    Args:
        input_ids, attention_mask: (rows, length), prompts padded on the left to `prompt_length`.
        groups: from `shared_prompts`.
    Returns:
        (rows, length − 1, hidden size); 0 before the prompt's last token, where nothing is scored.
    """
    rows, length = input_ids.shape
    room, device = length - prompt_length, input_ids.device
    same = groups[:, None] == groups
    slots = same.tril(-1).sum(dim=1)  # how many rows of the prompt come before
    num_slots = int(slots.max()) + 1
    columns = prompt_length + slots[:, None] * room + torch.arange(room, device=device)

    packed = input_ids.new_zeros(int(groups.max()) + 1, prompt_length + num_slots * room)
    valid = torch.zeros_like(packed, dtype=torch.bool)
    for target, source in ((packed, input_ids), (valid, attention_mask.bool())):
        target[groups, :prompt_length] = source[:, :prompt_length]
        target[groups[:, None], columns] = source[:, prompt_length:]

    slot = torch.arange(num_slots, device=device).repeat_interleave(room)
    segments = torch.cat([slot.new_full((prompt_length,), -1), slot])
    after = torch.arange(room, device=device).repeat(num_slots) + prompt_length
    positions = torch.cat([torch.arange(prompt_length, device=device), after])
    own = (segments == -1) | (segments == segments[:, None])
    # Padding sees itself: a softmax of nothing is NaN.
    seen = (own.tril() & valid[:, None]) | torch.eye(len(segments), dtype=torch.bool, device=device)
    states = model.base_model(
        input_ids=packed, attention_mask=seen[:, None], position_ids=positions[None], use_cache=False
    ).last_hidden_state

    before = torch.cat([columns.new_full((rows, 1), prompt_length - 1), columns[:, :-1]], dim=1)
    hidden = states.new_zeros(rows, length - 1, states.shape[-1])
    hidden[:, prompt_length - 1 :] = states[groups[:, None], before]
    return hidden


# With any of these vLLM samples from a cut distribution, and its log-probs are those of the cut one.
NEUTRAL_SAMPLING = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}


def prepare_vllm(args: GRPOConfig, allowed_ids: list[int], end_id: int, max_length: int) -> None:
    """Fill in what vLLM needs with each request, and refuse what would silently stop the learning. In place.

    vLLM reads the tokenizer and the generation config from disk and never sees the confined head, so END and the
    allowed tokens are given with each request. Of its two model runners only the older takes them: the newer, which
    vLLM 0.30 has by default on a GPU, ends with "Too many allowed token IDs" above 1,024.

    Args:
        max_length: tokens of prompt and speech; vLLM would reserve memory for Llama-3.2's 131,072 otherwise.
    Raises:
        InputError: truncated sampling, or an importance ratio over whole sequences. TRL multiplies the loss by
            exp(Σ (train − sample)) of the log-probs; over 1,000 codes a mean difference of 0.05 makes that e^−50.
            Or a server without a GPU here.
    """
    if args.vllm_mode == "server" and args.device.type != "cuda":
        raise InputError(
            f"--vllm_mode server: the weights go to the server by NCCL, from GPU to GPU (got {args.device.type}). "
            "Use --vllm_mode colocate"
        )
    for name, neutral in NEUTRAL_SAMPLING.items():
        if getattr(args, name) not in neutral:
            raise InputError(
                f"--{name} {getattr(args, name)} with vLLM: the importance-sampling correction would weight every "
                f"rollout by about 0 and nothing would be learnt. Sample by temperature alone (--{name} {neutral[0]})"
            )
    mode = args.vllm_importance_sampling_mode
    if args.vllm_importance_sampling_correction and not mode.startswith("token"):
        raise InputError(
            f"--vllm_importance_sampling_mode {mode}: a ratio over a whole rollout of up to "
            f"{args.max_completion_length} codes is about 0 or out of bounds, and its rollout teaches nothing. "
            "Use token_truncate"
        )
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    ours = {"stop_token_ids": [end_id], "allowed_token_ids": allowed_ids, "detokenize": False}
    args.generation_kwargs = ours | (args.generation_kwargs or {})
    args.vllm_max_model_length = args.vllm_max_model_length or max_length
