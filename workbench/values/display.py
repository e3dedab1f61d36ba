"""How a result shows itself: a line and a small table, as text in a terminal and as HTML in a notebook."""

import html
from collections.abc import Sequence

Row = Sequence[str]


def text_table(title: str, columns: Row, rows: Sequence[Row]) -> str:
    """The title and the rows under their columns, two spaces apart; numbers (cells that begin with a digit, a sign or a
    dot) to the right."""
    table = [columns, *rows] if any(columns) else list(rows)
    widths = [max(len(row[place]) for row in table) for place in range(len(columns))] if table else []
    return "\n".join([title, *("  " + _line(row, widths) for row in table)])


def _line(row: Row, widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) if _number(cell) else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join(cells).rstrip()


def _number(cell: str) -> bool:
    return cell[:1].isdigit() or (cell[:1] in "+-." and cell[1:2] != "")


def html_table(title: str, columns: Row, rows: Sequence[Row]) -> str:
    """The same as HTML; everything in it is escaped."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns) if any(columns) else ""
    body = "".join(
        "<tr>" + "".join(f"<td{_align(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    above = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"<div><p>{html.escape(title)}</p><table>{above}<tbody>{body}</tbody></table></div>"


def _align(cell: str) -> str:
    return ' style="text-align: right"' if _number(cell) else ""


class Shown:
    """A result that shows itself as `_title` and `_table`."""

    __slots__ = ()

    def _title(self) -> str:
        raise NotImplementedError

    def _table(self) -> tuple[Row, Sequence[Row]]:
        """Columns (empty names: no head) and rows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return text_table(self._title(), *self._table())

    def _repr_html_(self) -> str:
        return html_table(self._title(), *self._table())
