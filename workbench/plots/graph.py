"""A circuit as a graph: layers upward, heads at the position where they act, coloured by group; edges as wide as their
path effect."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from plotly import graph_objects as go

from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.plots.export import with_table
from workbench.plots.narrow import LINE, legend_lines
from workbench.plots.theme import HELPS, HURTS, LIGHT, Theme, escaped, faint, titled
from workbench.values.refs import Head
from workbench.values.scores import Scores

NODE, ROW, LOGITS = 26, 74, "logits"
SYMBOLS = ("circle", "square", "diamond")
"""Of the groups, from round to round of the theme's colours."""
"""Pixels: a head's circle, and from layer to layer."""
WIDTH = 820
Point = tuple[float, float]
Spots = Mapping[Head | str, Point]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A path from a head to another head's input, or to the logits, with its mean effect."""

    sender: Head
    receiver: Head | None
    """None: the logits."""
    effects: Mapping[str, float]
    """`q`, `k`, `v` or `logits` -> mean effect."""

    @property
    def strongest(self) -> float:
        """The effect farthest from 0."""
        return max(self.effects.values(), key=abs)


def circuit_graph(
    circuit: Circuit,
    edges: Scores | None = None,
    *,
    positions: Sequence[str] | None = None,
    least: float = 0.05,
    most: int = 60,
    theme: Theme = LIGHT,
    title: str = "Circuit",
) -> go.Figure:
    """Heads as circles, columns for positions (`positions` from left to right; default: by name, `last` at the right),
    layers upward.

    `edges`: [sender receiver example] from `exact_edges` or `attribute_edges`; with grouped-query attention a head's k
    and v are its group's. A head pair is one line, as wide as the strongest of its q, k and v effects; drawn are the
    `most` strongest of at least `least` of the strongest. Orange (positive): the path helps; blue: it works against the
    answer. Errors: `InputError` for an empty circuit, a position that is not listed, and scores
    over other axes.
    """
    if not circuit.members:
        raise InputError("this circuit has no heads to draw; find one with `backward_search`, or lower its thresholds.")
    columns = _columns(circuit, positions)
    spots, shares = _spots(circuit, columns)
    measured = _edges(circuit, edges) if edges is not None else []
    strongest = max((abs(edge.strongest) for edge in measured), default=0.0)
    drawn = sorted(measured, key=lambda edge: -abs(edge.strongest))[:most]
    drawn = [edge for edge in drawn if abs(edge.strongest) >= least * strongest]
    figure = go.Figure()
    for edge in reversed(drawn):
        _line(figure, spots, edge, strongest, theme)
    _middles(figure, spots, drawn, edges.unit if edges is not None else "", theme)
    _nodes(figure, circuit, spots, theme, with_logits=bool(drawn))
    _axes(figure, circuit, shares, theme)
    groups = {circuit.role_of(head) for head in circuit.heads}
    rows = legend_lines([*groups, ""], WIDTH - 80)  # one for the legend's own title
    remarks = _remarks(circuit, edges, len(drawn), len(measured), least)
    titled(
        figure,
        title,
        remarks,
        theme,
        width=WIDTH,
        height=round(ROW * (circuit.shape[0] + 1)) + 50,
        above=15 + LINE * rows,
    )
    return with_table(figure, _frame(circuit, drawn))


def _columns(circuit: Circuit, positions: Sequence[str] | None) -> list[str]:
    named = {member.position for member in circuit.members}
    if positions is None:
        return sorted(named, key=lambda name: (name == "last", name))
    if not named <= set(positions):
        raise InputError(f"the circuit acts at {', '.join(sorted(named - set(positions)))} too; list every position.")
    return [name for name in positions if name in named]


