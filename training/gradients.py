"""A gradient that is not finite ends a training before it reaches the weights."""

import math

import torch
from transformers import Trainer

MIN_LOSS_SCALE = 1e-4  # 30 updates that are left out, from the scaler's 65,536


def check_gradient(norm: torch.Tensor | float, step: int, details: str) -> None:
    """Raises FloatingPointError where the norm of step's gradient is infinite or NaN.

    The update would make all weights NaN: sampling then ends in an assertion on the GPU that names no cause, and
    supervised training would go on.
    """
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {float(norm)} in step {step}, {details}")


def stop_at_broken_gradients(trainer: Trainer) -> None:
    """Check each update's gradient in `trainer.train()`.

    In float16 the loss's scaler meets infinite gradients as a matter of course, leaves out their steps and halves the
    loss's scale; there a run ends once the scale is below MIN_LOSS_SCALE, as it gets where every gradient is NaN.
    Not under DeepSpeed, which has made the step by then and gives a finite norm for a gradient that is not.
    """
    gradient_norm, compute_loss, shapes = trainer._get_grad_norm, trainer.compute_loss, {}

    def remember_shapes(model, inputs, *args, **kwargs):
        shapes.update({name: list(value.shape) for name, value in inputs.items() if name.endswith("_ids")})
        return compute_loss(model, inputs, *args, **kwargs)

    def finite_norm(model, grad_norm=None) -> torch.Tensor | float | None:
        norm = gradient_norm(model, grad_norm=grad_norm)
        scaler = trainer.accelerator.scaler
        if scaler is not None and scaler.get_scale() < MIN_LOSS_SCALE:
            raise FloatingPointError(
                f"float16's loss scale is {scaler.get_scale():.1e} before step {trainer.state.global_step + 1}: the "
                "gradients of the last updates were not finite, and none changed the weights. Use --bf16 true in place "
                "of --fp16, or neither"
            )
        if scaler is None and norm is not None:
            of_forward = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            details = (
                f"whose last forward had {of_forward}. To see where it arises: --attn_implementation eager, then "
                f"--bf16 false. What was saved in {trainer.args.output_dir} is from before it"
            )
            check_gradient(norm, trainer.state.global_step + 1, details)
        return norm

    trainer.compute_loss, trainer._get_grad_norm = remember_shapes, finite_norm
