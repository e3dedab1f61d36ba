"""Direct logit attribution: a map of heads and MLPs, and the largest parts as bars with intervals."""

import pandas as pd
from plotly import graph_objects as go

from workbench.plots.export import with_table
from workbench.plots.theme import HELPS, HURTS, LIGHT, Theme, colour_scale, titled
from workbench.readouts.logit_attribution import LogitAttribution

WIDTH, GAP = 820, 0.14
BAR, CELL = 22, 30
"""Pixels of a bar and of a layer."""


def attribution_figure(
    attribution: LogitAttribution, *, bars: int = 14, theme: Theme = LIGHT, title: str = "Direct logit attribution"
) -> go.Figure:
    """Left the mean share of every head, with the MLPs as the last column; right the `bars` parts farthest from 0 with
    95 % intervals over prompts.

    Positive (orange) pushes towards the answer, negative (blue) towards the distractor. One scale, symmetric around 0,
    for the map.
    """
    frame, figure = attribution.to_frame(), go.Figure()
    shown = frame.head(bars).iloc[::-1]
    layers, heads = attribution.heads.values.shape[:2]
    means, mlps = attribution.heads.mean().tolist(), attribution.mlps.mean().tolist()
    largest = max(abs(value) for row in [*means, mlps] for value in row) or 1.0
    gap = [[None] for _ in range(layers)]
    cells = [[*row, *blank, mlp] for row, blank, mlp in zip(means, gap, mlps, strict=True)]
    about = [
        [
            *(f"<b>L{layer}H{index}</b><br>{value:+.4g}" for index, value in enumerate(row)),
            "",
            f"<b>MLP {layer}</b><br>{mlps[layer]:+.4g}",
        ]
        for layer, row in enumerate(means)
    ]
    figure.add_heatmap(
        z=cells,
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=about,
        hoverongaps=False,
        xgap=1,
        ygap=1,
        name="parts",
        xaxis="x",
        yaxis="y",
    )
    _bars(figure, shown, theme)
    every = max(1, round(heads / 12))
    ticks = [*range(0, heads, every), heads + 1]
    bar = {
        "title": {"text": "logits", "side": "top"},
        "thickness": 12,
        "outlinewidth": 0,
        "x": 0.47,
        "xanchor": "left",
        "len": 1,
        "y": 0.5,
    }
    figure.update_layout(
        coloraxis={
            "cmin": -largest,
            "cmid": 0,
            "cmax": largest,
            "colorscale": colour_scale(theme.diverging),
            "colorbar": bar,
        },
        xaxis={
            "domain": (0, 0.46),
            "tickvals": ticks,
            "ticktext": [*map(str, ticks[:-1]), "MLP"],
            "title": "head",
            "showgrid": False,
            "ticks": "",
        },
        yaxis={
            "tickvals": list(range(0, layers, max(1, layers // 16))),
            "title": "layer",
            "showgrid": False,
            "ticks": "",
            "showline": False,
        },
        xaxis2={
            "domain": (0.47 + GAP + 0.06, 1),
            "anchor": "y2",
            "title": "share of the logit difference (logits)",
            "zeroline": True,
        },
        yaxis2={"anchor": "x2", "showgrid": False, "ticks": "", "showline": False, "tickfont": {"size": 11}},
        showlegend=False,
        bargap=0.25,
    )
    figure.update_xaxes(zerolinecolor=theme.muted, zerolinewidth=1.5)
    total, examples = float(attribution.total.mean()), len(attribution.total)
    rest = total - float(shown["mean"].sum())
    remarks = [
        f"Shares of logit(answer) - logit(distractor) at the last token, final norm's scale frozen; mean of {examples} "
        "prompts. "
        f"{HELPS.capitalize()} towards the answer, {HURTS} towards the distractor. Lines: 95 % intervals over prompts.",
        f"All parts sum to {total:.2f} logits; those without a bar to {rest:+.2f}.",
    ]
    titled(figure, title, remarks, theme, width=WIDTH, height=max(CELL * layers, BAR * len(shown)) + 60, above=8)
    return with_table(figure, frame)


def _bars(figure: go.Figure, shown: pd.DataFrame, theme: Theme) -> None:
    colours = [theme.helps if value > 0 else theme.hurts for value in shown["mean"]]
    about = [
        f"<b>{row['part']}</b><br>{row['mean']:+.4g}<br>95 % interval {row['low']:+.4g} to {row['high']:+.4g}"
        for row in shown.to_dict("records")
    ]
    errors = {"array": (shown["high"] - shown["mean"]).tolist(), "arrayminus": (shown["mean"] - shown["low"]).tolist()}
    figure.add_bar(
        orientation="h",
        x=shown["mean"].tolist(),
        y=shown["part"].tolist(),
        marker={"color": colours},
        hoverinfo="text",
        hovertext=about,
        error_x={"type": "data", "symmetric": False, "color": theme.ink, "thickness": 1.3, "width": 0, **errors},
        xaxis="x2",
        yaxis="y2",
        name="largest parts",
    )
