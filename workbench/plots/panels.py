"""The panels of a head map: where each model's map stands, and what each of its cells says."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.circuits.circuit import Circuit
from workbench.plots.theme import escaped
from workbench.values.refs import Head
from workbench.values.scores import Order, Scores

ORDERS: dict[Order, str] = {"lowest": "lowest first", "highest": "highest first", "magnitude": "by magnitude"}
GAP = 64
"""Pixels between panels."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """One model's map: its place from 1, and its share of the plot across and up."""

    name: str
    place: int
    scores: Scores
    circuit: Circuit | None
    across: tuple[float, float]
    up: tuple[float, float]
    pixels: int
    """Its width."""

    @property
    def axes(self) -> dict[str, str]:
        """The plotly names of its axes."""
        number = "" if self.place == 1 else str(self.place)
        return {"xaxis": f"x{number}", "yaxis": f"y{number}"}

    @property
    def colours(self) -> str:
        """The plotly name of its colour axis."""
        return f"coloraxis{self.place if self.place > 1 else ''}"


def cell_size(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Width and height of a cell in pixels: smaller for larger models, never too small for a role's letter."""
    return min(40, max(15, 900 // sum(shape[1] for shape in shapes))), min(
        28, max(15, 600 // max(shape[0] for shape in shapes))
    )


def panels_of(
    scores: Mapping[str, Scores], circuits: Mapping[str, Circuit], cell: tuple[int, int]
) -> tuple[list[Panel], tuple[int, int]]:
    """The panels from left to right, cells of one size in all, and the size of the plot in pixels."""
    width = cell[0] * sum(part.values.shape[1] for part in scores.values()) + GAP * (len(scores) - 1)
    layers = max(part.values.shape[0] for part in scores.values())
    panels, left = [], 0
    for place, (name, part) in enumerate(scores.items(), 1):
        right = left + cell[0] * part.values.shape[1]
        across, up = (left / width, right / width), (0.0, part.values.shape[0] / layers)
        panels.append(
            Panel(
                name=name,
                place=place,
                scores=part,
                circuit=circuits.get(name),
                across=across,
                up=up,
                pixels=right - left,
            )
        )
        left = right + GAP
    return panels, (width, cell[1] * layers)


def hover_texts(panel: Panel, by: Order) -> list[list[str]]:
    """What each cell says under the pointer: [layer][head]."""
    ranked = panel.scores.ranked(by=by)
    ranks = {head: f"rank {rank} of {len(ranked)} ({ORDERS[by]})" for rank, head in enumerate(ranked, 1)}
    layers, heads = panel.scores.values.shape[:2]
    cells = [Head(layer, index) for layer in range(layers) for index in range(heads)]
    texts = [
        _about(panel, head, row, ranks.get(head))
        for head, row in zip(cells, panel.scores.to_frame().to_dict("records"), strict=True)
    ]
    return [texts[layer * heads : (layer + 1) * heads] for layer in range(layers)]


def _about(panel: Panel, head: Head, row: Mapping[Hashable, Any], rank: str | None) -> str:
    lines = [f"<b>{head}</b> {escaped(panel.name)}"]
    lines += [f"mean {row['mean']:+.4g}"] if rank else ["not measured"]
    if rank and "low" in row:
        lines.append(
            f"95 % interval {row['low']:+.4g} to {row['high']:+.4g}"
            if row["examples"] > 1
            else "no interval: one example"
        )
    lines += [rank] if rank else []
    role = panel.circuit.role_of(head) if panel.circuit else ""
    return "<br>".join([*lines, f"in the circuit: {escaped(role)}"] if role else lines)


def initials(role: str) -> str:
    """The first letter of each role of a head: `A+B` -> `AB`, `ablation` -> `a`."""
    return "".join(part[0] for part in role.split("+") if part)
