"""Corpus error rates, their intervals and changes, by hand-worked numbers."""

import numpy as np
import pytest

from metrics.bootstrap import change_from_first, edit_counts, error_metrics, paired_change


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
    """30 of 100 one-word texts wrong: 0.3 +- 1.96 sqrt(0.3 * 0.7 / 100) = [0.21, 0.39]."""
    counts = edit_counts(row_of([[1] * 30 + [0] * 70], [[1] * 100]), "a")
    assert error_metrics(counts)["interval"] == pytest.approx([0.21, 0.39], abs=0.011)


def test_one_seed_has_no_deviation_and_no_errors_have_an_interval_of_width_0():
    metrics = error_metrics(edit_counts(row_of([[0, 0]], [[2, 3]]), "a"))
    assert metrics["seed_std"] is None and metrics["interval"] == [0.0, 0.0]


def test_change_is_paired_by_text():
    """Half of the errors of each text gone: -50 % in every draw, however the texts differ."""
    first, row = row_of([[2, 0, 8]], [[4, 4, 9]]), row_of([[1, 0, 4]], [[4, 4, 9]])
    result = change_from_first(row, first, "a")
    assert result["relative"] == pytest.approx(-0.5)
    assert result["interval"] == pytest.approx([-0.5, -0.5])
    assert change_from_first(first, row_of([[0, 0, 0]], [[4, 4, 9]]), "a") is None  # no error to lose
    assert change_from_first(first, row_of([[2]], [[4]]), "a") is None  # other texts


def test_paired_change_is_of_rates_over_all_texts():
    """First 4 errors of 10 words, then 3 of 10: 0.3 / 0.4 - 1 = -25 %. A draw of the second text alone is left out."""
    first, counts = np.array([[4, 0], [5, 5]]), np.array([[3, 0], [5, 5]])
    result = paired_change(counts, first)
    assert result["relative"] == pytest.approx(-0.25) and result["interval"] == pytest.approx([-0.25, -0.25])
