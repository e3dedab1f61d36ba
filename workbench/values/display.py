"""How a result shows itself: a title and a small table (`tables.py`), in a terminal and in a notebook."""

from collections.abc import Sequence

from workbench.values.tables import Row, html_table, text_table


class Shown:
    """A result that shows itself as `_title` and `_table`."""

    __slots__ = ()

    def _title(self) -> str:
        raise NotImplementedError

    def _table(self) -> tuple[Row, Sequence[Row]]:
        """The head of the table and its rows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return text_table(*self._table(), title=self._title())

    def _repr_html_(self) -> str:
        return html_table(*self._table(), title=self._title())


def plain(value: float, digits: int) -> str:
    """A number with so many digits, without a minus before what rounds to zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"
