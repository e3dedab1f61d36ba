"""The same figure for a narrow screen: panels below one another, colour bar and legend under the plot, long labels on
several lines. Numbers and colours stay."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, TypeAlias

from plotly import graph_objects as go

WIDTH = 358
"""Pixels of text on a phone that is 390 wide."""
BETWEEN = 78
"""Pixels between stacked panels, for the upper one's axis title and the lower one's name."""
LABEL, NAME = 16, 40
"""Letters of a line of a tick's label, and of a legend's entry."""
MANY = 12
"""Labels from which a line of ticks is set in small letters."""
Figure: TypeAlias = Any
"""A `go.Figure`, whose own types know no attributes of traces and axes."""
ENTRY, LETTER, LINE = 44, 6.4, 19
"""Pixels: a legend entry's symbol, a letter, and a line of it."""


def narrow(figure: go.Figure, width: int = WIDTH) -> go.Figure:
    """A copy for `width` pixels; its height is what it needs then."""
    slim: Figure = go.Figure(figure)
    layout = slim.layout
    wide = layout.width or 700
    margin = {side: _margin(slim, side) for side in "lrtb"}
    inside = {"across": wide - margin["l"] - margin["r"], "up": (layout.height or 450) - margin["t"] - margin["b"]}
    margin |= {"l": min(margin["l"], 76), "r": 14, "t": min(margin["t"], 56)}  # a legend above has gone below
    inside["up"] = _stacked(slim, inside["up"])
    _wrap_ticks(slim)
    _room_for_labels(slim, width - 34)
    below = _bar_below(slim)
    below += _legend_below(slim, width, below)
    bottom = min(margin["b"], 64) + below
    layout.update(width=width, height=round(inside["up"] + margin["t"] + bottom))
    layout.margin.update(l=margin["l"], r=margin["r"], t=margin["t"], b=bottom)
    return slim


def _margin(figure: Figure, side: str) -> float:
    """As the figure or else its template has it."""
    own = figure.layout.margin[side]
    usual = figure.layout.template.layout.margin[side] if figure.layout.template else None
    return own if own is not None else usual if usual is not None else 60


def _axis(figure: Figure, name: str) -> Any:
    """`x2` -> the layout's `xaxis2`."""
    return figure.layout[f"{name[0]}axis{name[1:]}"]


def _panels(figure: Figure) -> list[tuple[str, str]]:
    """The pairs of axes that something is drawn on, in order."""
    return list(dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in figure.data))


def _stacked(figure: Figure, up: float) -> float:
    """Panels that stand side by side go below one another, each as high as it was; returns the plot's height."""
    panels = _panels(figure)
    starts = [(_axis(figure, x).domain or (0, 1))[0] for x, _ in panels]
    if len(set(starts)) < 2:
        return up
    order = [panel for _, panel in sorted(zip(starts, panels, strict=True), key=lambda pair: pair[0])]
    heights = [up * (domain[1] - domain[0]) for domain in (_axis(figure, y).domain or (0, 1) for _, y in order)]
    total, top = sum(heights) + BETWEEN * (len(order) - 1), 0.0
    for (x, y), height in zip(order, heights, strict=True):
        _axis(figure, x).domain = (0, 1)
        _axis(figure, y).domain = (max(0.0, 1 - (top + height) / total), 1 - top / total)
        _axis(figure, x).anchor = y
        _axis(figure, y).update(
            anchor=x, showticklabels=None if _axis(figure, y).matches else _axis(figure, y).showticklabels
        )
        top += height + BETWEEN
    return total


def _wrap_ticks(figure: Figure) -> None:
    for axis in figure.select_yaxes():
        if axis.ticktext:
            many = len(axis.ticktext) > MANY
            axis.ticktext = [_wrapped(text, 24 if many else LABEL) for text in axis.ticktext]
            axis.tickfont.size = 9 if many else axis.tickfont.size


def _room_for_labels(figure: Figure, across: float) -> None:
    """Labels beside points get smaller letters, and the room that they need on both sides of what spans 0 to 1."""
    for trace in figure.data:
        if trace.type == "scatter" and trace.textposition in ("middle left", "middle right"):
            trace.textfont.size = 10
            need = min(0.42 * across, 5.6 * max(map(len, trace.text)) + 14)
            axis, edge = _axis(figure, trace.xaxis or "x"), need / (across - 2 * need)
            axis.range = (min(axis.range[0], -edge), max(axis.range[1], 1 + edge))


def _wrapped(text: str, letters: int) -> str:
    """On several lines; bold stays bold, because a tag opens and closes within the whole."""
    return "<br>".join(textwrap.wrap(text, letters, break_long_words=False)) if len(text) > letters else text


def _bar_below(figure: Figure) -> int:
    """A colour bar lies under the plot; returns the pixels that it takes."""
    bars = [figure.layout.coloraxis.colorbar] if figure.layout.coloraxis.cmax is not None else []
    bars += [trace.colorbar for trace in figure.data if trace.type == "heatmap" and _has_bar(trace)]
    for bar in bars:
        place = {"x": 0.5, "xanchor": "center", "y": 0, "yanchor": "bottom", "yref": "container", "xpad": 0}
        bar.update(orientation="h", len=0.8, lenmode="fraction", thickness=10, ypad=12, **place)
        bar.title.side = "top"
    return 62 if bars else 0


def _has_bar(trace: Any) -> bool:
    return trace.coloraxis is None and trace.showscale is not False


def legend_lines(names: Sequence[str], width: float) -> int:
    """How many lines a horizontal legend takes: plotly sets it in columns as wide as the widest entry."""
    texts = [name.split("<br>") for name in names]
    columns = max(1, int(width / (ENTRY + LETTER * max(len(line) for lines in texts for line in lines))))
    return max(map(len, texts)) * math.ceil(len(names) / columns)


def _legend_below(figure: Figure, width: int, below: int) -> int:
    """A legend lies under the plot, above a colour bar; returns the pixels that it takes."""
    named = [trace for trace in figure.data if trace.showlegend is not False and trace.name and trace.type != "heatmap"]
    if figure.layout.showlegend is False or (len(named) < 2 and figure.layout.showlegend is not True):
        return 0
    for trace in named:
        trace.name = _wrapped(trace.name, NAME)
    lines = legend_lines([trace.name for trace in named], width - 20) + bool(figure.layout.legend.title.text)
    place = {"x": 0, "xanchor": "left", "xref": "container", "y": 0, "yanchor": "bottom", "yref": "container"}
    figure.layout.legend.update(orientation="h", **place)
    figure.layout.legend.title.side = "top"
    return LINE * lines + 16 + (0 if below == 0 else 8)
