"""Tables as text."""


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table, without a newline at its end; cells may be anything that has a string.

    markdown_table(["side", "seconds"], [["ours", 1.5]]) is

        | side | seconds |
        | --- | --- |
        | ours | 1.5 |
    """
    lines = [_line(header), _line(["---"] * len(header)), *(_line(row) for row in rows)]
    return "\n".join(lines)


def _line(cells: list) -> str:
    # A bare | would start another column, and a line break another row
    escaped = (" ".join(str(cell).replace("|", r"\|").splitlines()) for cell in cells)
    return f"| {' | '.join(escaped)} |"
