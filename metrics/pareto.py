"""Pareto plots: the error rate of each checkpoint against another metric, of which more is better."""

import io
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A checkpoint: error rate and the other metric, each with its 95 % interval."""

    name: str
    x: float
    x_interval: list[float]
    y: float
    y_interval: list[float]


def pareto_front(points: list[Point]) -> list[Point]:
    """The points to which no other is better in one metric and as good in the other, by error rate.

    Of (20, 3), (30, 5), (40, 4) and (30, 2) the first two: (40, 4) is worse than (30, 5) in both, (30, 2) in one.
    """
    front = []
    for point in sorted(points, key=lambda one: (one.x, -one.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def pareto_png(x_title: str, panels: dict[str, list[Point]]) -> bytes:
    """A PNG with a panel for each metric: points with their intervals, and the front as a stepped line.

    Args:
        panels: title of the y axis -> points.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.8 * len(panels), 4.2), layout="constrained")
    for axis, (y_title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        front = pareto_front(points)
        axis.step([point.x for point in front], [point.y for point in front], where="post", color="0.7", zorder=0)
        for point in points:
            x_low, x_high = point.x_interval
            y_low, y_high = point.y_interval
            color = "tab:blue" if point in front else "0.45"
            axis.plot([x_low, x_high], [point.y, point.y], color=color, alpha=0.4)
            axis.plot([point.x, point.x], [y_low, y_high], color=color, alpha=0.4)
            axis.plot([point.x], [point.y], "o", color=color)
            axis.annotate(
                point.name,
                (point.x, point.y),
                xytext=(6, 6),
                textcoords="offset points",
                parse_math=False,  # a name is no formula
            )
        axis.margins(0.12)
        axis.set_xlabel(x_title, parse_math=False)
        axis.set_ylabel(y_title, parse_math=False)
        axis.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
