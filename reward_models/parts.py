"""What a reward says of a part of a rollout, a word or the end: it moves the codes of the part alone (credit.py)."""

import math
from dataclasses import dataclass

import numpy as np

from speech.tokens import CODES_PER_SECOND


@dataclass(frozen=True)
class Part:
    """What a reward says of a part of a rollout.

    Attributes:
        value: comparable with that of the same part in the group's other rollouts.
        start_s, end_s: its time in the rollout; the end is infinite for a part that has the END token too.
    Raises:
        ValueError: a value that is not finite. NaN would pass for a part that the rollout does not have.
    """

    value: float
    start_s: float
    end_s: float

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise ValueError(f"value of a part: must be finite (got {self.value})")

    def tokens(self, length: int) -> slice:
        """Those of its tokens, in a rollout of `length`.

        >>> Part(1.0, 0.05, 0.13).tokens(100)
        slice(2, 7, None)
        """
        end = length if self.end_s == float("inf") else min(length, int(np.ceil(self.end_s * CODES_PER_SECOND)))
        return slice(min(end, max(0, int(self.start_s * CODES_PER_SECOND))), end)
