"""Faithfulness over circuit size: what the first heads of a ranking do alone, what the model loses without them, random
rankings as a band."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from plotly import graph_objects as go

from workbench.circuits.curves import FaithfulnessCurve
from workbench.errors import InputError
from workbench.plots.export import with_table
from workbench.plots.theme import LIGHT, Theme, escaped, faint, titled

PANELS = (
    ("these heads alone", "faithfulness", "random", "x"),
    ("the model without them", "without", "random_without", "x2"),
)


def faithfulness_figure(
    curves: Mapping[str, FaithfulnessCurve], *, theme: Theme = LIGHT, title: str = "Faithfulness over circuit size"
) -> go.Figure:
    """One colour a ranking; left the heads alone (0: every head ablated, 1: the model), right the model without them;
    CPR and CMD in the legend.

    The x axis is the number of heads on a scale that is linear to 1 and logarithmic from there. Bands: least to
    greatest of the random rankings. Errors: `InputError` without curves.
    """
    if not curves:
        raise InputError("a faithfulness figure needs at least one curve; compute one with `faithfulness_curve`.")
    figure = go.Figure()
    for place, (name, curve) in enumerate(curves.items()):
        colour = theme.categories[place % len(theme.categories)]
        for panel, values, randoms, axis in PANELS:
            if getattr(curve, randoms):
                _band(figure, curve.sizes, np.array(getattr(curve, randoms)), axis, colour, name)
            legend = (
                f"{name}: CPR {curve.cpr:.2f} (random {curve.random_cpr[0]:.2f}), CMD {curve.cmd:.2f} (random "
                f"{curve.random_cmd[0]:.2f})"
                if curve.random
                else f"{name}: CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}"
            )
            figure.add_scatter(
                x=_scaled(curve.sizes),
                y=getattr(curve, values),
                customdata=curve.sizes,
                mode="lines+markers",
                name=escaped(legend),
                legendgroup=name,
                showlegend=axis == "x",
                xaxis=axis,
                yaxis=axis.replace("x", "y"),
                line={"color": colour, "width": 2.4},
                marker={"size": 6},
                hovertemplate=f"<b>{escaped(name)}</b>, {panel}<br>%{{customdata}} heads<br>%{{y:.3f}}<extra></extra>",
            )
    sizes = _apart(sorted({size for curve in curves.values() for size in curve.sizes}))
    ticks = {"tickvals": _scaled(sizes), "ticktext": [str(size) for size in sizes], "anchor": "y"}
    figure.update_layout(
        xaxis={**ticks, "title": "first heads of the ranking, kept alone", "domain": (0, 0.48)},
        xaxis2={**ticks, "title": "first heads of the ranking, ablated alone", "domain": (0.52, 1)},
        yaxis={"title": "share of the metric recovered"},
        yaxis2={"matches": "y", "anchor": "x2", "showticklabels": False, "ticks": "", "showline": False},
        legend={"orientation": "h", "y": -0.24, "yanchor": "top"},
        margin={"b": 70 + 24 * len(curves)},
    )
    for x, y in (("x", "y"), ("x2", "y2")):
        for end in (0, 1):
            line = {"color": theme.muted, "dash": "dot", "width": 1}
            figure.add_shape(x0=0, x1=1, y0=end, y1=end, xref=f"{x} domain", yref=y, line=line)
    metrics = ", ".join(dict.fromkeys(curve.metric for curve in curves.values()))
    remarks = [
        f"Metric: {metrics}; 1 is the whole model, 0 every head ablated. Bands: random rankings. {_outside(curves)}"
    ]
    titled(figure, title, remarks, theme, width=860, height=460 + 24 * len(curves))
    return with_table(figure, pd.concat([_frame(name, curve) for name, curve in curves.items()], ignore_index=True))


def _frame(name: str, curve: FaithfulnessCurve) -> pd.DataFrame:
    """A row per size; the random rankings as their least and greatest."""
    frame = pd.DataFrame(
        {"ranking": name, "heads": curve.sizes, "faithfulness": curve.faithfulness, "without": curve.without}
    )
    for field in ("random", "random_without"):
        if getattr(curve, field):
            values = np.array(getattr(curve, field))
            frame[f"{field}_low"], frame[f"{field}_high"] = values.min(0), values.max(0)
    return frame


def _outside(curves: Mapping[str, FaithfulnessCurve]) -> str:
    stands = {
        "mean": "their mean",
        "counterfactual": "their output on the corrupt prompt",
        "resampled": "their output on another prompt",
        "zero": "zero",
    }
    return f"All other heads take {' / '.join(sorted({stands[curve.ablation] for curve in curves.values()}))}."


def _scaled(sizes: Sequence[int]) -> list[float]:
    return [float(size if size < 1 else 1 + np.log2(size)) for size in sizes]


def _apart(sizes: Sequence[int]) -> list[int]:
    """The largest size and, downwards, those whose labels do not run into the one above."""
    ticks: list[int] = []
    for size in reversed(sizes):
        if not ticks or _scaled([ticks[-1]])[0] - _scaled([size])[0] >= 0.3:
            ticks.append(size)
    return ticks[::-1]


def _band(figure: go.Figure, sizes: Sequence[int], values: np.ndarray, axis: str, colour: str, name: str) -> None:
    for edge, fill in ((values.max(0), None), (values.min(0), "tonexty")):
        figure.add_scatter(
            x=_scaled(sizes),
            y=edge,
            mode="lines",
            line={"width": 0, "color": colour},
            fill=fill,
            opacity=0.3,
            xaxis=axis,
            yaxis=axis.replace("x", "y"),
            fillcolor=faint(colour),
            showlegend=False,
            legendgroup=name,
            hoverinfo="skip",
        )
