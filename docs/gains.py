"""The figures of what alignment gained, from the committed summaries: `python -m docs.gains` (part of `make figures`).

A row is a cell of a study (a student at one size of data). Left the full model, right the circuit alone: accuracy minus
that of circuit CE, for matched partners and for the controls.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from docs.forms import ARMS, METHOD, PAPER, RANDOM, ROOT, summary
from docs.studies import STUDIES
from workbench.plots.export import save_figure
from workbench.plots.theme import LIGHT, Theme, titled

FIGURES = {
    "gains_entity": ("entity tracking", "Entity tracking"),
    "gains_mind": ("theory of mind", "Theory of mind"),
    "gains_boxes": ("boxes, SmolLM2-135M", "SmolLM2-135M on boxes"),
}
"""A figure -> the task of its studies, and its title's first words."""
LOOKS = {METHOD: ("circle", 0), RANDOM: ("diamond-open", 2), PAPER: ("x", 5)}
"""An arm -> its symbol, and its colour's place in the theme."""
PARTS = {"full": "full model", "circuit": "circuit alone"}
OVER = {"over_prompts": 1.2, "over_seeds": 3.2}
"""An interval -> the width of its bar in pixels."""
ROW, BESIDE, MARGIN = 30, 0.22, 0.04
"""Pixels of a row; how far apart its arms lie, in rows; what is left beside the widest interval, as a share."""


def rows_of(name: str, words: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(label, comparisons with circuit CE) of a study's cells."""
    for (student, _), cell in summary(name).items():
        found = cell["comparisons"].get("circuit_ce", {})
        if METHOD in found:
            yield f"{words} \N{MIDDLE DOT} {student.replace('-', ' ')} \N{MIDDLE DOT} {cell['train_prompts']:,}", found


def gains(figure: str, theme: Theme = LIGHT) -> go.Figure:
    """Every difference of a figure's studies: a mark is the mean over seeds, its thick bar the 95 % interval over
    seeds, its thin one over prompts."""
    task, title = FIGURES[figure]
    rows = [
        row for name, shown in STUDIES[task].items() if shown.short for row in rows_of(f"study_{name}", shown.short)
    ]
    drawn = make_subplots(
        rows=1, cols=2, shared_yaxes=True, subplot_titles=list(PARTS.values()), horizontal_spacing=0.04
    )
    for column, part in enumerate(PARTS, 1):
        drawn.update_xaxes(range=edges(rows, part), row=1, col=column)
        for place, (condition, (symbol, colour)) in enumerate(LOOKS.items()):
            there = [(at, of[condition][part]) for at, (_, of) in enumerate(rows) if condition in of]
            line = {"color": theme.categories[colour]}
            where = [at + (place - 1) * BESIDE for at, _ in there]
            for over, width in OVER.items():
                drawn.add_scatter(
                    **spans(where, [found[over] for _, found in there]),
                    line={**line, "width": width},
                    row=1,
                    col=column,
                )
            drawn.add_scatter(
                x=[found["over_seeds"]["mean"] for _, found in there],
                y=where,
                mode="markers",
                marker={"symbol": symbol, "size": 8, **line},
                name=ARMS[condition],
                legendgroup=condition,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        drawn.add_vline(x=0, line={"color": theme.muted, "width": 1}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    drawn.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[label for label, _ in rows],
        range=[len(rows) - 0.4, -0.6],
        showgrid=True,
    )
    drawn.update_xaxes(title="accuracy minus circuit CE", tickformat="+.2f")
    remarks = [
        "A row: study, student, training prompts. Marks: means over seeds; thick bars: 95 % intervals over seeds; thin "
        "bars: over prompts."
    ]
    titled(
        drawn,
        f"{title}: what alignment gained over circuit CE",
        remarks,
        theme,
        width=1080,
        height=210 + ROW * len(rows),
    )
    return drawn


def edges(rows: Sequence[tuple[str, Mapping[str, Any]]], part: str) -> tuple[float, float]:
    """From the lowest to the highest end of an interval, and a little more."""
    intervals = [of[arm][part][over] for _, of in rows for arm in ARMS if arm in of for over in OVER]
    low, high = (
        pick(each[end] for each in intervals if each[end] is not None) for pick, end in ((min, "low"), (max, "high"))
    )
    return low - MARGIN * (high - low), high + MARGIN * (high - low)


def spans(places: Sequence[float], reaches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lines from low to high at some places, in one trace; none where there is no interval."""
    there = [(place, reach) for place, reach in zip(places, reaches, strict=True) if reach["low"] is not None]
    return {
        "x": [end for _, reach in there for end in (reach["low"], reach["high"], None)],
        "y": [end for place, _ in there for end in (place, place, None)],
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
    }


def main() -> int:
    """Write them to assets/figures, or to a folder that is named."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "assets/figures"
    for name in FIGURES:
        save_figure(gains(name), folder / f"{name}.png", scale=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
