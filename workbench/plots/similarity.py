"""How alike heads of two models are: CKA of every pair with its shuffled floor, and the impacts of matched heads against each other."""

from collections.abc import Mapping, Sequence

import pandas as pd
from plotly import graph_objects as go

from workbench.alignment import PairCka
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.matching import HeadMap
from workbench.plots.export import with_table
from workbench.plots.matching import at_floor
from workbench.plots.theme import LIGHT, Theme, colour_scale, escaped, titled
from workbench.refs import Head
from workbench.scores import Scores

CELL, LEFT = 24, 110
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")


def cka_matrix(ckas: Sequence[PairCka], *, head_map: HeadMap | None = None, theme: Theme = LIGHT, title: str = "CKA of heads") -> go.Figure:
    """Student heads down, teacher heads across, colour the CKA of each pair (from `pair_ckas`; grey where not measured).

    A cross marks pairs that are no more alike than with prompts shuffled; frames mark the pairs of `head_map`.
    Errors: `InputError` for no pairs, or a pair that is given twice.
    """
    known = {(cka.pair.student, cka.pair.teacher): cka for cka in ckas}
    if not known or len(known) < len(ckas):
        raise InputError("a CKA matrix needs each pair of heads once, and at least one; measure them with `pair_ckas`.")
    ours, theirs = sorted({student for student, _ in known}), sorted({teacher for _, teacher in known})
    rows = [[known.get((student, teacher)) for teacher in theirs] for student in ours]
    figure = go.Figure()
    figure.add_heatmap(
        z=[[cka and cka.cka for cka in row] for row in rows], coloraxis="coloraxis", xgap=1, ygap=1, name="CKA",
        hoverinfo="text", hovertext=[[_about(cka) for cka in row] for row in rows],
    )  # fmt: skip
    crosses = [(x, y) for y, row in enumerate(rows) for x, cka in enumerate(row) if cka and at_floor(cka)]
    figure.add_scatter(
        x=[x for x, _ in crosses], y=[y for _, y in crosses], mode="markers", hoverinfo="skip", showlegend=False, name="at the floor",
        marker={"symbol": "x-thin", "size": 6, "line": {"width": 1, "color": theme.muted}},
    )  # fmt: skip
    for student, teacher in head_map.pairs if head_map else ():
        if student in ours and teacher in theirs:
            x, y = theirs.index(teacher), ours.index(student)
            edges = {"x0": x - 0.46, "x1": x + 0.46, "y0": y - 0.46, "y1": y + 0.46}
            figure.add_shape(type="rect", line={"color": theme.helps, "width": 2.5}, name=f"{student}~{teacher}", **edges)
    plain = {"showgrid": False, "ticks": "", "showline": False, "tickfont": {"size": 11}}
    cell = max(15, min(CELL, 640 // len(theirs)))
    across = cell * len(theirs)
    bar = {"title": {"text": "CKA", "side": "top"}, "thickness": 12, "outlinewidth": 0, "tickvals": [0, 0.5, 1]}
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": 1, "colorscale": colour_scale(theme.wash), "colorbar": bar},
        xaxis={**plain, "tickvals": list(range(len(theirs))), "ticktext": list(map(str, theirs)), "title": "teacher head", "tickangle": 90, "range": (-0.5, len(theirs) - 0.5)},
        yaxis={**plain, "tickvals": list(range(len(ours))), "ticktext": list(map(str, ours)), "title": "student head", "range": (-0.5, len(ours) - 0.5)},
        plot_bgcolor=theme.missing,
    )  # fmt: skip
    width = max(640, across + LEFT + 90)
    titled(figure, title, _remarks(list(known.values()), head_map), theme, width=width, height=cell * len(ours) + 80)
    figure.update_layout(margin={"l": LEFT, "b": 80, "r": width - LEFT - across}, plot_bgcolor=theme.missing)
    return with_table(figure, pd.DataFrame([_row(cka, head_map) for cka in known.values()]))


def _about(cka: PairCka | None) -> str:
    if cka is None:
        return ""
    return (
        f"<b>{cka.pair.student} and {cka.pair.teacher}</b><br>CKA {cka.cka:.3f}<br>"
        f"with prompts shuffled {cka.floor:.3f}, highest {cka.floor_high:.3f}<br>{cka.rows} rows"
    )


def _remarks(ckas: Sequence[PairCka], head_map: HeadMap | None) -> list[str]:
    floor, high = sum(cka.floor for cka in ckas) / len(ckas), max(cka.floor_high for cka in ckas)
    rows = sorted({cka.rows for cka in ckas})
    over = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    remark = f"Over {over} rows. Floor, with prompts shuffled: mean {floor:.2f}, highest {high:.2f}; a cross: no higher than its own floor's highest."
    return [remark, *(["Framed: matched pairs."] if head_map else [])]


def _row(cka: PairCka, head_map: HeadMap | None) -> dict[str, object]:
    pair = (cka.pair.student, cka.pair.teacher)
    matched = {"matched": pair in set(head_map.pairs)} if head_map else {}
    return {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "cka": cka.cka,
        "floor": cka.floor,
        "floor_high": cka.floor_high,
        "rows": cka.rows,
        **matched,
    }


def impact_scatter(
    head_map: HeadMap,
    *,
    student: Scores,
    teacher: Scores,
    student_circuit: Circuit | None = None,
    theme: Theme = LIGHT,
    title: str = "Ablation impact of matched heads",
) -> go.Figure:
    """A point a match: across what ablating the teacher's head costs the teacher, upward what ablating the student's costs the student.

    Both are whole minus ablated, in the scores' unit and against the model's own baseline, with 95 % intervals over examples. On the dotted line both
    cost the same. Colours are the roles in `student_circuit`. Errors: `InputError` for a head without impact, or scores of different units.
    """
    if student.unit != teacher.unit:
        raise InputError(f"the student's impacts are {student.unit!r}, the teacher's {teacher.unit!r}; measure both alike.")
    rows = pd.DataFrame([_impacts(pair, student, teacher, student_circuit) for pair in head_map.pairs])
    if rows.empty or rows[["student_impact", "teacher_impact"]].isna().to_numpy().any():
        raise InputError("some matched heads have no measured impact; profile every head of both circuits with `ablation_profiles`.")
    figure = go.Figure()
    ranges = {side: _range(rows, side) for side in ("teacher", "student")}
    ends = [min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": theme.muted, "dash": "dot", "width": 1.5}, name="equal impact", hoverinfo="skip")
    for place, (role, part) in enumerate(rows.assign(label=_labels(rows, ranges)).groupby("role", sort=True)):
        _cloud(figure, str(role), part, theme.categories[place % len(theme.categories)], symbol=SYMBOLS[place % len(SYMBOLS)])
    scaled = {"zeroline": True, "zerolinecolor": theme.muted}
    figure.update_layout(
        xaxis={**scaled, "range": ranges["teacher"], "title": "teacher: impact of its head"},
        yaxis={**scaled, "range": ranges["student"], "title": "student: impact of its head"},
        legend={"title": {"text": "student's role" if student_circuit else ""}},
        showlegend=True,
    )
    correlation = rows["student_impact"].corr(rows["teacher_impact"], method="spearman") if len(rows) > 2 else float("nan")
    remarks = [
        f"Impact: {student.unit}. Each model against its own baseline; lines: 95 % intervals over prompts. On the dotted line "
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
    free = [all(abs(x[at] - x[other]) > 0.16 or abs(y[at] - y[other]) > 0.04 for other in range(len(x)) if other != at) for at in range(len(x))]
    names = zip(rows["student"], rows["teacher"], free, strict=True)
    return [f"{student}→{teacher}" if alone else "" for student, teacher, alone in names]


def _impacts(pair: tuple[Head, Head], student: Scores, teacher: Scores, circuit: Circuit | None) -> dict[str, object]:
    row: dict[str, object] = {"student": str(pair[0]), "teacher": str(pair[1]), "role": (circuit.role_of(pair[0]) if circuit else "") or "matched"}
    for side, head, scores in (("student", pair[0], student), ("teacher", pair[1], teacher)):
        scores.at(head)  # refuses a head outside the model
        low, high = scores.confidence_interval() if scores.per_example else (scores.mean(), scores.mean())
        values = (part[head.layer, head.index].item() for part in (scores.mean(), low, high))
        row |= dict(zip((f"{side}_impact", f"{side}_low", f"{side}_high"), values, strict=True))
    return row


def _cloud(figure: go.Figure, role: str, part: pd.DataFrame, colour: str, *, symbol: str) -> None:
    bars = {
        axis: {
            "type": "data", "symmetric": False, "thickness": 1.2, "width": 0, "array": (part[f"{side}_high"] - part[f"{side}_impact"]).tolist(),
            "arrayminus": (part[f"{side}_impact"] - part[f"{side}_low"]).tolist(),
        }
        for axis, side in (("error_x", "teacher"), ("error_y", "student"))
    }  # fmt: skip
    about = [
        f"<b>{row['student']} → {row['teacher']}</b><br>student {row['student_impact']:+.4g} [{row['student_low']:+.4g}, {row['student_high']:+.4g}]"
        f"<br>teacher {row['teacher_impact']:+.4g} [{row['teacher_low']:+.4g}, {row['teacher_high']:+.4g}]"
        for row in part.to_dict("records")
    ]
    figure.add_scatter(
        x=part["teacher_impact"].tolist(), y=part["student_impact"].tolist(), mode="markers+text", name=escaped(role),
        text=part["label"].tolist(), textposition="top right", textfont={"size": 10},
        marker={"size": 10, "color": colour, "symbol": symbol}, opacity=0.85, hoverinfo="text", hovertext=about, **bars,
    )  # fmt: skip
