"""Scoring over the confined head: what the trainers of all methods get a model's log-probs and entropies by.

The head's allowed rows only (speech/confined_head.py), at the answers' positions only; a prompt that is long beside its
answers is read once for its group (shared_prompts.py).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, FusedCausalLMOutput, maybe_gather_lm_head_ctx

from speech.confined_head import ConfinedHead
from training.shared_prompts import shared_prompts, states_of_groups


class OutputsKeepTheirDtype:
    """For a trainer of TRL's: FSDP2 leaves the model's outputs in the dtype they were computed in."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            keep_output_dtype(self.accelerator.state.fsdp_plugin)


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
