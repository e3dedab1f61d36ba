"""How much each head matters: one map a model, side by side, on one common scale around zero or each on its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
from plotly import graph_objects as go

from workbench.circuits.circuit import Circuit
from workbench.circuits.search_result import CircuitSearch
from workbench.errors import InputError, nearest
from workbench.plots.export import with_table
from workbench.plots.panels import GAP, Panel, cell_size, hover_texts, initials, panels_of
from workbench.plots.theme import HELPS, HURTS, LIGHT, Theme, colour_scale, escaped, titled, wrapped
from workbench.values.refs import Head
from workbench.values.scores import Order, Scores

SIGNS: dict[Order, str] = {
    "highest": f"Positive ({HELPS}): the head helps; ranked by how much.",
    "lowest": f"Negative ({HURTS}): the head works against the answer; ranked by how much.",
    "magnitude": f"Positive ({HELPS}): the head helps; negative ({HURTS}): it works against the answer. Ranked by "
    "size.",
}
Scale = Literal["common", "own"]
"""Whether a colour says the same number in every panel, or the same share of what its own panel reaches."""
CROWD, FAR = 16, 3.0
"""One head of so many may stand beyond the scale, if it is so many times as large as the largest within."""
SHARES = {-1.0: "-1", -0.5: "-½", 0.0: "0", 0.5: "½", 1.0: "1"}
"""Ticks of a bar that several scales share."""
LEFT, RIGHT, BELOW = 60, 100, 52
"""Pixels around the panels."""


def head_importance(
    scores: Mapping[str, Scores],
    *,
    circuits: Mapping[str, Circuit] | None = None,
    by: Order = "highest",
    roles: Mapping[str, str] | None = None,
    scale: Scale = "common",
    theme: Theme = LIGHT,
    title: str = "Importance of the attention heads",
) -> go.Figure:
    """Mean score of every head, a panel a model (layers upward, heads across); its circuit's heads are outlined, with
    the initials of their roles.

    `scores`: panel name -> scores over (layer, head) and perhaps example; their unit stands above them. Colours are
    symmetric around 0 (orange: the head helps, blue: it works against the answer). `scale`: `common` to all panels,
    which must measure the same then, or each panel's `own`, so that a model with small effects is seen too. Where a few
    heads would take the whole scale, it ends at the largest of the others (`scale_of`), and those beyond it are named
    and marked with a triangle. `roles`: what the roles are called. `by` says which heads come first, as in
    `Scores.ranked`. NaN is grey: not measured.

    Errors: `InputError` for no scores, scores over other axes, a circuit that belongs to no panel or has another shape.
    """
    circuits = circuits or {}
    _check(scores, circuits)
    cell = cell_size([part.values.shape for part in scores.values()])
    panels, size = panels_of(scores, circuits, cell)
    own = scale == "own" and len(scores) > 1
    ends = {name: scale_of({name: part} if own else scores) for name, part in scores.items()}
    figure = go.Figure(layout=_colour_axes([ends[panel.name] for panel in panels], size[1], theme, shares=own))
    for panel in panels:
        _draw(figure, panel, cell, by, theme)
        _outline(figure, panel, cell, ends[panel.name], theme)
        _mark(figure, panel, ends[panel.name], theme)
    units = {_quantity(part) for part in scores.values()}
    above = _name_panels(figure, panels, theme, with_units=len(units) > 1)
    remarks = [
        *(f"{unit}." for unit in units if len(units) == 1),
        _key(scores, circuits, by, roles or {}),
        *_ends(scores, ends, own=own),
    ]
    width = round(max(560, size[0] + LEFT + RIGHT))
    titled(figure, title, remarks, theme, width=width, height=size[1] + BELOW, above=above)
    figure.update_layout(plot_bgcolor=theme.grid, margin={"l": LEFT, "r": width - size[0] - LEFT, "b": BELOW})
    return with_table(figure, pd.concat([_frame(panel) for panel in panels], ignore_index=True))


def heads(
    scores: Scores | CircuitSearch | Mapping[str, Scores | CircuitSearch],
    *,
    circuit: Circuit | None = None,
    by: Order = "highest",
    scale: Scale = "common",
    theme: Theme = LIGHT,
    title: str = "Importance of the attention heads",
) -> go.Figure:
    """How much every head of a model matters: a map of layers (upward) by heads, or one map each of several, by name.

    `scores` over (layer, head) and perhaps example: of `find_circuit` (the search itself has its circuit outlined), of
    `ablate`, `path_patch` or `activation_patch`. `circuit`: to outline in a single map. `by`: which sign means
    important, as in `Scores.ranked`. `scale`: one for several maps, or each its own. Errors: `InputError` as
    `head_importance`.
    """
    if isinstance(scores, Mapping):
        named = dict(scores)
    else:
        named = {"circuit" if isinstance(scores, CircuitSearch) else "model": scores}
    if circuit is not None and len(named) != 1:
        raise InputError("`circuit` is outlined in a single map; give several searches by name to outline each one's.")
    circuits = {name: each.circuit for name, each in named.items() if isinstance(each, CircuitSearch)}
    circuits |= {} if circuit is None else dict.fromkeys(named, circuit)
    maps = {name: each.scores if isinstance(each, CircuitSearch) else each for name, each in named.items()}
    for name, each in maps.items():
        if not isinstance(each, Scores):
            raise InputError(
                f"{name!r} holds {type(each).__name__}, no scores; give what find_circuit or ablate returns."
            )
    return head_importance(maps, circuits=circuits, by=by, scale=scale, theme=theme, title=title)


def _frame(panel: Panel) -> pd.DataFrame:
    frame = panel.scores.to_frame()
    heads = [
        Head(layer, index)
        for layer in range(panel.scores.values.shape[0])
        for index in range(panel.scores.values.shape[1])
    ]
    roles = [panel.circuit.role_of(head) if panel.circuit else "" for head in heads]
    return frame.assign(
        layer=[head.layer for head in heads], head=[head.index for head in heads], model=panel.name, role=roles
    )


def _check(scores: Mapping[str, Scores], circuits: Mapping[str, Circuit]) -> None:
    if not scores:
        raise InputError("there are no scores to draw; give at least one model's.")
    for name, part in scores.items():
        if part.axes not in (("layer", "head"), ("layer", "head", "example")):
            raise InputError(
                f"the scores of {name!r} are over {part.axes}; a map of heads needs (layer, head) and perhaps example: "
                "`select` the others first."
            )
    for name, circuit in circuits.items():
        if name not in scores:
            raise InputError(f"there is a circuit but no scores for {name!r}; {nearest(name, scores)}")
        if circuit.shape != tuple(scores[name].values.shape[:2]):
            raise InputError(
                f"the circuit of {name!r} is of a model of shape {circuit.shape}, its scores of "
                f"{tuple(scores[name].values.shape[:2])}."
            )


def _colour_axes(ends: Sequence[float], height: int, theme: Theme, *, shares: bool) -> dict[str, object]:
    """A colour axis for each panel, of which the first has the bar: in the scores' unit, or, where each panel has its
    own scale, in shares of where that ends."""
    bar = {
        "len": max(120, height),
        "lenmode": "pixels",
        "y": 0,
        "yanchor": "bottom",
        "thickness": 14,
        "outlinewidth": 0,
        "xpad": 16,
    }
    bar |= {"tickvals": [share * ends[0] for share in SHARES], "ticktext": list(SHARES.values())} if shares else {}
    axes = {
        f"coloraxis{place if place > 1 else ''}": {
            "cmin": -end,
            "cmid": 0,
            "cmax": end,
            "colorscale": colour_scale(theme.diverging),
            "showscale": place == 1,
        }
        for place, end in enumerate(ends, 1)
    }
    axes["coloraxis"]["colorbar"] = bar
    return dict(axes)


def _draw(figure: go.Figure, panel: Panel, cell: tuple[int, int], by: Order, theme: Theme) -> None:
    means = panel.scores.mean()
    missing = means.isnan()
    rows = [[None if math.isnan(value) else value for value in row] for row in means.double().tolist()]
    if missing.any():
        grey = [[0 if gone else None for gone in row] for row in missing.tolist()]
        figure.add_heatmap(
            z=grey,
            colorscale=[(0, theme.missing), (1, theme.missing)],
            showscale=False,
            hoverinfo="skip",
            xgap=1,
            ygap=1,
            name=f"{panel.name}: not measured",
            text=[["x" if gone else "" for gone in row] for row in missing.tolist()],
            texttemplate="%{text}",
            textfont={"color": theme.muted, "size": 11},
            **panel.axes,
        )
    about = {"hoverinfo": "text", "hovertext": hover_texts(panel, by), "hoverongaps": True}
    figure.add_heatmap(z=rows, coloraxis=panel.colours, xgap=1, ygap=1, name=panel.name, **about, **panel.axes)
    _axes(figure, panel, cell)


def _axes(figure: go.Figure, panel: Panel, cell: tuple[int, int]) -> None:
    """Axes in heads and layers, numbered from 0, with as many ticks as there is room for."""
    (layers, heads), (x, y) = panel.scores.values.shape[:2], panel.axes.values()
    common = {"showgrid": False, "tick0": 0, "ticks": "", "showline": False, "automargin": False}
    across = {
        "domain": panel.across,
        "range": (-0.5, heads - 0.5),
        "dtick": math.ceil(22 / cell[0]),
        "anchor": y,
        "title": "head",
    }
    up = {"domain": panel.up, "range": (-0.5, layers - 0.5), "dtick": math.ceil(16 / cell[1]), "anchor": x}
    up |= {"title": "layer"} if panel.place == 1 else {}
    figure.update_layout({x.replace("x", "xaxis"): common | across, y.replace("y", "yaxis"): common | up})


def _outline(figure: go.Figure, panel: Panel, cell: tuple[int, int], largest: float, theme: Theme) -> None:
    """A frame and the initials of its roles for each head of the circuit."""
    if panel.circuit is None:
        return
    means, axes = panel.scores.mean(), {"xref": panel.axes["xaxis"], "yref": panel.axes["yaxis"]}
    x, y = 0.5 - 1.5 / cell[0], 0.5 - 1.5 / cell[1]
    for head in panel.circuit.heads:
        edges = {"x0": head.index - x, "x1": head.index + x, "y0": head.layer - y, "y1": head.layer + y}
        strong = abs(float(means[head.layer, head.index])) > theme.strong * largest  # NaN is not
        figure.add_shape(
            type="rect", line={"color": theme.ink, "width": 2}, name=f"{panel.name} {head}", **edges, **axes
        )
        figure.add_annotation(
            x=head.index,
            y=head.layer,
            text=escaped(initials(panel.circuit.role_of(head))),
            showarrow=False,
            name=f"{panel.name} {head}",
            font={"size": min(12, cell[0] - 4, cell[1] - 4), "color": theme.strong_ink if strong else theme.ink},
            **axes,
        )


def _name_panels(figure: go.Figure, panels: Sequence[Panel], theme: Theme, *, with_units: bool) -> int:
    """The panels' names (and units, where they differ) above them; returns the height of the tallest in pixels."""
    most = 0
    for panel, following in zip(panels, [*panels[1:], None], strict=True):
        space = panel.pixels + (GAP - 12 if following else RIGHT)
        lines = [f"<b>{line}</b>" for line in wrapped(panel.name, space, theme)]
        lines += wrapped(_quantity(panel.scores), space, theme) if with_units else []
        axes = {"xref": f"{panel.axes['xaxis']} domain", "yref": f"{panel.axes['yaxis']} domain"}
        axes |= {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "yshift": 3, "align": "left"}
        figure.add_annotation(text="<br>".join(lines), showarrow=False, name=panel.name, **axes)
        most = max(most, len(lines))
    return round(1.35 * theme.size * most) + 8