def _spots(circuit: Circuit, columns: Sequence[str]) -> tuple[dict[Head | str, Point], dict[str, tuple[float, float]]]:
    """Where each head stands (at the last of its positions), and each column's stretch, in units of heads across."""
    crowd: dict[tuple[str, int], list[Head]] = defaultdict(list)
    for head, where in circuit.scope.items():
        crowd[max(where, key=columns.index), head.layer].append(head)
    spots: dict[Head | str, Point] = {}
    shares, left = {}, 0.0
    for column in columns:
        across = max([len(heads) for (name, _), heads in crowd.items() if name == column] + [2]) + 0.6
        shares[column] = (left, left + across)
        for (name, layer), heads in crowd.items():
            if name == column:
                step = across / len(heads)
                spots |= {
                    head: (left + step * (place + 0.5), layer + _stagger(place, len(heads)))
                    for place, head in enumerate(heads)
                }
        left += across + 0.4
    ends = shares[columns[-1]]
    spots[LOGITS] = ((ends[0] + ends[1]) / 2, float(circuit.shape[0]))
    return spots, shares


def _stagger(place: int, count: int) -> float:
    """Many heads of a layer stand in a zigzag, so that their circles do not touch."""
    return 0.0 if count <= 5 else (0.16, -0.16)[place % 2]


def _edges(circuit: Circuit, scores: Scores) -> list[Edge]:
    """The edges among the circuit's heads and to the logits that were measured."""
    if scores.axes[:2] != ("sender", "receiver"):
        raise InputError(
            f"the edges of a circuit are scores over (sender, receiver), not {scores.axes}; make them with "
            "`exact_edges`."
        )
    means = scores.mean()
    senders, receivers = (
        {name: place for place, name in enumerate(scores.labels[axis])} for axis in ("sender", "receiver")
    )
    edges = []
    for sender in circuit.heads:
        if str(sender) not in senders:
            continue
        row = means[senders[str(sender)]]
        ends: list[Head | None] = [*(head for head in circuit.heads if head.layer > sender.layer), None]
        for end in ends:
            names = (
                {LOGITS: LOGITS}
                if end is None
                else {composition: _read_by(end, composition, receivers) for composition in "qkv"}
            )
            effects = {key: float(row[receivers[name]]) for key, name in names.items() if name in receivers}
            effects = {key: value for key, value in effects.items() if value == value}  # NaN is not measured
            if effects:
                edges.append(Edge(sender=sender, receiver=end, effects=effects))
    return edges


def _read_by(head: Head, composition: str, receivers: Mapping[str, int]) -> str | None:
    """The receiver's label; k and v are listed once a group, under its first query head."""
    names = (f"{Head(head.layer, index)}.{composition}" for index in range(head.index, -1, -1))
    return next((name for name in names if name in receivers), None)


def _end(spots: Spots, edge: Edge) -> Point:
    return spots[LOGITS if edge.receiver is None else edge.receiver]


def _curve(start: Point, end: Point, points: int = 14) -> tuple[list[float], list[float]]:
    """From a head upward to another, leaving and arriving vertically."""
    shares = [step / (points - 1) for step in range(points)]
    smooth = [3 * share**2 - 2 * share**3 for share in shares]
    return [start[0] + (end[0] - start[0]) * turn for turn in smooth], [
        start[1] + (end[1] - start[1]) * share for share in shares
    ]


def _line(figure: go.Figure, spots: Spots, edge: Edge, strongest: float, theme: Theme) -> None:
    share = abs(edge.strongest) / strongest
    x, y = _curve(spots[edge.sender], _end(spots, edge))
    colour = faint(theme.hurts if edge.strongest < 0 else theme.helps, 0.35 + 0.5 * share)
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": colour, "width": 0.8 + 7 * share},
        hoverinfo="skip",
        showlegend=False,
        name=f"{edge.sender}~{edge.receiver or LOGITS}",
    )


def _middles(figure: go.Figure, spots: Spots, edges: Sequence[Edge], unit: str, theme: Theme) -> None:
    """An invisible point on each line to hover on."""
    if not edges:
        return
    middles = [tuple(axis[7] for axis in _curve(spots[edge.sender], _end(spots, edge))) for edge in edges]
    texts = [
        f"<b>{edge.sender} → {edge.receiver or LOGITS}</b><br>"
        + "<br>".join(f"{key}: {value:+.4g}" for key, value in edge.effects.items())
        + f"<br>{escaped(unit)}"
        for edge in edges
    ]
    figure.add_scatter(
        x=[x for x, _ in middles],
        y=[y for _, y in middles],
        mode="markers",
        marker={"size": 12, "opacity": 0, "color": theme.ink},
        hoverinfo="text",
        hovertext=texts,
        showlegend=False,
        name="paths",
    )


