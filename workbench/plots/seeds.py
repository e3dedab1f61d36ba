"""Several seeds as one: training curves and accuracies as means with 95 % intervals over seeds (Student's t)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from plotly import graph_objects as go
from scipy import stats

from workbench.distillation.loop import StepReport
from workbench.errors import InputError
from workbench.experiment.conditions import METHOD
from workbench.experiment.results import ConditionResult
from workbench.plots.export import with_table
from workbench.plots.losses import PANELS, TRAINED, run_of, running_mean, style_of
from workbench.plots.table import condition_title, in_order
from workbench.plots.theme import LIGHT, Theme, escaped, faint, titled

WIDTH = 820
MEASURES = {"full_accuracy": "full model", "circuit_accuracy": "circuit alone"}


def over_seeds(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis (seeds), and the t interval around it: (mean, low, high); the interval is NaN for a
    single seed."""
    mean, count = values.mean(0), len(values)
    if count < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    width = stats.t.ppf(0.5 + level / 2, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
    return mean, mean - width, mean + width


def loss_bands(
    logs: Mapping[str, Sequence[StepReport]],
    *,
    smoothing: int = 9,
    theme: Theme = LIGHT,
    title: str = "Losses in training, over seeds",
) -> go.Figure:
    """A panel a loss term, a line a condition: the mean over its seeds at each step, with the 95 % interval over seeds
    as a band.

    `logs`: `condition-seed` -> step reports, as for `loss_curves`. Every seed is smoothed first (centred mean over
    `smoothing` steps, 1: not). Seeds of unequal length are compared up to the shortest. Errors: `InputError` for no
    reports, or `smoothing` that is not odd.
    """
    if not any(logs.values()) or smoothing < 1 or smoothing % 2 == 0:
        raise InputError(
            "loss bands need the step reports of at least one run, and an odd number of steps for `smoothing` (1: "
            "none)."
        )
    conditions: dict[str, list[Sequence[StepReport]]] = {}
    for name, reports in logs.items():
        conditions.setdefault(run_of(name)[0], []).append(reports)
    shown = [
        term
        for term in PANELS
        if any(getattr(report, term) is not None for reports in logs.values() for report in reports)
    ]
    figure, frames, named = go.Figure(), [], set()
    order = list(dict.fromkeys([*TRAINED, *conditions]))
    for name, runs in sorted(conditions.items(), key=lambda item: order.index(item[0])):
        style = style_of(name, logs, theme)
        for panel, term in enumerate(shown, 1):
            frame = _band(runs, term, smoothing)
            if frame is not None:
                frames.append(frame.assign(condition=name, term=term, seeds=len(runs)))
                _draw(
                    figure, name, len(runs), frame, "y" if panel == 1 else f"y{panel}", style, legend=name not in named
                )
                named.add(name)
    _panels(figure, shown)
    remark = (
        f"Lines: means over seeds{f', smoothed over {smoothing} steps' if smoothing > 1 else ''}. Bands: 95 % "
        "intervals of the mean over seeds."
    )
    single = [escaped(condition_title(name)) for name, runs in conditions.items() if len(runs) < 2]
    alone = (
        "One seed each, so no bands."
        if len(single) == len(conditions)
        else f"One seed, so no band: {', '.join(single)}."
    )
    remarks = [remark, *([alone] if single else [])]
    titled(figure, title, remarks, theme, width=WIDTH, height=250 * len(shown) + 60 + 22 * len(named))
    figure.update_layout(margin={"b": 60 + 22 * len(named)})
    return with_table(figure, pd.concat(frames, ignore_index=True))


def _band(runs: Sequence[Sequence[StepReport]], term: str, smoothing: int) -> pd.DataFrame | None:
    """step, mean, low, high of one condition's term; None where it has none."""
    series = [
        [(report.step, getattr(report, term)) for report in run if getattr(report, term) is not None] for run in runs
    ]
    length = min(map(len, series))
    if length == 0:
        return None
    width = smoothing if length >= 2 * smoothing else 1
    values = np.stack(
        [running_mean(np.array([value for _, value in run[:length]], dtype=np.float64), width) for run in series]
    )
    mean, low, high = over_seeds(values)
    steps = [step for step, _ in series[0][width // 2 : length - width // 2]]
    return pd.DataFrame({"step": steps, "mean": mean, "low": low, "high": high})


def _draw(
    figure: go.Figure, name: str, seeds: int, frame: pd.DataFrame, axis: str, style: Mapping[str, str], *, legend: bool
) -> None:
    common = {"legendgroup": name, "xaxis": "x", "yaxis": axis}
    steps = frame["step"].tolist()
    if seeds > 1:
        edge = [*frame["high"], *frame["low"][::-1]]
        figure.add_scatter(
            x=[*steps, *steps[::-1]],
            y=edge,
            fill="toself",
            fillcolor=faint(style["color"]),
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            name=f"{name}: interval",
            **common,
        )
    about = (
        f"<b>{escaped(condition_title(name))}</b>, {seeds} seed{'s' if seeds > 1 else ''}<br>step "
        f"%{{x}}<br>%{{y:.4f}}<extra></extra>"
    )
    figure.add_scatter(
        x=steps,
        y=frame["mean"].tolist(),
        mode="lines",
        line={**style, "width": 2.4},
        hovertemplate=about,
        showlegend=legend,
        name=f"{escaped(condition_title(name))} ({seeds} seed{'s' if seeds > 1 else ''})",
        **common,
    )


def _panels(figure: go.Figure, shown: Sequence[str]) -> None:
    count = len(shown)
    for panel, term in enumerate(shown, 1):
        top = 1 - (panel - 1) / count
        axis = {
            "title": PANELS[term][1],
            "domain": (top - 1 / count + (0.05 if panel < count else 0), top),
            "rangemode": "tozero",
            "anchor": "x",
        }
        figure.update_layout({"yaxis" if panel == 1 else f"yaxis{panel}": axis})
    lowest = "y" if count == 1 else f"y{count}"
    figure.update_layout(xaxis={"title": "optimizer step", "anchor": lowest, "rangemode": "tozero"})
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "entrywidth": 300}
    )


def seeds_chart(
    results: Sequence[ConditionResult],
    *,
    chance: float | None = None,
    theme: Theme = LIGHT,
    title: str = "Accuracy on held-out prompts, over seeds",
) -> go.Figure:
    """Each condition's mean accuracy over seeds with its 95 % interval over seeds: the full model filled, its circuit
    alone open; small dots are the seeds.

    A condition with one seed has no interval. For intervals over prompts see `results_chart`. Errors: `InputError` for
    no results.
    """
    if not results:
        raise InputError("there are no results to draw; run at least one condition.")
    rows = in_order(results)
    names = list(dict.fromkeys(row.condition for row in rows))
    figure, frames = go.Figure(), []
    for measure, symbol, colour, shift in (
        ("full_accuracy", "circle", theme.categories[0], -0.17),
        ("circuit_accuracy", "circle-open", theme.categories[5], 0.17),
    ):
        frame = pd.DataFrame([_summary(rows, name, measure) for name in names])
        frames.append(frame.assign(measure=measure))
        _dots(figure, frame, [place + shift for place in range(len(names))], MEASURES[measure], symbol, colour)
        figure.add_scatter(
            x=[getattr(row, measure) for row in rows],
            y=[names.index(row.condition) + shift for row in rows],
            mode="markers",
            showlegend=False,
            marker={"size": 5, "color": colour, "opacity": 0.45},
            hoverinfo="text",
            name=f"{MEASURES[measure]}: seeds",
            hovertext=[
                f"{escaped(condition_title(row.condition))}, seed {row.seed}: {getattr(row, measure):.3f}"
                for row in rows
            ],
        )
    if chance is not None:
        line = {"color": theme.muted, "dash": "dot", "width": 1.5}
        figure.add_scatter(
            x=(chance, chance),
            y=(-0.6, len(names) - 0.4),
            mode="lines",
            name=f"chance {chance:.3f}",
            line=line,
            hoverinfo="name",
        )
    labels = [
        f"<b>{escaped(condition_title(name))}</b>" if name == METHOD else escaped(condition_title(name))
        for name in names
    ]
    figure.update_layout(
        xaxis={"title": "accuracy (share of test prompts)", "range": (-0.02, 1.02), "dtick": 0.2, "tickformat": ".1f"},
        yaxis={
            "tickvals": list(range(len(names))),
            "ticktext": labels,
            "range": (len(names) - 0.4, -0.6),
            "ticks": "",
            "showline": False,
            "showgrid": False,
        },
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )
    counts = sorted({sum(row.condition == name for row in rows) for name in names})
    seeds = (
        f"{counts[0]} seed{'' if counts[-1] == 1 else 's'}"
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]} seeds"
    )
    remark = f"Mean and 95 % interval over {seeds} a condition (none for one seed); small dots: single seeds."
    return with_table(
        titled(figure, title, [remark], theme, width=WIDTH, height=38 * len(names) + 70, above=30),
        pd.concat(frames, ignore_index=True),
    )


