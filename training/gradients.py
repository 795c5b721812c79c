"""Gradients that are no numbers end a run."""

import math

import torch
from transformers import Trainer


def stop_at_broken_gradients(trainer: Trainer) -> None:
    """Let a step whose gradient is not finite end the run before it reaches the weights.

    It would make all of them NaN: sampling then ends in an assertion on the GPU that names no cause, and SFT would go
    on. In float16 the loss's scaler meets infinite gradients as a matter of course, and leaves out their steps.

    Raises:
        FloatingPointError: in `trainer.train()`.
    """
    gradient_norm = trainer._get_grad_norm

    def finite_gradient_norm(model, grad_norm=None) -> torch.Tensor | float | None:
        norm = gradient_norm(model, grad_norm=grad_norm)
        skips_by_itself = trainer.accelerator.scaler is not None
        if norm is not None and not skips_by_itself and not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {float(norm)} in step {trainer.state.global_step + 1}. The checkpoints in "
                f"{trainer.args.output_dir} are from before it: --resume_from_checkpoint true goes on from the last. "
                "Where it comes back, try --attn_implementation eager, then --bf16 false, to find where it arises"
            )
        return norm

    trainer._get_grad_norm = finite_gradient_norm
