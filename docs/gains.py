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

from docs.forms import METHOD, PAPER, RANDOM, ROOT, summary
from workbench.plots.export import save_figure
from workbench.plots.theme import LIGHT, Theme, titled

FIGURES: Mapping[str, Mapping[str, str]] = {
    "gains_entity": {
        "study_entity": "all boxes asked",
        "study_scenes": "one query",
        "study_few_heads": "six heads train",
        "study_quarter": "sixteen heads",
        "study_thin": "thin heads",
        "study_lineage": "lineage",
        "study_lineage_data": "lineage, more data",
    },
    "gains_mind": {
        "study_mind": "strongest ablations",
        "study_mind_whole": "whole circuits",
        "study_mind_family": "the family",
        "study_mind_sizes": "changes aligned",
    },
    "gains_boxes": {
        "study_smollm2": "by elimination",
        "study_smollm2_positions": "heads at positions",
        "study_smollm2_paths": "path patching",
    },
}
"""A figure -> its studies, and what each is called in it."""
TITLES = {
    "gains_entity": "Entity tracking: what alignment gained over circuit CE",
    "gains_mind": "Theory of mind: what alignment gained over circuit CE",
    "gains_boxes": "SmolLM2-135M on boxes: what alignment gained over circuit CE",
}
ARMS = {
    METHOD: ("matched partners", "circle", 1),
    RANDOM: ("random partners", "diamond-open", 3),
    PAPER: ("paper's matching", "x", 6),
}
"""A condition -> its words, its symbol and its colour's place in the theme."""
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
    rows = [row for name, words in FIGURES[figure].items() for row in rows_of(name, words)]
    drawn = make_subplots(
        rows=1, cols=2, shared_yaxes=True, subplot_titles=list(PARTS.values()), horizontal_spacing=0.04
    )
    for column, part in enumerate(PARTS, 1):
        drawn.update_xaxes(range=edges(rows, part), row=1, col=column)
        for place, (condition, (words, symbol, colour)) in enumerate(ARMS.items()):
            there = [(at, of[condition][part]) for at, (_, of) in enumerate(rows) if condition in of]
            line = {"color": theme.categories[colour - 1]}
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
                name=words,
                legendgroup=words,
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
    titled(drawn, TITLES[figure], remarks, theme, width=1080, height=210 + ROW * len(rows))
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
