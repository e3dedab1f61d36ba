"""Accuracy by the number of operations in a prompt."""

from collections.abc import Mapping

import pandas as pd
from plotly import graph_objects as go

from workbench.errors import InputError
from workbench.plots.export import with_table
from workbench.plots.theme import LIGHT, Theme, escaped, titled
from workbench.readouts.counts import AccuracyByCount

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")


def operations_figure(
    results: Mapping[str, AccuracyByCount],
    *,
    chance: float | None = None,
    theme: Theme = LIGHT,
    title: str = "Accuracy by number of operations",
) -> go.Figure:
    """A line a model or condition: share of right answers at each number of operations, with Wilson's 95 % interval
    over prompts.

    Lines are set apart a little across, so that their intervals do not hide each other. Errors: `InputError` for no
    results.
    """
    if not results:
        raise InputError("there is no accuracy by count to draw; make one with `AccuracyByCount.of`.")
    figure, frames = go.Figure(), []
    for place, (name, result) in enumerate(results.items()):
        colour, shift = theme.categories[place % len(theme.categories)], 0.05 * (place - (len(results) - 1) / 2)
        rows = list(zip(result.counts, result.accuracy, result.intervals, result.prompts, strict=True))
        about = [
            f"<b>{escaped(name)}</b><br>{count} operations<br>accuracy {value:.3f}<br>95 % interval {low:.3f} to "
            f"{high:.3f}<br>{prompts} prompts"
            for count, value, (low, high), prompts in rows
        ]
        bars = {
            "array": [high - value for _, value, (_, high), _ in rows],
            "arrayminus": [value - low for _, value, (low, _), _ in rows],
        }
        figure.add_scatter(
            x=[count + shift for count in result.counts],
            y=list(result.accuracy),
            mode="lines+markers",
            name=escaped(name),
            hoverinfo="text",
            hovertext=about,
            line={"color": colour, "width": 2.2},
            marker={"size": 9, "symbol": SYMBOLS[place % len(SYMBOLS)]},
            cliponaxis=False,
            error_y={"type": "data", "symmetric": False, "thickness": 1.4, "width": 3, "color": colour, **bars},
        )
        frames.append(result.to_frame().assign(model=name))
    if chance is not None:
        figure.add_hline(y=chance, line={"color": theme.muted, "dash": "dot", "width": 1.5})
    counts = sorted({count for result in results.values() for count in result.counts})
    figure.update_layout(
        xaxis={"title": "operations in the prompt", "tickvals": counts, "range": (counts[0] - 0.3, counts[-1] + 0.3)},
        yaxis={"title": "accuracy (share of prompts)", "range": (-0.02, 1.02), "dtick": 0.2, "tickformat": ".1f"},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )
    remark = "Lines: 95 % Wilson intervals over prompts." + (
        f" Dotted: chance, {chance:.3f}." if chance is not None else ""
    )
    return with_table(
        titled(figure, title, [remark], theme, width=820, height=400, above=28), pd.concat(frames, ignore_index=True)
    )
