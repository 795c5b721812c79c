"""Pass@K and Failure@K: the best and the worst of K samples of a text.

Pass@K is the chance that at least one of K samples is good, as best-of-K finds it; Failure@K the chance that at least
one is not, as a user of K clips meets it. A sample is good if its error rate is at most `MAX_ERROR_RATE`.
"""

from math import comb

import numpy as np

from metrics.bootstrap import sum_metrics

MAX_ERROR_RATE = 0.1  # of a good sample: in a text of fewer than ten words, no error


def any_of_k(n: int, count: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold at least one of `count`: 1 − C(n−c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1). One of 4 in 2 draws: 1 − C(3, 2) / C(4, 2) =
    1 − 3/6.

    >>> any_of_k(4, 1, 2), any_of_k(4, 1, 4), any_of_k(4, 0, 4), any_of_k(3, 2, 1)
    (0.5, 1.0, 0.0, 0.6666666666666667)
    """
    return 1 - comb(n - count, k) / comb(n, k)


def numbers_of_good(row: dict, asr: str) -> np.ndarray:
    """Good samples of each text by one evaluation ASR, shape (num_texts,)."""
    good = [clip["asr"][asr]["error_rate"] <= MAX_ERROR_RATE for clip in row["clips"]]
    return np.array(good).reshape(len(row["seeds"]), -1).sum(axis=0)


def pass_metrics(row: dict, first: dict, asr: str) -> dict[str, dict]:
    """ "Pass@1", "Pass@K" and "Failure@K" of `sum_metrics`, with K the number of samples a text; empty if that is 1.

    Args:
        first: the row to compare with; without as many samples a text it is not compared.
    """
    num_samples = len(row["seeds"])
    if num_samples == 1:
        return {}
    if len(first["seeds"]) != num_samples:
        first = row

    def chances(one: dict, k: int, wanted_good: bool) -> np.ndarray:
        good = numbers_of_good(one, asr)
        counts = good if wanted_good else num_samples - good
        values = [any_of_k(num_samples, int(count), k) for count in counts]
        return np.array([values, np.ones(len(values))])

    return {
        "Pass@1": sum_metrics(row, first, lambda one: chances(one, 1, True)),
        f"Pass@{num_samples}": sum_metrics(row, first, lambda one: chances(one, num_samples, True)),
        f"Failure@{num_samples}": sum_metrics(row, first, lambda one: chances(one, num_samples, False)),
    }
