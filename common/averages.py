"""Averages of what was measured."""

import math
from collections.abc import Iterable


def mean_of_known(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN where there is none.

    >>> mean_of_known([0.25, math.nan, 0.75]), mean_of_known([math.nan])
    (0.5, nan)
    """
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
