"""Pareto plots: the front by hand, and a picture whatever the names are."""

import pytest

from metrics.pareto import Point, pareto_front, pareto_png


def point(name: str, x: float, y: float) -> Point:
    return Point(name, x, [x - 2, x + 2], y, [y - 1, y + 1])


def test_the_front_by_hand():
    """b costs errors and wins melody; c is worse than b in both; d has b's errors and less melody; e is a again."""
    a, b, c, d = point("a", 20, 3), point("b", 30, 5), point("c", 40, 4), point("d", 30, 2)
    assert pareto_front([c, d, b, a]) == [a, b]
    assert pareto_front([a, point("e", 20, 3)]) == [a]
    assert pareto_front([d, b]) == pareto_front([b, d]) == [b]  # of equal errors the better one alone
    assert pareto_front([]) == []


@pytest.mark.parametrize("name", ["before", "$x_{$", "a\\b", "<b>"])
def test_a_picture(name):
    points = [point(name, 20, 3), point("after", 30, 5)]
    one = pareto_png("WER, %", {"question realised, %": points})
    two = pareto_png("WER, %", {"question realised, %": points, "$": points[:1]})
    assert one.startswith(b"\x89PNG") and two.startswith(b"\x89PNG")
    width = [int.from_bytes(png[16:20], "big") for png in (one, two)]
    assert width[1] == 2 * width[0]  # a panel for each metric
    assert one == pareto_png("WER, %", {"question realised, %": points})  # as a resumed evaluation draws it
