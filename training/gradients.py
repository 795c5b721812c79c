"""A gradient that is not finite ends a training before it reaches the weights."""

import math

import torch
from transformers import Trainer


def check_gradient(norm: torch.Tensor | float, step: int, details: str) -> None:
    """Raises FloatingPointError where the norm of step's gradient is infinite or NaN.

    The update would make all weights NaN: sampling then ends in an assertion on the GPU that names no cause, and
    supervised training would go on.
    """
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {float(norm)} in step {step}, {details}")


def stop_at_broken_gradients(trainer: Trainer) -> None:
    """Check each update's gradient in `trainer.train()`.

    Not in float16, where the loss's scaler meets infinite gradients as a matter of course and leaves out their steps.
    Not under DeepSpeed, which has made the step by then and gives a finite norm for a gradient that is not.
    """
    gradient_norm, compute_loss, shapes = trainer._get_grad_norm, trainer.compute_loss, {}

    def remember_shapes(model, inputs, *args, **kwargs):
        shapes.update({name: list(value.shape) for name, value in inputs.items() if name.endswith("_ids")})
        return compute_loss(model, inputs, *args, **kwargs)

    def finite_norm(model, grad_norm=None) -> torch.Tensor | float | None:
        norm = gradient_norm(model, grad_norm=grad_norm)
        if norm is not None and trainer.accelerator.scaler is None:
            of_forward = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            details = (
                f"whose last forward had {of_forward}. To see where it arises: --attn_implementation eager, then "
                f"--bf16 false. What was saved in {trainer.args.output_dir} is from before it"
            )
            check_gradient(norm, trainer.state.global_step + 1, details)
        return norm

    trainer.compute_loss, trainer._get_grad_norm = remember_shapes, finite_norm
