"""A study's summary -> figures and page: every cell's conditions with intervals over seeds, and when alignment
helped."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from plotly import graph_objects as go

from workbench.errors import InputError
from workbench.experiment.conditions import METHOD
from workbench.plots.export import with_table
from workbench.plots.losses import style_of
from workbench.plots.table import condition_title
from workbench.plots.theme import LIGHT, Theme, escaped, faint, titled
from workbench.report.page import Section, report_html
from workbench.report.study_findings import PARTS, cell_html, cell_title, study_opening
from workbench.study.written import read_summary

WIDTH = 820
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")


def cell_frame(cell: Mapping[str, Any]) -> pd.DataFrame:
    """A row per condition and part (full, circuit): mean accuracy and its 95 % interval over seeds."""
    rows = [
        {"condition": name, "part": part, **condition[part]}
        for name, condition in cell["conditions"].items()
        for part in PARTS
    ]
    return pd.DataFrame(rows)


def cell_chart(cell: Mapping[str, Any], *, theme: Theme = LIGHT) -> go.Figure:
    """Accuracy of every condition in one cell, full model and circuit alone: dots are means over seeds, bars 95 %
    intervals."""
    frame = cell_frame(cell)
    names = list(dict.fromkeys(frame["condition"]))
    figure = go.Figure()
    for place, (part, label) in enumerate(PARTS.items()):
        mine = frame[frame["part"] == part].set_index("condition").loc[names]
        reach = [(mine["high"] - mine["mean"]).fillna(0.0), (mine["mean"] - mine["low"]).fillna(0.0)]
        figure.add_scatter(
            x=mine["mean"],
            y=[row + (0.14 if place == 0 else -0.14) for row in range(len(names))],
            error_x={"type": "data", "array": reach[0], "arrayminus": reach[1], "thickness": 1.5, "width": 3},
            mode="markers",
            name=label,
            marker={"size": 9, "symbol": SYMBOLS[place], "color": theme.categories[place]},
            customdata=[condition_title(name) for name in names],
            hovertemplate="%{customdata}<br>" + label + " %{x:.3f}<extra></extra>",
        )
    labels = [
        f"<b>{escaped(condition_title(name))}</b>" if name == METHOD else escaped(condition_title(name))
        for name in names
    ]
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=labels, autorange="reversed", showgrid=False)
    figure.update_xaxes(title="accuracy on held-out test prompts", range=[0, 1.02])
    seeds = max(condition["full"]["count"] for condition in cell["conditions"].values())
    remarks = [
        f"Dots: means over {seeds} seeds; bars: 95 % t intervals over seeds (none for what is not trained, or gave "
        f"every seed the same training). lambda {cell['weight']:g}."
    ]
    titled(figure, cell_title(cell), remarks, theme, width=WIDTH, height=150 + 42 * len(names))
    return with_table(figure, frame)


def convergence_chart(cell: Mapping[str, Any], *, theme: Theme = LIGHT) -> go.Figure:
    """Accuracy on validation prompts over the training steps: a line a trained condition, the mean over seeds with its
    95 % interval as a band.

    Errors: `InputError` for a cell without evaluations during training.
    """
    curves = {
        name: pd.DataFrame(condition["curve"]) for name, condition in cell["conditions"].items() if condition["curve"]
    }
    if not curves:
        raise InputError(
            "nothing was evaluated during this training; set training.evaluate_every and data.validation_scenes."
        )
    figure = go.Figure()
    for name, curve in curves.items():
        style = style_of(name, curves, theme)
        low, high = (curve[edge].fillna(curve["mean"]) for edge in ("low", "high"))
        figure.add_scatter(
            x=[*curve["step"], *curve["step"][::-1]],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=faint(style["color"]),
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
            name=f"{name}: interval",
        )
        figure.add_scatter(
            x=curve["step"],
            y=curve["mean"],
            mode="lines",
            line={**style, "width": 2.4},
            name=escaped(condition_title(name)),
            legendgroup=name,
            hovertemplate=f"<b>{escaped(condition_title(name))}</b><br>step %{{x}}<br>%{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title="optimizer step", rangemode="tozero")
    figure.update_yaxes(title="accuracy on validation prompts")
    seeds = max(int(curve["count"].max()) for curve in curves.values())
    remarks = [
        f"Lines: means over {seeds} seeds; bands: 95 % intervals of the mean. Validation prompts chose lambda; the "
        "table has the test prompts."
    ]
    titled(figure, f"{cell_title(cell)}: how fast", remarks, theme, width=WIDTH, height=440)
    return with_table(
        figure, pd.concat([curve.assign(condition=name) for name, curve in curves.items()], ignore_index=True)
    )


def gain_chart(diagnostic: Mapping[str, Any], *, theme: Theme = LIGHT) -> go.Figure:
    """Gain of alignment over circuit CE against how far the aligned pairs' CKA stands above its floor before training;
    a dot a training.

    Errors: `InputError` without trainings that align.
    """
    if not diagnostic["points"]:
        raise InputError("no training of this study aligns heads, so there is no gain of alignment to show.")
    frame = pd.DataFrame(diagnostic["points"])
    frame["above_floor"] = frame["cka"] - frame["floor"]
    figure = go.Figure()
    for place, (name, mine) in enumerate(frame.groupby("condition", sort=False)):
        figure.add_scatter(
            x=mine["above_floor"],
            y=mine["gain"],
            mode="markers",
            name=escaped(condition_title(str(name))),
            marker={
                "size": 9,
                "opacity": 0.8,
                "symbol": SYMBOLS[place % len(SYMBOLS)],
                "color": theme.categories[place % len(theme.categories)],
            },
            customdata=[f"{cell_title(row)}, seed {row['seed']}" for row in mine.to_dict("records")],
            hovertemplate="%{customdata}<br>gain %{y:+.3f}, CKA above floor %{x:.2f}<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": theme.muted, "width": 1})
    figure.update_xaxes(title="mean CKA of the aligned pairs above its floor, before training")
    figure.update_yaxes(title="full accuracy, minus circuit CE of the same seed")
    correlation = diagnostic["rank_correlation"]
    said = (
        "too few to correlate"
        if correlation is None
        else f"rank correlation {correlation:+.2f} over {len(frame)} trainings"
    )
    titled(figure, "When alignment helps", [f"A dot is one training; {said}."], theme, width=WIDTH, height=520)
    return with_table(figure, frame)


def study_report(path: Path) -> str:
    """The page of a study's folder. Errors: `InputError` when it holds no summary."""
    if not (path / "summary.json").exists():
        raise InputError(f"{path} holds no study's summary; run `workbench study` into it first.")
    summary = read_summary(path / "summary.json")
    return report_html(summary["title"], list(_sections(summary)), opening=study_opening(summary))


