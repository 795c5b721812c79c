"""The files that an evaluation leaves: results.json, results.md and report.html."""

import json
import shlex
from functools import partial
from pathlib import Path

from common.cli import write_whole
from common.tables import markdown_table


def write_results(folder: Path, results: dict, about: str, table: list[list[str]], page: str) -> None:
    """Write all three, each replaced as a whole: a reader meanwhile sees the old or the new file, never half of one.

    Args:
        results: of results.json; `argv` is the command.
        about: the line above the table of results.md.
        table: header and rows.
        page: report.html.
    """
    header, *rows = table
    contents = {
        "results.json": json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False),
        "results.md": f"{about}\n\n    {shlex.join(results['argv'])}\n\n{markdown_table(header, rows)}\n",
        "report.html": page,
    }
    for name, content in contents.items():
        write_whole(folder / name, partial(Path.write_text, data=content, encoding="utf-8"))
