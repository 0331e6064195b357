"""Tables as plain text and as Markdown."""

from collections.abc import Callable, Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format left-aligned columns, two spaces apart, without a newline at the end."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def escape_pipes(cell: str) -> str:
    """Keep a cell in one line and one column; other Markdown in the cell stays."""
    return " ".join(cell.split()).replace("|", "\\|")


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], escape: Callable[[str], str] = escape_pipes
) -> str:
    """Format a Markdown table, without a newline at the end.

    Args:
        escape: applied to every cell. The default keeps Markdown: text of foreign files needs a stricter function.
    """
    lines = [list(header), *map(list, rows)]
    if any(len(line) != len(header) for line in lines):
        raise ValueError(f"expected {len(header)} cells in every row, got {sorted({len(line) for line in lines})}")
    head, *body = (f"| {' | '.join(map(escape, line))} |" for line in lines)
    return "\n".join([head, "|---" * len(header) + "|", *body])
