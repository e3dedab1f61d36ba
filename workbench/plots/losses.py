"""How the losses fall in training: task loss and alignment loss apart, a line a run."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from plotly import graph_objects as go

from workbench.distillation.distill import DistillationResult
from workbench.distillation.reports import StepReport
from workbench.errors import InputError
from workbench.experiment.results import TITLES
from workbench.plots.export import with_table
from workbench.plots.table import condition_title
from workbench.plots.theme import LIGHT, Theme, escaped, titled

TRAINED = tuple(name for name in TITLES if name not in ("base", "teacher"))
DASHES = ("solid", "dash", "dot", "dashdot")
PANELS = {"task_loss": ("y", "task loss (nats)"), "alignment_loss": ("y2", "sum over pairs of (1 - CKA)")}
"""Field of a step report -> its axis, from the top, with its title."""


def loss_curves(
    logs: Mapping[str, Sequence[StepReport]],
    *,
    smoothing: int = 9,
    theme: Theme = LIGHT,
    title: str = "Losses in training",
) -> go.Figure:
    """Task loss (mean over the batch's prompts, in nats) above, alignment loss (SUM over pairs of 1 - CKA, without
    lambda) below, by optimizer step.

    `logs`: condition, or `condition-seed` as the run folders are named, or any other name -> its step reports. Seeds
    share their condition's colour. Thin lines are the single steps; a bold line over them is their centred mean over
    `smoothing` steps, where that many surround a step (1: the steps alone; runs shorter than twice that have none). A
    run without one of the losses has no line in that panel. Errors: `InputError` for no reports, or for `smoothing`
    that is not odd.
    """
    if not any(logs.values()) or smoothing < 1 or smoothing % 2 == 0:
        raise InputError(
            "loss curves need the step reports of at least one run, and an odd number of steps for `smoothing` (1: "
            "none)."
        )
    figure = go.Figure()
    named: set[str] = set()
    for name, reports in logs.items():
        for field, (axis, _) in PANELS.items():
            points = [(report.step, getattr(report, field)) for report in reports if getattr(report, field) is not None]
            if points:
                _lines(
                    figure,
                    name,
                    np.array(points, dtype=np.float64),
                    axis,
                    style_of(name, logs, theme),
                    smoothing,
                    legend=run_of(name)[0] not in named,
                )
                named.add(run_of(name)[0])
    _axes(figure, theme)
    smoothed = any(figure.select_traces({"meta": "mean"}))
    remarks = [f"Thin: each step. Bold: centred mean over {smoothing} steps."] if smoothed else []
    titled(figure, title, remarks, theme, width=900, height=max(556, 22 * len(named)))
    return with_table(figure, _frame(logs))


def training(
    runs: DistillationResult | Mapping[str, DistillationResult],
    *,
    smoothing: int = 9,
    theme: Theme = LIGHT,
    title: str = "Losses in training",
) -> go.Figure:
    """The losses of a training by step, or of several by name: what `distill` returned. As `loss_curves`."""
    named = dict(runs) if isinstance(runs, Mapping) else {"training": runs}
    for name, run in named.items():
        if not isinstance(run, DistillationResult):
            raise InputError(f"{name!r} holds {type(run).__name__}, no training; give what `distill` returns.")
    logs = {name: run.reports for name, run in named.items()}
    return loss_curves(logs, smoothing=smoothing, theme=theme, title=title)


def _frame(logs: Mapping[str, Sequence[StepReport]]) -> pd.DataFrame:
    rows = [
        {
            "run": name,
            "condition": run_of(name)[0],
            "step": report.step,
            "loss": report.loss,
            **{term: getattr(report, term) for term in PANELS},
        }
        for name, reports in logs.items()
        for report in reports
    ]
    return pd.DataFrame(rows)


def run_of(name: str) -> tuple[str, str]:
    """A log's condition and how its run is called: `circuit_ce-1` -> (`circuit_ce`, `circuit / CE, seed 1`)."""
    condition, _, seed = name.rpartition("-")
    known = condition in TITLES and seed.isdecimal()
    return (condition, f"{condition_title(condition)}, seed {seed}") if known else (name, condition_title(name))


def style_of(name: str, runs: Iterable[str], theme: Theme) -> dict[str, str]:
    """Known conditions have the same colour in every figure; other names take the next ones, then the next dash."""
    conditions = dict.fromkeys([*TRAINED, *(run_of(other)[0] for other in runs)])
    place, count = list(conditions).index(run_of(name)[0]), len(theme.categories)
    return {"color": theme.categories[place % count], "dash": DASHES[place // count % len(DASHES)]}


def _lines(
    figure: go.Figure,
    name: str,
    points: np.ndarray,
    axis: str,
    style: Mapping[str, str],
    smoothing: int,
    *,
    legend: bool,
) -> None:
    """A run's line in one panel: bold, or thin with its running mean. `points`: [step, loss]."""
    condition, run = run_of(name)
    smooth = smoothing > 1 and len(points) >= 2 * smoothing
    common = {
        "mode": "lines",
        "name": escaped(condition_title(condition)),
        "legendgroup": condition,
        "yaxis": axis,
        "xaxis": "x",
    }
    about = f"<b>{escaped(run)}</b><br>step %{{x}}<br>%{{y:.4f}}"
    if smooth:
        thin = {"color": style["color"], "width": 1}
        figure.add_scatter(
            x=points[:, 0],
            y=points[:, 1],
            line=thin,
            opacity=0.35,
            showlegend=False,
            meta="step",
            hovertemplate=about + "<extra></extra>",
            **common,
        )
        points = np.stack(
            [points[smoothing // 2 : -(smoothing // 2), 0], running_mean(points[:, 1], smoothing)], axis=1
        )
        about += f"<br>mean over {smoothing} steps"
    figure.add_scatter(
        x=points[:, 0],
        y=points[:, 1],
        line={**style, "width": 2.4},
        showlegend=legend,
        meta="mean" if smooth else "step",
        hovertemplate=about + "<extra></extra>",
        **common,
    )


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over each `width` consecutive values: `width` - 1 fewer than there are values."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _axes(figure: go.Figure, theme: Theme) -> None:
    """Two panels over one axis of steps; one without lines says so."""
    figure.update_layout(
        xaxis={"title": "optimizer step", "anchor": "y2", "rangemode": "tozero"},
        yaxis={"title": PANELS["task_loss"][1], "domain": (0.54, 1), "rangemode": "tozero"},
        yaxis2={"title": PANELS["alignment_loss"][1], "domain": (0, 0.46), "rangemode": "tozero", "anchor": "x"},
        margin={"l": 70, "b": 56, "r": 30},
        legend={"tracegroupgap": 2},
    )
    for axis, loss in (("y", "a task loss"), ("y2", "an alignment loss")):
        if not any(figure.select_traces({"yaxis": axis})):
            figure.add_scatter(x=[None], y=[None], xaxis="x", yaxis=axis, showlegend=False, hoverinfo="skip")
            text = f"no run here has {loss}"
            figure.update_layout({axis.replace("y", "yaxis"): {"showticklabels": False, "showgrid": False}})
            place = {"x": 0.5, "xref": "x domain", "y": 0.5, "yref": f"{axis} domain"}
            figure.add_annotation(text=text, showarrow=False, font={"color": theme.muted}, **place)
