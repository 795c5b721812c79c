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
    escaped = (str(cell).replace("|", r"\|") for cell in cells)  # a bare | would start another column
    return f"| {' | '.join(escaped)} |"
