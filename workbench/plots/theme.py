"""The look of every figure: one frozen `Theme`, passed to each figure function, never global.

Colours can be told apart with colour-blindness: categories are Okabe and Ito's (without their yellow, which is lost on
white), signed values run blue - neutral - orange around zero, shares run along a part of matplotlib's `magma`. No web
fonts: a figure needs no network.
"""

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from plotly import graph_objects as go

HELPS, HURTS = "orange", "blue"
"""The colours of what helps the task and of what works against it, in words: the same in every figure, in the report
and in the explorer (`Theme.diverging`, `Theme.helps`, `Theme.hurts`). Zero is the background."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours (CSS) and font of a figure."""

    background: str
    ink: str
    """Text, outlines."""
    muted: str
    """Secondary text, unmatched or missing things."""
    grid: str
    """Grid lines and the seams between cells."""
    missing: str
    """Cells that were not measured."""
    strong_ink: str
    """Text on a cell of strong colour."""
    strong: float
    """The share of the largest value from which a cell's colour is strong."""
    diverging: tuple[str, ...]
    """Most negative ... zero ... most positive, evenly spaced."""
    sequential: tuple[str, ...]
    """0 ... 1, evenly spaced, all readable as a thin line on the background."""
    categories: tuple[str, ...]
    font: str = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
    mono: str = "Menlo, Consolas, DejaVu Sans Mono, Liberation Mono, monospace"
    """Font of tokens."""
    size: int = 13
    """Font size in pixels."""

    @property
    def wash(self) -> tuple[str, ...]:
        """From nothing (the background) to much, for amounts that are never negative."""
        return self.diverging[len(self.diverging) // 2 :: -1]

    @property
    def hurts(self) -> str:
        """A line for an effect below 0."""
        return self.diverging[1]

    @property
    def helps(self) -> str:
        """A line for an effect above 0."""
        return self.diverging[-2]


LIGHT = Theme(
    background="#ffffff",
    ink="#1a1c1f",
    muted="#6b7178",
    grid="#e3e6ea",
    missing="#c9cdd2",
    strong_ink="#ffffff",
    strong=0.75,
    diverging=("#0b4f8a", "#4c93c8", "#b9d7ec", "#ffffff", "#fbd3a6", "#e8893a", "#a8480b"),
    sequential=("#feb078", "#f1605d", "#b73779", "#721f81", "#2c115f"),
    categories=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#1a1c1f"),
)
DARK = Theme(
    background="#14171a",
    ink="#eceff2",
    muted="#9aa2aa",
    grid="#31363c",
    missing="#565d64",
    strong_ink="#14171a",
    strong=0.5,
    diverging=("#a5d4ff", "#4a95d6", "#1f4a70", "#14171a", "#5e3512", "#cf7423", "#ffc48f"),
    sequential=("#8c2981", "#c83e73", "#f76f5c", "#feb078", "#fcfdbf"),
    categories=("#4aa3df", "#e69f00", "#00b98a", "#e08fbd", "#9ad7fa", "#ff7a2e", "#eceff2"),
)


def colour_scale(colours: Sequence[str]) -> list[tuple[float, str]]:
    """Evenly spaced colours as a plotly colour scale."""
    return [(place / (len(colours) - 1), colour) for place, colour in enumerate(colours)]


def escaped(text: str) -> str:
    """Text as plotly shows it literally: its labels read some HTML."""
    return html.escape(text, quote=False)


def wrapped(text: str, pixels: int, theme: Theme) -> list[str]:
    """Escaped lines of text that fit a width, at about half the font size per character."""
    return [
        escaped(line)
        for line in textwrap.wrap(text.replace(" %", "\u00a0%"), max(12, int(pixels / (0.52 * theme.size)))) or [""]
    ]


def faint(colour: str, opacity: float = 0.18) -> str:
    """A `#rrggbb` colour as a transparent one."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def templated(figure: go.Figure, theme: Theme) -> go.Figure:
    """The same figure with the theme's fonts, colours, margins and background."""
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.muted,
        "tickcolor": theme.muted,
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": theme.size}},
    }
    layout = go.Layout(
        font={"family": theme.font, "size": theme.size, "color": theme.ink},
        paper_bgcolor=theme.background,
        plot_bgcolor=theme.background,
        margin={"l": 60, "r": 30, "t": 60, "b": 55},
        hoverlabel={
            "bgcolor": theme.background,
            "bordercolor": theme.muted,
            "font": {"family": theme.font, "color": theme.ink},
            "align": "left",
        },
        legend={"bgcolor": "rgba(0,0,0,0)", "title": {"font": {"size": theme.size}}},
        xaxis=axis,
        yaxis=axis,
        colorway=theme.categories,
        coloraxis={"colorbar": {"title": {"font": {"size": theme.size}}, "tickfont": {"size": theme.size - 1}}},
    )
    return figure.update_layout(template=go.layout.Template(layout=layout))


def titled(
    figure: go.Figure, title: str, remarks: Sequence[str], theme: Theme, *, width: int, height: int, above: int = 0
) -> go.Figure:
    """The themed figure with a title and remarks below it, each on lines of its own.

    `width` is the whole figure's, `height` that of the plot with its bottom margin, `above` what the plot needs above
    itself, in pixels.
    """
    lines = [line for remark in remarks for line in wrapped(remark, width - 40, theme)]
    top = 50 + round(1.3 * theme.size * len(lines)) + above
    spans = [f'<span style="font-size:{theme.size + 4}px"><b>{escaped(title)}</b></span>']
    spans += [f'<span style="font-size:{theme.size - 1}px;color:{theme.muted}">{line}</span>' for line in lines]
    heading = {"text": "<br>".join(spans), "font": {"size": theme.size}, "yref": "container", "yanchor": "top"}
    place = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "pad": {"l": 20, "t": 24}}
    templated(figure, theme)
    return figure.update_layout(title={**heading, **place}, width=width, height=top + height, margin_t=top)


def untitled(figure: go.Figure) -> tuple[go.Figure, list[str]]:
    """The figure without the title and remarks of `titled`, and the remarks as plain text: for a page that says both in
    its own words and lines."""
    text = figure.layout.title.text
    if not text:
        return figure, []
    size = figure.layout.title.font.size or LIGHT.size
    lines = [html.unescape(re.sub("<[^>]*>", "", line)) for line in text.split("<br>")][1:]
    gone = 42 + round(1.3 * size * len(lines))  # of the 50 above the plot 8 stay
    plain = go.Figure(figure)
    plain.update_layout(title=None, height=figure.layout.height - gone, margin_t=figure.layout.margin.t - gone)
    return plain, _sentences(lines)


def _sentences(lines: Sequence[str]) -> list[str]:
    """Wrapped lines put together again: a line that ends with a full stop ends its remark."""
    remarks = [""]
    for line in lines:
        remarks[-1] = f"{remarks[-1]} {line}".strip()
        if line.endswith("."):
            remarks.append("")
    return [remark for remark in remarks if remark]
