"""CKA of every head of one model with every one of another as coloured squares: one matrix, or two on one scale before
and after training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from plotly import graph_objects as go

from workbench.errors import InputError
from workbench.matching import HeadMap
from workbench.matching.pair_cka import PairCka
from workbench.plots.export import with_table
from workbench.plots.theme import LIGHT, Theme, colour_scale, titled
from workbench.values.display import plain
from workbench.values.refs import Head
from workbench.values.scores import Scores

LEFT, BETWEEN, RIGHT, BELOW = 110, 64, 90, 80
"""Pixels around the matrices and between two."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """CKA with its floor, [student teacher]; NaN: not measured."""

    students: Sequence[Head]
    teachers: Sequence[Head]
    cka: np.ndarray
    floor: np.ndarray
    floor_high: np.ndarray
    """The highest of the shuffles."""
    rows: np.ndarray | None = None
    """Rows that each CKA is of, where known."""

    @classmethod
    def of_pairs(cls, ckas: Sequence[PairCka]) -> "Grid":
        """From `pair_ckas`; heads in layer order. Errors: `InputError` for no pairs, or a pair that is given twice."""
        known = {(cka.pair.student, cka.pair.teacher): cka for cka in ckas}
        if not known or len(known) < len(ckas):
            raise InputError(
                "a CKA matrix needs each pair of heads once, and at least one; measure them with `pair_ckas`."
            )
        students, teachers = sorted({student for student, _ in known}), sorted({teacher for _, teacher in known})
        fields = {
            name: np.full((len(students), len(teachers)), np.nan) for name in ("cka", "floor", "floor_high", "rows")
        }
        for (student, teacher), cka in known.items():
            for name, values in fields.items():
                values[students.index(student), teachers.index(teacher)] = getattr(cka, name)
        return cls(students=students, teachers=teachers, **fields)

    @classmethod
    def of_scores(cls, scores: Scores) -> "Grid":
        """From `circuit_ckas`. Errors: `InputError` for scores over other axes."""
        if scores.axes != ("student", "teacher", "draw"):
            raise InputError(
                f"a CKA matrix needs scores over (student, teacher, draw), not {scores.axes}; measure them with "
                "`circuit_ckas`."
            )
        students, teachers = (list(map(Head.parse, scores.labels[axis])) for axis in ("student", "teacher"))
        values = scores.values.double().numpy()[np.ix_(np.argsort(_keys(students)), np.argsort(_keys(teachers)))]
        shuffled = values[..., 1:]
        return cls(
            students=sorted(students),
            teachers=sorted(teachers),
            cka=values[..., 0],
            floor=shuffled.mean(-1),
            floor_high=shuffled.max(-1),
        )

    @property
    def at_floor(self) -> np.ndarray:
        """Where a pair is no more alike than with prompts shuffled."""
        return self.cka <= self.floor_high

    def matched(self, head_map: HeadMap) -> list[tuple[int, int]]:
        """(row, column) of the map's pairs that are here."""
        pairs = [
            (student, teacher)
            for student, teacher in head_map.pairs
            if student in self.students and teacher in self.teachers
        ]
        return [(list(self.students).index(student), list(self.teachers).index(teacher)) for student, teacher in pairs]

    def to_frame(self, head_map: HeadMap | None) -> pd.DataFrame:
        """A row for each measured pair."""
        there = np.argwhere(~np.isnan(self.cka)).tolist()
        pairs = set(self.matched(head_map)) if head_map else set()
        rows = [
            {
                "student": str(self.students[y]),
                "teacher": str(self.teachers[x]),
                "cka": float(self.cka[y, x]),
                "floor": float(self.floor[y, x]),
                "floor_high": float(self.floor_high[y, x]),
                **({} if self.rows is None else {"rows": int(self.rows[y, x])}),
                **({"matched": (y, x) in pairs} if head_map else {}),
            }
            for y, x in there
        ]
        return pd.DataFrame(rows)


def _keys(heads: Sequence[Head]) -> list[int]:
    """Each head's place in layer order."""
    order = sorted(heads)
    return [order.index(head) for head in heads]


def cka_change(
    before: Scores,
    after: Scores,
    *,
    head_map: HeadMap | None = None,
    theme: Theme = LIGHT,
    title: str = "CKA of circuit heads before and after training",
) -> go.Figure:
    """Two matrices on one colour scale, from `circuit_ckas` of the student before training (left) and after it (right).
    As `cka_matrix`.

    Errors: `InputError` for scores over other axes, or of other heads.
    """
    grids = [Grid.of_scores(scores) for scores in (before, after)]
    if before.labels["student"] != after.labels["student"] or before.labels["teacher"] != after.labels["teacher"]:
        raise InputError("these are CKAs of different heads before and after; measure both with the same circuits.")
    remarks = floor_remarks(grids, head_map)
    if head_map:
        means = [[grid.cka[y, x] for y, x in grid.matched(head_map)] for grid in grids]
        others = [grid.cka[~_mask(grid, head_map)] for grid in grids]
        remarks.append(
            f"Mean of the matched pairs {np.mean(means[0]):.2f} before, {np.mean(means[1]):.2f} after; of all others "
            f"{others[0].mean():.2f}, {others[1].mean():.2f}."
        )
    figure = drawn([("before training", grids[0]), ("after training", grids[1])], head_map, theme, title, remarks)
    frames = [grid.to_frame(head_map).assign(when=when) for when, grid in zip(("before", "after"), grids, strict=True)]
    return with_table(figure, pd.concat(frames, ignore_index=True))


