"""Corpus error rates, their intervals and changes, by hand-worked numbers."""

import numpy as np
import pytest

from metrics.bootstrap import change_from_first, edit_counts, error_metrics, mean_metrics, paired_change


def row_of(edits, lengths):
    """A row with one list of counts per seed."""
    clips = [
        {"text": str(i), "asr": {"a": {"edits": e, "ref_length": n}}}
        for seed_edits, seed_lengths in zip(edits, lengths, strict=True)
        for i, (e, n) in enumerate(zip(seed_edits, seed_lengths, strict=True))
    ]
    return {"seeds": list(range(len(edits))), "clips": clips}


def test_error_rate_is_over_the_words_of_all_texts_and_seeds():
    """Texts of 1 and 9 words. Seed 0: 1 and 0 edits, 1/10. Seed 1: 0 and 3 edits, 3/10. Together 4/20, and not
    the mean of the clips' rates, (1 + 0 + 0 + 1/3) / 4 = 1/3. Std of 0.1 and 0.3 with n - 1: 0.1414."""
    metrics = error_metrics(edit_counts(row_of([[1, 0], [0, 3]], [[1, 9], [1, 9]]), "a"))
    assert metrics["error_rate"] == pytest.approx(0.2)
    assert metrics["per_seed"] == pytest.approx([0.1, 0.3])
    assert metrics["seed_mean"] == pytest.approx(0.2)
    assert metrics["seed_std"] == pytest.approx(0.1414, abs=1e-4)


def test_interval_resamples_texts_with_all_their_seeds():
    """Two texts of one word, one always right and one always wrong: a draw gives 0, 1/2 or 1 with chances 1/4, 1/2
    and 1/4, so the interval is [0, 1]. Drawing the 2 x 50 clips singly would give about [0.4, 0.6]."""
    many_seeds = row_of([[0, 1]] * 50, [[1, 1]] * 50)
    assert error_metrics(edit_counts(many_seeds, "a"))["interval"] == [0.0, 1.0]


def test_interval_of_100_one_word_texts_is_the_binomial_interval():
    """30 of 100 one-word texts wrong: 0.3 +- 1.96 sqrt(0.3 * 0.7 / 100) = [0.21, 0.39]; of 90 % [0.22, 0.38]."""
    counts = edit_counts(row_of([[1] * 30 + [0] * 70], [[1] * 100]), "a")
    assert error_metrics(counts)["interval"] == pytest.approx([0.21, 0.39], abs=0.001)


def test_one_seed_has_no_deviation_and_no_errors_have_an_interval_of_width_0():
    metrics = error_metrics(edit_counts(row_of([[0, 0]], [[2, 3]]), "a"))
    assert metrics["seed_std"] is None and metrics["interval"] == [0.0, 0.0]


def test_change_is_paired_by_text():
    """Half of the errors of each text gone: -50 % in every draw, however the texts differ."""
    first, row = row_of([[2, 2, 8]], [[4, 4, 9]]), row_of([[1, 1, 4]], [[4, 4, 9]])
    result = change_from_first(row, first, "a")
    assert result["relative"] == pytest.approx(-0.5)
    assert result["interval"] == pytest.approx([-0.5, -0.5])
    assert change_from_first(first, row_of([[0, 0, 0]], [[4, 4, 9]]), "a") is None  # no error to lose
    assert change_from_first(first, row_of([[2]], [[4]]), "a") is None  # other texts


def test_paired_change_is_of_rates_over_all_texts():
    """First 8 errors of 18 words, then 6 of 24: 0.25 / 0.4444 - 1 = -43.75 %."""
    first, counts = np.array([[4, 4], [10, 8]]), np.array([[3, 3], [16, 8]])
    assert paired_change(counts, first)["relative"] == pytest.approx(-0.4375)
    # the first text alone: (3 / 16) / (4 / 10) - 1 = -53.1 %, the second: (3 / 8) / (4 / 8) - 1 = -25 %
    assert paired_change(counts, first)["interval"] == pytest.approx([-0.53125, -0.25])


@pytest.mark.parametrize(("texts_with_errors", "has_interval"), [(1, False), (4, False), (6, True)])
def test_a_change_from_so_few_errors_that_draws_have_none_is_not_known(texts_with_errors, has_interval):
    """40 texts, no error left: "-100 % [-100, -100]" of one text with errors would be certain where nothing is.

    (1 - k / 40) ** 40 of the draws have no error: 36 % for k = 1, 1.5 % for 4, 0.15 % for 6.
    """
    first, counts = np.zeros((2, 40)), np.zeros((2, 40))
    first[1] = counts[1] = 8
    first[0, :texts_with_errors] = 1
    assert (paired_change(counts, first) is not None) == has_interval


def valued_row(*seeds: list[float | None]) -> dict:
    """A row with one list of values per seed, a value a text."""
    clips = [{"text": str(i), "value": value} for values in seeds for i, value in enumerate(values)]
    return {"seeds": list(range(len(seeds))), "clips": clips}


def value_of(clip: dict) -> float | None:
    return clip["value"]


def test_means_are_over_the_clips_that_have_a_value():
    """0.5 and 0.9 of the first text, 0.1 of the second, whose other clip failed: (0.5 + 0.9 + 0.1) / 3 = 0.5. A draw of
    the first text alone has 0.7, of the second alone 0.1, each with a chance of 1/4."""
    row = valued_row([0.5, 0.1], [0.9, None])
    metrics = mean_metrics(row, row, value_of)
    assert metrics["mean"] == pytest.approx(0.5) and metrics["interval"] == pytest.approx([0.1, 0.7])
    assert metrics["change"] is None
    assert mean_metrics(valued_row([None, None]), row, value_of) is None
    zero = valued_row([0.0, 1.0])  # a value like any other
    assert mean_metrics(zero, zero, value_of)["mean"] == 0.5


def test_changes_of_means_are_paired_by_text():
    """Each text 0.1 higher: the difference is 0.1 in every draw, however the texts differ."""
    first, row = valued_row([0.2, 0.9, 0.4]), valued_row([0.3, 1.0, 0.5])
    change = mean_metrics(row, first, value_of)["change"]
    assert change["difference"] == pytest.approx(0.1) and change["interval"] == pytest.approx([0.1, 0.1])
    # 0.2 higher, 0.1 lower: on average 0.05, and -0.1 to 0.2 by draw
    change = mean_metrics(valued_row([0.4, 0.8]), valued_row([0.2, 0.9]), value_of)["change"]
    assert change["difference"] == pytest.approx(0.05) and change["interval"] == pytest.approx([-0.1, 0.2])
    assert mean_metrics(row, valued_row([0.2]), value_of)["change"] is None  # other texts
    assert mean_metrics(row, valued_row([None] * 3), value_of)["change"] is None


def test_draws_without_any_value_are_left_out():
    """Of two texts the second has no value in either row: a draw of it alone says nothing."""
    first, row = valued_row([0.2, None]), valued_row([0.3, None])
    metrics = mean_metrics(row, first, value_of)
    assert metrics["interval"] == pytest.approx([0.3, 0.3])
    assert metrics["change"]["interval"] == pytest.approx([0.1, 0.1])
    # In the first row alone: 0.3 - 0.2 of the first text, (0.3 + 0.5) / 2 - 0.2 of both
    change = mean_metrics(valued_row([0.3, 0.5]), first, value_of)["change"]
    assert change["difference"] == pytest.approx(0.2) and change["interval"] == pytest.approx([0.1, 0.2])
