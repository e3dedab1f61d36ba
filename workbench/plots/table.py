"""The results table: a dot-and-interval chart, and plain semantic HTML."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

import pandas as pd
from plotly import graph_objects as go

from workbench.errors import InputError
from workbench.experiment.conditions import METHOD
from workbench.experiment.results import TITLES, ConditionResult
from workbench.plots.export import with_table
from workbench.plots.theme import LIGHT, Theme, escaped, titled
from workbench.values.display import plain

FULL, CIRCUIT = "full model", "circuit alone"
PAIR, APART = 0.8, 0.9
"""Between a row's two accuracies, and more between two conditions, in lines."""


def condition_title(name: str) -> str:
    """A condition's readable title; an unknown name is its own."""
    return TITLES.get(name, name)


def in_order(results: Iterable[ConditionResult]) -> list[ConditionResult]:
    """By the table's order of conditions, then by seed; unknown conditions last."""
    order = list(TITLES)
    return sorted(
        results,
        key=lambda row: (
            order.index(row.condition) if row.condition in TITLES else len(order),
            row.condition,
            row.seed,
        ),
    )


def results_chart(
    results: Sequence[ConditionResult],
    *,
    chance: float | None = None,
    theme: Theme = LIGHT,
    title: str = "Accuracy on held-out prompts",
) -> go.Figure:
    """Accuracy (share of test prompts, 0 to 1) of each condition: the full model filled, its circuit alone open, both
    with their 95 % interval.

    A grey tick is a random circuit of equal size, a dotted line chance. Several seeds stand below one another. Errors:
    `InputError` for no results.
    """
    if not results:
        raise InputError("there are no results to draw; run at least one condition.")
    rows = in_order(results)
    heights, places, lines = _places(rows)
    below = [height + PAIR for height in heights]
    figure = go.Figure()
    _dots(figure, FULL, rows, heights, "circle", theme.categories[0])
    _dots(figure, CIRCUIT, rows, below, "circle-open", theme.categories[5])
    _random(figure, rows, below, theme)
    if chance is not None:
        line = {"color": theme.muted, "dash": "dot", "width": 1.5}
        figure.add_scatter(
            x=(chance, chance), y=(-1, lines), mode="lines", name=f"chance {chance:.3f}", line=line, hoverinfo="name"
        )
    ticks = {
        "tickvals": list(places.values()),
        "ticktext": [_label(name) for name in places],
        "ticks": "",
        "showline": False,
        "showgrid": False,
    }
    figure.update_layout(
        xaxis={"title": "accuracy (share of test prompts)", "range": (-0.02, 1.02), "dtick": 0.2, "tickformat": ".1f"},
        yaxis=ticks | {"range": (lines, -1)},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "yref": "paper"},
        margin={"b": 56, "r": 40, "l": 60},
    )
    seeds = len({row.seed for row in rows})
    remark = (
        f"Lines: 95 % intervals over prompts{f'; {seeds} seeds, in order from top to bottom' if seeds > 1 else ''}."
    )
    titled(figure, title, [remark], theme, width=820, height=round(18 * (lines + 1)) + 56, above=30)
    return with_table(figure, results_frame(rows))


def results_frame(results: Sequence[ConditionResult]) -> pd.DataFrame:
    """A row per condition and seed, in the table's order; intervals as `_low` and `_high`."""
    rows = []
    for result in in_order(results):
        row = {
            name: value
            for name, value in result.to_json().items()
            if name not in ("full_interval", "circuit_interval", "mcnemar")
        }
        for name in ("full", "circuit"):
            row[f"{name}_low"], row[f"{name}_high"] = getattr(result, f"{name}_interval")
        rows.append(row | {f"p_against_{name}": value for name, value in result.mcnemar.items()})
    return pd.DataFrame(rows)


def _label(name: str) -> str:
    text = escaped(condition_title(name))
    return f"<b>{text}</b>" if name == METHOD else text