def _quantity(scores: Scores) -> str:
    """What a cell's colour is, with its sign convention: the scores' unit, averaged where there are examples."""
    return f"Mean {scores.unit}" if scores.per_example else f"{scores.unit[:1].upper()}{scores.unit[1:]}"


def scale_of(scores: Mapping[str, Scores]) -> float:
    """Where the colours end: at the mean farthest from 0, or, where at most one head in `CROWD` is at least `FAR` times
    as far as every other one, at the farthest of those others."""
    sizes = sorted((size for part in scores.values() for size in _sizes(part)), reverse=True)
    for count in range(len(sizes) // CROWD, 0, -1):
        if sizes[count - 1] >= FAR * sizes[count] > 0:
            return sizes[count]
    return (sizes[0] if sizes else 0.0) or 1.0


def _sizes(scores: Scores) -> list[float]:
    return [abs(value) for value in scores.mean().double().flatten().tolist() if not math.isnan(value)]


def _outside(scores: Scores, largest: float) -> list[tuple[Head, float]]:
    """The heads beyond the scale with their means, the farthest first."""
    means = scores.mean().double().tolist()
    heads = [(Head(layer, index), value) for layer, row in enumerate(means) for index, value in enumerate(row)]
    return sorted((pair for pair in heads if abs(pair[1]) > largest), key=lambda pair: -abs(pair[1]))


def _mark(figure: go.Figure, panel: Panel, largest: float, theme: Theme) -> None:
    """A triangle in the corner of each cell beyond the scale."""
    heads = [head for head, _ in _outside(panel.scores, largest)]
    if heads:
        figure.add_scatter(
            x=[head.index + 0.34 for head in heads],
            y=[head.layer + 0.28 for head in heads],
            mode="markers",
            marker={"symbol": "triangle-up", "size": 7, "color": theme.strong_ink},
            hoverinfo="skip",
            showlegend=False,
            name=f"{panel.name}: beyond the scale",
            **panel.axes,
        )


def _ends(scores: Mapping[str, Scores], ends: Mapping[str, float], *, own: bool) -> list[str]:
    """Where the scales end, and which heads are beyond."""
    named = [
        f"{escaped(name) if len(scores) > 1 else ''} {head} ({value:+.3g})".strip()
        for name, part in scores.items()
        for head, value in _outside(part, ends[name])
    ]
    beyond = f"beyond it, with a triangle: {', '.join(named)}." if named else ""
    if own:
        each = ", ".join(f"{end:.3g} in {escaped(name)}" for name, end in ends.items())
        return [f"Each map has a scale of its own: 1 is {each}.", beyond[:1].upper() + beyond[1:]][: 1 + bool(named)]
    return [f"The scale ends at {next(iter(ends.values())):.3g}; {beyond}"] if named else []


def _key(scores: Mapping[str, Scores], circuits: Mapping[str, Circuit], by: Order, names: Mapping[str, str]) -> str:
    """How to read the map, in a sentence each."""
    roles = sorted({role for circuit in circuits.values() for role in circuit.roles})
    shown = [f"{role} {names[role]}" if role in names else role for role in roles]
    sentences = [SIGNS[by], f"Framed: heads of the circuit, by role ({', '.join(shown)})." if roles else ""]
    sentences.append("Grey x: not measured." if any(part.mean().isnan().any() for part in scores.values()) else "")
    return " ".join(sentence for sentence in sentences if sentence)