def _mask(grid: Grid, head_map: HeadMap) -> np.ndarray:
    mask = np.zeros(grid.cka.shape, dtype=bool)
    for y, x in grid.matched(head_map):
        mask[y, x] = True
    return mask


def floor_remarks(grids: Sequence[Grid], head_map: HeadMap | None) -> list[str]:
    """What the colours are of, and how to read the marks."""
    floor, high = np.mean([np.nanmean(grid.floor) for grid in grids]), max(np.nanmax(grid.floor_high) for grid in grids)
    rows = sorted({int(rows) for grid in grids if grid.rows is not None for rows in grid.rows[~np.isnan(grid.rows)]})
    over = f"Over {rows[0]} rows. " if len(rows) == 1 else f"Over {rows[0]} to {rows[-1]} rows. " if rows else ""
    remark = (
        f"{over}Floor, with prompts shuffled: mean {plain(float(floor), 2)}, highest {plain(float(high), 2)}; a cross: "
        "no higher than its own floor's highest."
    )
    return [remark, *(["Framed: matched pairs."] if head_map else [])]


def drawn(
    named: Sequence[tuple[str, Grid]], head_map: HeadMap | None, theme: Theme, title: str, remarks: Sequence[str]
) -> go.Figure:
    """Students down, teachers across, a matrix a panel; the figure without its table."""
    count, first = len(named), named[0][1]
    cell = max(11 if count > 1 else 15, min(24, 640 // (count * len(first.teachers))))
    across = cell * len(first.teachers)
    inside = across * count + BETWEEN * (count - 1)
    figure = go.Figure()
    for place, (name, grid) in enumerate(named):
        number = "" if place == 0 else str(place + 1)
        start = place * (across + BETWEEN) / inside
        _panel(figure, grid, head_map, theme, number)
        _axes(figure, grid, number, (start, start + across / inside), small=cell < 15)
        if name:
            axes = {"xref": f"x{number} domain", "yref": f"y{number} domain", "xanchor": "left", "yanchor": "bottom"}
            figure.add_annotation(x=0, y=1, text=f"<b>{name}</b>", showarrow=False, yshift=3, **axes)
    bar = {"title": {"text": "CKA", "side": "top"}, "thickness": 12, "outlinewidth": 0, "tickvals": [0, 0.5, 1]}
    figure.update_layout(coloraxis={"cmin": 0, "cmax": 1, "colorscale": colour_scale(theme.wash), "colorbar": bar})
    width = max(640, inside + LEFT + RIGHT)
    titled(
        figure,
        title,
        remarks,
        theme,
        width=width,
        height=cell * len(first.students) + BELOW,
        above=24 if count > 1 else 0,
    )
    return figure.update_layout(margin={"l": LEFT, "b": BELOW, "r": width - LEFT - inside}, plot_bgcolor=theme.missing)


def _panel(figure: go.Figure, grid: Grid, head_map: HeadMap | None, theme: Theme, number: str) -> None:
    axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
    figure.add_heatmap(
        z=[[None if np.isnan(value) else value for value in row] for row in grid.cka.tolist()],
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        name="CKA",
        hoverinfo="text",
        hovertext=[[_about(grid, y, x) for x in range(len(grid.teachers))] for y in range(len(grid.students))],
        **axes,
    )
    crosses = np.argwhere(grid.at_floor).tolist()  # NaN is not
    figure.add_scatter(
        x=[x for _, x in crosses],
        y=[y for y, _ in crosses],
        mode="markers",
        hoverinfo="skip",
        showlegend=False,
        name="at the floor",
        marker={"symbol": "x-thin", "size": 6, "line": {"width": 1, "color": theme.muted}},
        **axes,
    )
    for y, x in grid.matched(head_map) if head_map else ():
        edges = {
            "x0": x - 0.46,
            "x1": x + 0.46,
            "y0": y - 0.46,
            "y1": y + 0.46,
            "xref": f"x{number}",
            "yref": f"y{number}",
        }
        figure.add_shape(
            type="rect",
            line={"color": theme.helps, "width": 2.5},
            name=f"{grid.students[y]}~{grid.teachers[x]}",
            **edges,
        )


def _about(grid: Grid, y: int, x: int) -> str:
    if np.isnan(grid.cka[y, x]):
        return ""
    rows = f"<br>{int(grid.rows[y, x])} rows" if grid.rows is not None else ""
    return (
        f"<b>{grid.students[y]} and {grid.teachers[x]}</b><br>CKA {grid.cka[y, x]:.3f}<br>"
        f"with prompts shuffled {plain(grid.floor[y, x], 3)}, highest {plain(grid.floor_high[y, x], 3)}{rows}"
    )


def _axes(figure: go.Figure, grid: Grid, number: str, domain: tuple[float, float], *, small: bool) -> None:
    plain = {"showgrid": False, "ticks": "", "showline": False, "tickfont": {"size": 9 if small else 11}}
    figure.update_layout(
        {
            f"xaxis{number}": {
                **plain,
                "tickvals": list(range(len(grid.teachers))),
                "ticktext": list(map(str, grid.teachers)),
                "title": "teacher head",
                "tickangle": 90,
                "range": (-0.5, len(grid.teachers) - 0.5),
                "domain": domain,
                "anchor": f"y{number}",
            },
            f"yaxis{number}": {
                **plain,
                "tickvals": list(range(len(grid.students))),
                "ticktext": list(map(str, grid.students)),
                "title": "" if number else "student head",
                "range": (-0.5, len(grid.students) - 0.5),
                "anchor": f"x{number}",
            },
        }
    )
