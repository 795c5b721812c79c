"""Numbers as text, for tables, pages and the terminal."""


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.161 is "16.1 %"."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def percent_interval(interval: list[float]) -> str:
    """[0.12, 0.2] is "[12.0, 20.0]"."""
    return f"[{', '.join(f'{100 * value:.1f}' for value in interval)}]"


def relative_change(change: dict | None) -> str:
    """A change of `bootstrap.paired_change` with its interval: "−16 % [−22, −10]"."""
    if change is None:
        return "–"
    low, high = (_signed_percent(value) for value in change["interval"])
    return f"{_signed_percent(change['relative'])} % [{low}, {high}]"


def difference(change: dict | None, digits: int = 2) -> str:
    """A change of `bootstrap.mean_change` with its interval: "−0.02 [−0.05, +0.01]"."""
    if change is None:
        return "–"
    low, high = (_signed(value, digits) for value in change["interval"])
    return f"{_signed(change['difference'], digits)} [{low}, {high}]"


def points(change: dict | None) -> str:
    """A change of percentages with its interval: "+12.5 [+3.0, +20.1]", in percentage points."""
    if change is None:
        return "–"
    return difference(
        {"difference": 100 * change["difference"], "interval": [100 * value for value in change["interval"]]}, digits=1
    )


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _signed_percent(value: float) -> str:
    rounded = round(100 * value)
    return f"{rounded:+d}".replace("-", "−") if rounded else "0"
