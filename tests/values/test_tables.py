"""Tables of results: every column as wide as its widest cell, and what cells hold stays text in HTML."""

import re

from workbench.matching.head_map import HeadMap, Match
from workbench.values.refs import Head
from workbench.values.tables import html_table, number, text_table


def test_columns_line_up_under_their_heads() -> None:
    lines = text_table(("name", "n"), [("a long name", "1"), ("b", "22")], title="what it is").splitlines()
    assert lines[0] == "what it is"
    assert lines[1].index("n", 1) == 0 or lines[1].startswith("name")
    assert lines[2] == "-" * max(map(len, (lines[1], *lines[3:])))
    assert [line.rstrip()[13:] for line in (lines[1], *lines[3:])] == ["n", "1", "22"]


def test_a_table_without_rows_has_its_head() -> None:
    assert text_table(("a", "b"), []).splitlines()[0] == "a  b"
    assert "<tbody></tbody>" in html_table(("a", "b"), [])


def test_what_cells_hold_is_no_markup() -> None:
    page = html_table(("<b>",), [("<script>",)], title="a & b")
    assert not re.search(r"<(script|b)>", page)
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page


def test_missing_numbers_are_a_dash() -> None:
    assert [number(None), number(float("nan")), number(0.12345, 2), number(-0.0004)] == ["-", "-", "0.12", "-0.000"]


def test_a_head_map_shows_its_matches_in_a_terminal_and_in_jupyter() -> None:
    matches = (
        Match(student=Head(0, 1), teacher=Head(2, 3), distance=0.25, margin=0.5, stability=0.9, noise=("student",)),
        Match(student=Head(1, 0), teacher=Head(2, 3), distance=None, margin=None),
    )
    head_map = HeadMap(matches=matches, rule="paper", one_to_one=False)
    text, page = repr(head_map), head_map._repr_html_()
    assert head_map.summary() in text
    for words in (("L0H1", "L2H3", "0.250", "0.500", "0.90", "impact within noise: student"), ("L1H0", "L2H3", "-")):
        (row,) = (line for line in text.splitlines() if line.startswith(words[0]))
        assert all(word in row for word in words)
        assert all(f"<td>{word}</td>" in page for word in words)
