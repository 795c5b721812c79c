"""Pass@K and Failure@K: the estimator against all draws, and the metrics of a row by hand."""

import doctest
from itertools import combinations

import pytest

import metrics.pass_at_k
from metrics.pass_at_k import MAX_ERROR_RATE, any_of_k, pass_metrics


def test_worked_numbers_of_docstrings():
    result = doctest.testmod(metrics.pass_at_k)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(("n", "count"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5)])
def test_the_estimator_is_the_share_of_all_draws(n, count):
    samples = [True] * count + [False] * (n - count)
    for k in range(1, n + 1):
        draws = list(combinations(samples, k))
        assert any_of_k(n, count, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def row_of(*seeds: list[float]) -> dict:
    """A row with one list of error rates per seed, a rate a text."""
    clips = [{"text": str(i), "asr": {"a": {"error_rate": rate}}} for rates in seeds for i, rate in enumerate(rates)]
    return {"seeds": list(range(len(seeds))), "clips": clips}


def test_metrics_of_a_row_by_hand():
    """The first text is good in one of four samples, the second in all: Pass@1 (1/4 + 1) / 2, Pass@4 (1 + 1) / 2, and
    the worst of four fails in the first only: Failure@4 (1 + 0) / 2. A rate of exactly 0.1 is good."""
    row = row_of([0.5, 0.0], [MAX_ERROR_RATE, 0.0], [0.11, 0.1], [1.0, 0.0])
    metrics = pass_metrics(row, row, "a")
    means = {name: one["mean"] for name, one in metrics.items()}
    assert means == {"Pass@1": 0.625, "Pass@4": 1.0, "Failure@4": 0.5}
    assert metrics["Pass@1"]["interval"] == pytest.approx([0.25, 1.0]) and metrics["Pass@1"]["change"] is None
    assert metrics["Pass@4"]["interval"] == [1.0, 1.0]


def test_changes_are_paired_by_text():
    """Pass@1 of each text rises by 1/2: so does every draw of texts. Failure@2 falls in the second text only."""
    first, row = row_of([1.0, 0.0], [1.0, 1.0]), row_of([0.0, 0.0], [1.0, 0.0])
    metrics = pass_metrics(row, first, "a")
    assert metrics["Pass@1"]["change"]["difference"] == pytest.approx(0.5)
    assert metrics["Pass@1"]["change"]["interval"] == pytest.approx([0.5, 0.5])
    assert metrics["Failure@2"]["change"] == {"difference": -0.5, "interval": [-1.0, 0.0]}


def test_one_sample_has_none_and_another_number_of_samples_is_not_compared():
    assert pass_metrics(row_of([0.0, 1.0]), row_of([0.0, 1.0]), "a") == {}
    metrics = pass_metrics(row_of([0.0], [1.0]), row_of([0.0], [0.0], [0.0]), "a")
    assert metrics["Pass@2"]["mean"] == 1.0 and metrics["Pass@2"]["change"] is None
