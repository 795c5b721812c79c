"""Corpus error rates and means with bootstrap intervals over texts."""

from collections.abc import Callable

import numpy as np

NUM_RESAMPLES = 2_000  # the ends of an interval then vary by some 2 % of its width
MAX_ERRORLESS = 0.005  # draws without errors that a relative change leaves out: a fifth of what is beyond an end


def resampled_sums(counts: np.ndarray) -> np.ndarray:
    """Bootstrap over texts: each row of `counts`, shape (k, num_texts), summed over the same random draws.

    Returns:
        shape (k, NUM_RESAMPLES).
    """
    num_texts = counts.shape[1]
    uniform = np.full(num_texts, 1 / num_texts)
    times_drawn = np.random.default_rng(0).multinomial(num_texts, uniform, size=NUM_RESAMPLES)
    return counts @ times_drawn.T


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def edit_counts(row: dict, asr: str) -> np.ndarray:
    """Edits and reference lengths by one evaluation ASR, shape (2, num_seeds, num_texts)."""
    errors = [clip["asr"][asr] for clip in row["clips"]]
    counts = [[clip["edits"] for clip in errors], [clip["ref_length"] for clip in errors]]
    return np.array(counts).reshape(2, len(row["seeds"]), -1)


def error_metrics(counts: np.ndarray) -> dict:
    """Corpus-level error rate: all edits over all words (or characters) of all texts and seeds.

    The interval resamples the texts, all seeds of one together: its seeds share a text's difficulty.

    Args:
        counts: from `edit_counts`.
    """
    edits, ref_length = counts.sum(axis=(1, 2))
    resampled_edits, resampled_length = resampled_sums(counts.sum(axis=1))
    per_seed = counts[0].sum(axis=1) / counts[1].sum(axis=1)
    return {
        "error_rate": float(edits / ref_length),
        "interval": interval(resampled_edits / resampled_length),
        "per_seed": per_seed.tolist(),
        "seed_mean": float(per_seed.mean()),
        "seed_std": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
    }


def change_from_first(row: dict, first: dict, asr: str) -> dict | None:
    """`paired_change` of a row's error rate from the first row's; None where the rows have different texts."""
    if first_seed_texts(row) != first_seed_texts(first):
        return None
    return paired_change(edit_counts(row, asr).sum(axis=1), edit_counts(first, asr).sum(axis=1))


def paired_change(counts: np.ndarray, first_counts: np.ndarray) -> dict | None:
    """Relative change of an error rate with its 95 % interval, paired by text: each draw of texts serves both sides.

    Args:
        counts, first_counts: edits and reference lengths, shape (2, num_texts), of the same texts in the same order.
    Returns:
        "relative" (−0.5: half of the errors are gone) and "interval". None if the first has no errors to lose, or so
        few that more than MAX_ERRORLESS of the draws have none: the ends of the interval would hang on them.
    """
    counts = np.concatenate([counts, first_counts])
    sums = resampled_sums(counts)
    errorless = sums[2] == 0  # such a draw has no relative change
    if errorless.mean() > MAX_ERRORLESS:
        return None

    def relative(edits, length, first_edits, first_length):
        return (edits / length) / (first_edits / first_length) - 1

    return {"relative": float(relative(*counts.sum(axis=1))), "interval": interval(relative(*sums[:, ~errorless]))}


def value_sums(row: dict, value: Callable[[dict], float | None]) -> np.ndarray:
    """Sum of a value of the clips of each text, and in how many clips it is known, shape (2, num_texts)."""
    values = [value(clip) for clip in row["clips"]]
    sums = np.array([[v or 0.0 for v in values], [v is not None for v in values]])
    return sums.reshape(2, len(row["seeds"]), -1).sum(axis=1)


def mean_metrics(row: dict, first: dict, value: Callable[[dict], float | None]) -> dict | None:
    """`sum_metrics` of a value of the clips: its mean over those in which it is known.

    Args:
        value: of a clip; None where it has none.
    """
    return sum_metrics(row, first, lambda one: value_sums(one, value))


def sum_metrics(row: dict, first: dict, sums_of: Callable[[dict], np.ndarray]) -> dict | None:
    """A mean over texts, each with its weight; None if it is of none.

    Args:
        first: the row to compare with.
        sums_of: of a row: the sum of each text's values, and of how many, shape (2, num_texts).
    Returns:
        "mean", its 95 % "interval" over texts, and "change": `mean_change` from the first row, None for the first row
        and where the rows have different texts.
    """
    sums = sums_of(row)
    if sums[1].sum() == 0:
        return None
    change = None
    if row is not first and first_seed_texts(row) == first_seed_texts(first):
        change = mean_change(sums, sums_of(first))
    resampled, known = resampled_sums(sums)
    return {
        "mean": float(sums[0].sum() / sums[1].sum()),
        "interval": interval((resampled / np.maximum(known, 1))[known > 0]),
        "change": change,
    }


def mean_change(sums: np.ndarray, first_sums: np.ndarray) -> dict | None:
    """Difference of two means with its 95 % interval, paired by text: each draw of texts serves both sides.

    Args:
        sums, first_sums: sums and numbers of values, of the same texts in the same order.
    Returns:
        "difference" and "interval"; None if the first row has no value.
    """
    if first_sums[1].sum() == 0:
        return None

    def difference(total, known, first_total, first_known):
        return total / known - first_total / first_known

    sums = np.concatenate([sums, first_sums])
    resampled = resampled_sums(sums)
    resampled = resampled[:, (resampled[1] > 0) & (resampled[3] > 0)]
    return {"difference": float(difference(*sums.sum(axis=1))), "interval": interval(difference(*resampled))}


def first_seed_texts(row: dict) -> list[str]:
    return [clip["text"] for clip in row["clips"][: len(row["clips"]) // len(row["seeds"])]]
