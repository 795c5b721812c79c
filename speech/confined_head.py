"""A head that knows what the policy may say: only those logits are computed, sampled and scored.

Of Llasa-1B's 193,800 rows 65,537 are speech codes and END. They are 29 % of the whole model's multiplications in
the full head and 10 % in this one, and their logits take a third of the memory.
"""

import contextlib

import torch
import torch.nn.functional as F

from common.cli import InputError

# −inf would make the entropy NaN; e^−10000 is 0 in every float format.
FORBIDDEN_LOGIT = -1e4


class ConfinedHead(torch.nn.Linear):
    """A linear head whose logits outside the rows [first_row, last_row) are FORBIDDEN_LOGIT, uncomputed.

    Attributes:
        bias: shape (vocabulary,), a buffer that is neither trained nor saved: 0 where a token is allowed and
            FORBIDDEN_LOGIT elsewhere, also between the allowed ones. TRL's own fused heads read it.
    """

    first_row: int
    last_row: int
    _kept = None

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (rows, hidden) and bias (rows,) of the run of rows that is computed."""
        weight, bias = self.weight[self.first_row : self.last_row], self.bias[self.first_row : self.last_row]
        return weight, bias.to(weight.dtype)  # DeepSpeed rounds the weights to bfloat16, and no buffer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, *(self._kept or self.rows()))
        return F.pad(logits, (self.first_row, self.weight.shape[0] - self.last_row), value=FORBIDDEN_LOGIT)

    @contextlib.contextmanager
    def kept_rows(self, dtype: torch.dtype):
        """Within it the rows stand ready in `dtype`; autocast, which keeps no slices, would cast them at every call."""
        with torch.no_grad():
            self._kept = tuple(part.to(dtype) for part in self.rows())
        try:
            yield
        finally:
            self._kept = None


def confine_head(model, allowed_ids: list[int]) -> None:
    """Leave the policy nothing but `allowed_ids` to choose from. In place; the last call counts.

    Sampling, the policy's log-probs and the reference's then all come from one distribution, which suppressing
    tokens at sampling time alone would not give.

    Args:
        model: a causal LM (or a PEFT model around one) whose head has no trained bias.
    Raises:
        InputError: the head has a bias of its own.
    """
    head = model.get_output_embeddings()
    if head._parameters.get("bias") is not None:
        raise InputError(f"the head of {model.config._name_or_path!r} has a bias of its own; Llasa's has none")
    bias = torch.full((head.weight.shape[0],), FORBIDDEN_LOGIT, dtype=head.weight.dtype, device=head.weight.device)
    bias[allowed_ids] = 0
    head._parameters.pop("bias", None)
    head.register_buffer("bias", bias, persistent=False)
    head.__class__ = ConfinedHead  # the same module and weight: still tied to the embeddings, saved as before
    head.first_row, head.last_row = min(allowed_ids), max(allowed_ids) + 1
