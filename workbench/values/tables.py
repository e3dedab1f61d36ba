"""A result as a table: plain text for a terminal, semantic HTML for Jupyter. Cells are text already."""

from collections.abc import Sequence
from html import escape

Row = Sequence[str]


def text_table(head: Row, rows: Sequence[Row], *, title: str = "") -> str:
    """Columns as wide as their widest cell, a rule under the head, the title above."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*([title] if title else []), text[0], "-" * max(map(len, text)), *text[1:]])


def html_table(head: Row, rows: Sequence[Row], *, title: str = "") -> str:
    """The same as `<table>`; what the cells hold is escaped."""
    caption = f'<caption style="text-align: left">{escape(title)}</caption>' if title else ""
    above = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{caption}<thead><tr>{above}</tr></thead><tbody>{body}</tbody></table>"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, `-` where there is none."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def accuracy_text(value: float, interval: tuple[float, float]) -> str:
    """`.675 [.65, .70]` with the zeros in front."""
    return f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"