def _summary(rows: Sequence[ConditionResult], name: str, measure: str) -> dict[str, object]:
    values = np.array([getattr(row, measure) for row in rows if row.condition == name])
    mean, low, high = (float(value[0]) for value in over_seeds(values[:, None]))
    return {"condition": name, "seeds": len(values), "mean": mean, "low": low, "high": high}


def _dots(
    figure: go.Figure, frame: pd.DataFrame, heights: Sequence[float], name: str, symbol: str, colour: str
) -> None:
    bars = {
        "array": (frame["high"] - frame["mean"]).fillna(0).tolist(),
        "arrayminus": (frame["mean"] - frame["low"]).fillna(0).tolist(),
    }
    about = [
        f"<b>{escaped(condition_title(row['condition']))}</b><br>{name} {row['mean']:.3f}"
        + (
            f"<br>95 % interval over seeds {row['low']:.3f} to {row['high']:.3f}"
            if row["seeds"] > 1
            else "<br>one seed: no interval"
        )
        for row in frame.to_dict("records")
    ]
    figure.add_scatter(
        x=frame["mean"].tolist(),
        y=heights,
        mode="markers",
        name=name,
        hoverinfo="text",
        hovertext=about,
        cliponaxis=False,
        marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2, "color": colour}},
        error_x={"type": "data", "symmetric": False, "thickness": 1.8, "width": 4, "color": colour, **bars},
    )
