"""The comparison that an evaluation ends with on the terminal: its rows side by side, in at most 100 columns.

    Held-out WER (3 × 120 texts)                    before    after  change
      faster-whisper:build/whisper-base (held-out)  30.4 %   25.4 %  −16 % [−29, −2]
      tiny/whisper.pt (reward's ASR)                16.8 %   11.1 %  −34 % [−51, −12]

With more than two rows they stand below each other, with the change from the first beside each number.
"""

from dataclasses import dataclass

from metrics.formatting import percent, points, relative_change
from metrics.judges import asr_label
from metrics.report import error_unit

MAX_WIDTH = 100  # columns
LABEL_WIDTH = 44
NAME_WIDTH = 16  # of a row's name as a column title
GAP = "  "


@dataclass(frozen=True)
class Comparison:
    """One fraction of every row, None where a row has none; the change of each, as text, is from the first row."""

    label: str
    values: list[float | None]
    changes: list[str | None]


def relative_changes(by_row: list[dict | None]) -> list[str | None]:
    changes = [metrics and metrics["change"] for metrics in by_row]
    return [change and relative_change(change) for change in changes]


def speech_comparison(results: dict) -> list[str]:
    """The error rates of `evaluation.py --task tts`, held-out ASRs first, and the melody that the texts ask for."""
    rows = results["rows"]
    comparisons = []
    for asr, role in results["asr_roles"].items():
        by_row = [row["metrics"]["asr"].get(asr) for row in rows]
        values = [metrics and metrics["error_rate"] for metrics in by_row]
        comparisons.append(Comparison(asr_label(asr, role), values, relative_changes(by_row)))
    for name, label in (("emphasis", "emphasis realised"), ("question", "question realised")):
        by_row = [row["metrics"][name] for row in rows]
        changes = [metrics and metrics["change"] for metrics in by_row]
        values = [metrics and metrics["mean"] for metrics in by_row]
        comparisons.append(Comparison(label, values, [change and f"{points(change)} points" for change in changes]))
    unit = error_unit(results["units"])
    title = f"Held-out {unit} ({len(rows[0]['seeds'])} × {results['num_texts']} texts)"
    return lines(title, [row["name"] for row in rows], comparisons)


def asr_comparison(results: dict) -> list[str]:
    """WER or CER, and hallucinations, of `evaluation.py --task asr`."""
    rows, long_s, unit = results["rows"], results["arguments"]["long_s"], error_unit(results["units"])
    comparisons = []
    parts = ((unit, "all"), (f"{unit}, up to {long_s:g} s", "short"), (f"{unit}, above {long_s:g} s", "long"))
    for label, part in parts:
        by_row = [row["metrics"][part] for row in rows]
        values = [metrics and metrics["wer"] for metrics in by_row]
        comparisons.append(Comparison(label, values, relative_changes(by_row)))
    no_changes = [None] * len(rows)
    hallucinations = [row["metrics"]["all"]["hallucinations"] for row in rows]
    on_non_speech = [row["metrics"]["nonspeech_hallucinations"] for row in rows]
    comparisons.append(Comparison("hallucinations", hallucinations, no_changes))
    comparisons.append(Comparison("hallucinations on non-speech", on_non_speech, no_changes))
    return lines(f"{results['num_clips']} clips", [row["name"] for row in rows], comparisons)


def lines(title: str, names: list[str], comparisons: list[Comparison]) -> list[str]:
    """The comparison as text; metrics that no row has are left out."""
    comparisons = [one for one in comparisons if any(value is not None for value in one.values)]
    if len(names) <= 2:
        return _side_by_side(title, names, comparisons)
    return _below_each_other(title, names, comparisons)


def _side_by_side(title: str, names: list[str], comparisons: list[Comparison]) -> list[str]:
    """A line for each metric, a column for each row."""
    change_title = ["change"] if any(one.changes[-1] for one in comparisons) else []
    cells = [[title, *(shortened(name, NAME_WIDTH) for name in names), *change_title]]
    for one in comparisons:
        change = [one.changes[-1] or "–"] if change_title else []
        cells.append([f"  {shortened(one.label, LABEL_WIDTH)}", *map(percent, one.values), *change])
    return aligned(cells, right=range(1, 1 + len(names)))


def _below_each_other(title: str, names: list[str], comparisons: list[Comparison]) -> list[str]:
    """A line for each row, a column for each metric; metrics that do not fit beside each other make another block."""
    label_column = [title, *(f"  {shortened(name, LABEL_WIDTH - 2)}" for name in names)]
    blocks = [[label_column]]
    for one in comparisons:
        values = [percent(value) for value in one.values]
        widest = max(map(len, values))
        column = [shortened(one.label, LABEL_WIDTH)]
        for value, change in zip(values, one.changes, strict=True):
            column.append(f"{value:>{widest}}{GAP}{change}" if change else f"{value:>{widest}}")
        if len(blocks[-1]) > 1 and _width([*blocks[-1], column]) > MAX_WIDTH:
            blocks.append([label_column])
        blocks[-1].append(column)
    return [line for block in blocks for line in aligned(list(map(list, zip(*block, strict=True))))]


def _width(columns: list[list[str]]) -> int:
    return sum(max(map(len, column)) for column in columns) + len(GAP) * (len(columns) - 1)


def aligned(cells: list[list[str]], right: range = range(0)) -> list[str]:
    """Rows of cells as lines with aligned columns.

    Args:
        right: the columns to align to the right.
    """
    columns = []
    for number, column in enumerate(zip(*cells, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if number in right else cell.ljust(width) for cell in column])
    return [GAP.join(row).rstrip() for row in zip(*columns, strict=True)]


def shortened(text: str, width: int) -> str:
    """At most `width` characters; of a longer text, such as a path, the end is kept."""
    return text if len(text) <= width else f"…{text[1 - width :]}"