def _nodes(figure: go.Figure, circuit: Circuit, spots: Spots, theme: Theme, *, with_logits: bool) -> None:
    roles = list(
        dict.fromkeys(
            sorted((circuit.role_of(head) for head in circuit.heads), key=lambda role: (role.count("+"), role))
        )
    )
    for place, role in enumerate(roles):
        heads = [head for head in circuit.heads if circuit.role_of(head) == role]
        about = [
            f"<b>{head}</b><br>group {escaped(role)}<br>at {escaped(', '.join(circuit.scope[head]))}" for head in heads
        ]
        figure.add_scatter(
            x=[spots[head][0] for head in heads],
            y=[spots[head][1] for head in heads],
            mode="markers+text",
            name=escaped(role),
            text=[f"{head.layer}.{head.index}" for head in heads],
            textfont={"size": 10, "color": theme.ink},
            hoverinfo="text",
            hovertext=about,
            customdata=[str(head) for head in heads],
            cliponaxis=False,
            marker={
                "size": NODE,
                "color": theme.background,
                "line": {"width": 3, "color": theme.categories[place % len(theme.categories)]},
                "symbol": SYMBOLS[place // len(theme.categories) % len(SYMBOLS)],
            },
        )
    if with_logits:
        x, y = spots[LOGITS]
        figure.add_annotation(
            x=x,
            y=y,
            text=f"<b>{LOGITS}</b>",
            showarrow=False,
            bgcolor=theme.background,
            bordercolor=theme.ink,
            borderpad=4,
            borderwidth=1.5,
        )


def _axes(figure: go.Figure, circuit: Circuit, shares: Mapping[str, tuple[float, float]], theme: Theme) -> None:
    layers = circuit.shape[0]
    right = max(end for _, end in shares.values())
    figure.update_layout(
        xaxis={
            "range": (-0.2, right + 0.2),
            "showgrid": False,
            "showticklabels": False,
            "ticks": "",
            "showline": False,
        },
        yaxis={
            "range": (-0.6, layers + 0.4),
            "tickvals": list(range(layers)),
            "showgrid": True,
            "title": "layer",
            "ticks": "",
            "showline": False,
        },
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "title": {"text": "group "}},
        margin={"b": 50, "r": 20},
    )
    for name, (left, end) in shares.items():
        figure.add_annotation(
            x=(left + end) / 2,
            y=0,
            yref="paper",
            yanchor="top",
            yshift=-8,
            text=f"at <b>{escaped(name.replace('_', ' '))}</b>",
            showarrow=False,
        )
        figure.add_shape(
            type="rect",
            x0=left,
            x1=end,
            y0=0,
            y1=1,
            yref="paper",
            line={"width": 0},
            fillcolor=faint(theme.muted, 0.07),
            layer="below",
        )


def _remarks(circuit: Circuit, edges: Scores | None, drawn: int, measured: int, least: float) -> list[str]:
    heads = (
        f"{len(circuit.heads)} of {circuit.shape[0] * circuit.shape[1]} heads, named layer.head, each at the "
        "position where it acts."
    )
    if edges is None:
        return [heads]
    width = (
        f"Lines: {drawn} of {measured} paths (at least {least:.0%} of the strongest), "
        f"width: {edges.unit} (strongest of q, k, v)."
    ).replace("%", " %")
    return [
        heads,
        width,
        f"{HELPS.capitalize()}: above 0, the path helps. {HURTS.capitalize()}: below 0, it works against the answer.",
    ]


def _frame(circuit: Circuit, edges: Sequence[Edge]) -> pd.DataFrame:
    rows = [
        {
            "from": str(edge.sender),
            "to": str(edge.receiver or LOGITS),
            "input": key,
            "effect": value,
            "from_group": circuit.role_of(edge.sender),
        }
        for edge in edges
        for key, value in edge.effects.items()
    ]
    if not rows:
        rows = [{"head": str(m.head), "group": m.role, "position": m.position} for m in circuit.members]
    return pd.DataFrame(rows)