def _sections(summary: Mapping[str, Any]) -> Iterator[Section]:
    for cell in summary["cells"]:
        heads = cell["heads_trained"]
        text = (
            f"{cell['train_prompts']} training and {cell['test_prompts']} test prompts; {heads['heads']} of the "
            f"student's {heads['of']} heads train, "
            f"{heads.get('matched', heads['heads'])} are matched to {heads['teacher_heads_used']} of the teacher's; "
            f"lambda {cell['weight']:g}, chosen on validation prompts."
        )
        yield Section(heading=cell_title(cell), text=text, figure=partial(_cell, cell), html=cell_html(cell))
        if any(condition["curve"] for condition in cell["conditions"].values()):
            yield Section(heading=f"{cell_title(cell)}: how fast", figure=partial(_convergence, cell))
    if summary["diagnostic"]["points"]:
        yield Section(
            heading="When alignment helps",
            text="Known before training: the pairs' CKA above its floor.",
            figure=lambda theme: gain_chart(summary["diagnostic"], theme=theme),
        )


def _cell(cell: Mapping[str, Any], theme: Theme) -> go.Figure:
    return cell_chart(cell, theme=theme)


def _convergence(cell: Mapping[str, Any], theme: Theme) -> go.Figure:
    return convergence_chart(cell, theme=theme)
