"""How alike heads of two models are: CKA of every pair with its shuffled floor, and the impacts of matched heads
against each other."""

from collections.abc import Mapping, Sequence

import pandas as pd
from plotly import graph_objects as go

from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.matching import HeadMap
from workbench.matching.pair_cka import PairCka
from workbench.plots.export import with_table
from workbench.plots.matrices import Grid, drawn, floor_remarks
from workbench.plots.theme import LIGHT, Theme, escaped, titled
from workbench.values.refs import Head
from workbench.values.scores import Scores

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")


def cka_matrix(
    ckas: Sequence[PairCka], *, head_map: HeadMap | None = None, theme: Theme = LIGHT, title: str = "CKA of heads"
) -> go.Figure:
    """Student heads down, teacher heads across, colour the CKA of each pair (from `pair_ckas`; grey where not
    measured).

    A cross marks pairs that are no more alike than with prompts shuffled; frames mark the pairs of `head_map`.
    Errors: `InputError` for no pairs, or a pair that is given twice.
    """
    grid = Grid.of_pairs(ckas)
    figure = drawn([("", grid)], head_map, theme, title, floor_remarks([grid], head_map))
    return with_table(figure, grid.to_frame(head_map))


def impact_scatter(
    head_map: HeadMap,
    *,
    student: Scores,
    teacher: Scores,
    student_circuit: Circuit | None = None,
    theme: Theme = LIGHT,
    title: str = "Ablation impact of matched heads",
) -> go.Figure:
    """A point a match: across what ablating the teacher's head costs the teacher, upward what ablating the student's
    costs the student.

    Both are whole minus ablated, in the scores' unit and against the model's own baseline, with 95 % intervals over
    examples. On the dotted line both cost the same. Colours are the roles in `student_circuit`. Errors: `InputError`
    for a head without impact, or scores of different units.
    """
    if student.unit != teacher.unit:
        raise InputError(
            f"the student's impacts are {student.unit!r}, the teacher's {teacher.unit!r}; measure both alike."
        )
    rows = pd.DataFrame([_impacts(pair, student, teacher, student_circuit) for pair in head_map.pairs])
    if rows.empty or rows[["student_impact", "teacher_impact"]].isna().to_numpy().any():
        raise InputError(
            "some matched heads have no measured impact; profile every head of both circuits with `ablation_profiles`."
        )
    figure = go.Figure()
    ranges = {side: _range(rows, side) for side in ("teacher", "student")}
    ends = [min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())]
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": theme.muted, "dash": "dot", "width": 1.5},
        name="equal impact",
        hoverinfo="skip",
    )
    for place, (role, part) in enumerate(rows.assign(label=_labels(rows, ranges)).groupby("role", sort=True)):
        _cloud(
            figure,
            str(role),
            part,
            theme.categories[place % len(theme.categories)],
            symbol=SYMBOLS[place % len(SYMBOLS)],
        )
    scaled = {"zeroline": True, "zerolinecolor": theme.muted}
    figure.update_layout(
        xaxis={**scaled, "range": ranges["teacher"], "title": "teacher: impact of its head"},
        yaxis={**scaled, "range": ranges["student"], "title": "student: impact of its head"},
        legend={"title": {"text": "student's role" if student_circuit else ""}},
        showlegend=True,
    )
    varied = len(rows) > 2 and rows["student_impact"].nunique() > 1 and rows["teacher_impact"].nunique() > 1
    correlation = rows["student_impact"].corr(rows["teacher_impact"], method="spearman") if varied else float("nan")
    remarks = [
        f"Impact: {student.unit}. Each model against its own baseline; lines: 95 % intervals over prompts. On the "
        "dotted line "
        "both cost the same; the axes have scales of their own."
    ]
    remarks += [f"Rank correlation over {len(rows)} pairs: {correlation:+.2f}."] if correlation == correlation else []
    return with_table(titled(figure, title, remarks, theme, width=760, height=480), rows)


def _range(rows: pd.DataFrame, side: str) -> tuple[float, float]:
    low, high = float(min(0.0, rows[f"{side}_low"].min())), float(max(0.0, rows[f"{side}_high"].max()))
    room = 0.06 * (high - low or 1.0)
    return low - room, high + room


def _labels(rows: pd.DataFrame, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """The pair's names where no other point is near enough to run into them."""
    x, y = (rows[f"{side}_impact"].to_numpy() / (ranges[side][1] - ranges[side][0]) for side in ("teacher", "student"))
    free = [
        all(abs(x[at] - x[other]) > 0.16 or abs(y[at] - y[other]) > 0.04 for other in range(len(x)) if other != at)
        for at in range(len(x))
    ]
    names = zip(rows["student"], rows["teacher"], free, strict=True)
    return [f"{student}→{teacher}" if has_room else "" for student, teacher, has_room in names]


def _impacts(pair: tuple[Head, Head], student: Scores, teacher: Scores, circuit: Circuit | None) -> dict[str, object]:
    row: dict[str, object] = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "role": (circuit.role_of(pair[0]) if circuit else "") or "matched",
    }
    for side, head, scores in (("student", pair[0], student), ("teacher", pair[1], teacher)):
        scores.at(head)  # refuses a head outside the model
        low, high = scores.confidence_interval() if scores.per_example else (scores.mean(), scores.mean())
        values = (part[head.layer, head.index].item() for part in (scores.mean(), low, high))
        row |= dict(zip((f"{side}_impact", f"{side}_low", f"{side}_high"), values, strict=True))
    return row


def _cloud(figure: go.Figure, role: str, part: pd.DataFrame, colour: str, *, symbol: str) -> None:
    bars = {
        axis: {
            "type": "data",
            "symmetric": False,
            "thickness": 1.2,
            "width": 0,
            "array": (part[f"{side}_high"] - part[f"{side}_impact"]).tolist(),
            "arrayminus": (part[f"{side}_impact"] - part[f"{side}_low"]).tolist(),
        }
        for axis, side in (("error_x", "teacher"), ("error_y", "student"))
    }
    about = [
        f"<b>{row['student']} → {row['teacher']}</b><br>student {row['student_impact']:+.4g} "
        f"[{row['student_low']:+.4g}, {row['student_high']:+.4g}]"
        f"<br>teacher {row['teacher_impact']:+.4g} [{row['teacher_low']:+.4g}, {row['teacher_high']:+.4g}]"
        for row in part.to_dict("records")
    ]
    figure.add_scatter(
        x=part["teacher_impact"].tolist(),
        y=part["student_impact"].tolist(),
        mode="markers+text",
        name=escaped(role),
        text=part["label"].tolist(),
        textposition="top right",
        textfont={"size": 10},
        marker={"size": 10, "color": colour, "symbol": symbol},
        opacity=0.85,
        hoverinfo="text",
        hovertext=about,
        **bars,
    )