def _places(rows: Sequence[ConditionResult]) -> tuple[list[float], dict[str, float], float]:
    """The height of each row's full accuracy (its circuit's is `PAIR` lower), of each condition's name, and of all, in
    lines downward."""
    heights: list[float] = []
    names: dict[str, list[float]] = {}
    line = 0.0
    for row in rows:
        line += APART if names and row.condition not in names else 0.0
        names.setdefault(row.condition, []).append(line + PAIR / 2)
        heights.append(line)
        line += 2 * PAIR
    return heights, {name: sum(places) / len(places) for name, places in names.items()}, line


def _dots(
    figure: go.Figure, name: str, rows: Sequence[ConditionResult], heights: Sequence[float], symbol: str, colour: str
) -> None:
    """One kind of accuracy of all rows, with its interval."""
    measured = [
        (row.full_accuracy, row.full_interval) if name == FULL else (row.circuit_accuracy, row.circuit_interval)
        for row in rows
    ]
    values = [value for value, _ in measured]
    bars = {
        "array": [high - value for value, (_, high) in measured],
        "arrayminus": [value - low for value, (low, _) in measured],
    }
    about = [
        f"{_who(row)}<br>{name} {value:.3f}<br>95 % interval {low:.3f} to {high:.3f}"
        for row, (value, (low, high)) in zip(rows, measured, strict=True)
    ]
    figure.add_scatter(
        x=values,
        y=heights,
        mode="markers",
        name=name,
        hoverinfo="text",
        hovertext=about,
        cliponaxis=False,
        marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2, "color": colour}},
        error_x={"type": "data", "symmetric": False, "thickness": 1.6, "width": 0, "color": colour, **bars},
    )


def _random(figure: go.Figure, rows: Sequence[ConditionResult], heights: Sequence[float], theme: Theme) -> None:
    about = [f"{_who(row)}<br>random circuit of equal size {row.random_circuit_accuracy:.3f}" for row in rows]
    figure.add_scatter(
        x=[row.random_circuit_accuracy for row in rows],
        y=heights,
        mode="markers",
        name="random circuit",
        hoverinfo="text",
        hovertext=about,
        cliponaxis=False,
        marker={"symbol": "line-ns", "size": 13, "line": {"width": 2.5, "color": theme.muted}},
    )


def _who(row: ConditionResult) -> str:
    return f"<b>{escaped(condition_title(row.condition))}</b>, seed {row.seed}"


COLUMNS: Mapping[str, Callable[[ConditionResult], str]] = {
    "Seed": lambda row: str(row.seed),
    "Full accuracy": lambda row: _interval(row.full_accuracy, row.full_interval),
    "Circuit accuracy": lambda row: _interval(row.circuit_accuracy, row.circuit_interval),
    "Random circuit": lambda row: _number(row.random_circuit_accuracy),
    "Faithfulness": lambda row: _number(row.faithfulness),
    "Mean CKA": lambda row: _number(row.mean_cka),
    "CKA floor": lambda row: _number(row.cka_floor),
    "Trained parameters": lambda row: (
        f"{row.trained_parameters:,} ({row.trained_fraction:.1%})".replace("%", " %") if row.trained_parameters else "0"
    ),
    "Steps": lambda row: f"{row.steps:,}",
    "p against full / CE": lambda row: _p_value(row.mcnemar.get("full_ce")),
    "p against circuit / CE": lambda row: _p_value(row.mcnemar.get("circuit_ce")),
}
"""Heading -> cell."""
CAPTION = (
    "Accuracies are shares of test prompts, with their 95 % interval; p is McNemar's exact test on the same "
    "prompts, two-sided."
)


def results_html(results: Sequence[ConditionResult]) -> str:
    """The results as a plain HTML table (class `results`; the method's rows have class `method`), all text escaped;
    `n/a` is not measured."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Condition", *COLUMNS))
    body = "\n".join(_row(row) for row in in_order(results))
    return (
        f'<table class="results">\n<caption>{CAPTION}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    )


def _row(row: ConditionResult) -> str:
    cells = "".join(f"<td>{escape(cell(row))}</td>" for cell in COLUMNS.values())
    opening = '<tr class="method">' if row.condition == METHOD else "<tr>"
    return f'{opening}<th scope="row">{escape(condition_title(row.condition))}</th>{cells}</tr>'


def _number(value: float | None) -> str:
    return "n/a" if value is None else plain(value, 3)


def _interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _p_value(p: float | None) -> str:
    return "n/a" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
