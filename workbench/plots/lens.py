"""The logit lens: over layers and positions of one prompt, and over layers for many prompts with intervals."""

from collections.abc import Mapping

import pandas as pd
from plotly import graph_objects as go

from workbench.errors import InputError
from workbench.plots.export import with_table
from workbench.plots.patterns import WIDTH
from workbench.plots.theme import LIGHT, Theme, colour_scale, escaped, faint, titled
from workbench.readouts.logit_lens import LogitLens
from workbench.values.scores import Scores

MOST = 16
"""Positions side by side."""


def lens_figure(
    lens: LogitLens, *, positions: tuple[int, int] | None = None, theme: Theme = LIGHT, title: str = "Logit lens"
) -> go.Figure:
    """Stages upward, positions across: each cell names the likeliest next token, its colour is the probability of the
    answer there.

    `positions`: first and last (exclusive) position shown; default the last 16. A framed cell's likeliest token is the
    answer. Hover for the others. Errors: `InputError` for positions outside the prompt.
    """
    length = len(lens.tokens)
    first, last = positions or (max(0, length - MOST), length)
    if not 0 <= first < last <= length:
        raise InputError(f"positions {first} to {last} are outside a prompt of {length} tokens.")
    across, stages = range(first, last), range(len(lens.stages))
    most = 10 if last - first <= 10 else 7
    figure = go.Figure()
    words = [[_short(lens.top[stage][place][0], most) for place in across] for stage in stages]
    shown = lens.of_answer[:, first:last].tolist()
    inks = [[theme.strong_ink if value > 0.6 else theme.ink for value in row] for row in shown]
    bar = {
        "title": {"text": f"p({escaped(lens.answer.strip())})", "side": "top"},
        "thickness": 12,
        "outlinewidth": 0,
        "tickvals": [0, 0.5, 1],
    }
    figure.add_heatmap(
        z=shown,
        coloraxis="coloraxis",
        hoverinfo="text",
        xgap=1,
        ygap=1,
        name="lens",
        hovertext=[[_about(lens, stage, place) for place in across] for stage in stages],
        customdata=[[[lens.stages[stage], place] for place in across] for stage in stages],
    )
    for stage in stages:
        for column, place in enumerate(across):
            figure.add_annotation(
                x=column,
                y=stage,
                text=words[stage][column],
                showarrow=False,
                font={"family": theme.mono, "size": 10, "color": inks[stage][column]},
            )
            if lens.top[stage][place][0] == lens.answer:
                frame = {"x0": column - 0.48, "x1": column + 0.48, "y0": stage - 0.46, "y1": stage + 0.46}
                figure.add_shape(type="rect", line={"color": theme.helps, "width": 2}, **frame)
    labels = [f"{_short(lens.tokens[place], 12)}<br>{place}" for place in across]
    plain = {"showgrid": False, "ticks": "", "showline": False}
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": 1, "colorscale": colour_scale(theme.wash), "colorbar": bar},
        xaxis={
            **plain,
            "tickvals": list(range(len(labels))),
            "ticktext": labels,
            "title": "prompt token and its position",
            "tickfont": {"size": 10},
        },
        yaxis={**plain, "tickvals": list(stages), "ticktext": list(lens.stages), "title": "stream after"},
    )
    remarks = [
        "Each cell: the likeliest next token, were the stream there read by the final norm and unembedding. Colour: "
        f"probability of “{escaped(lens.answer.strip())}”; "
        "framed where it is the likeliest.",
        *([f"The last {last - first} of {length} tokens."] if last - first < length else []),
    ]
    titled(figure, title, remarks, theme, width=WIDTH, height=30 * len(lens.stages) + 70)
    return with_table(figure.update_layout(margin={"b": 70, "l": 70}), lens.to_frame())


def _short(token: str, most: int) -> str:
    text = token.replace("\n", "⏎").strip() or "␣"
    return escaped(text if len(text) <= most else text[: most - 1] + "…")


def _about(lens: LogitLens, stage: int, place: int) -> str:
    best = zip(lens.top[stage][place], lens.probabilities[stage, place].tolist(), strict=True)
    lines = [f"<b>after {lens.stages[stage]}</b>, at {escaped(lens.tokens[place].strip())} ({place})"]
    lines += [f"{escaped(token)} {value:.3f}" for token, value in best]
    return "<br>".join([*lines, f"p({escaped(lens.answer.strip())}) {float(lens.of_answer[stage, place]):.3g}"])


def lens_curves(
    scores: Mapping[str, Scores], *, theme: Theme = LIGHT, title: str = "Logit lens at the last token"
) -> go.Figure:
    """A line a model: the mean of [stage example] scores from `lens_scores` at each stage, with 95 % intervals over
    prompts.

    The x axis is the share of the model's depth, so that models of different depth can be compared; hovering names the
    layer. Errors: `InputError` for no scores, scores over other axes, or of different units.
    """
    if not scores or any(part.axes != ("stage", "example") for part in scores.values()):
        raise InputError(
            "lens curves need scores over (stage, example) of at least one model; make them with `lens_scores`."
        )
    units = {part.unit for part in scores.values()}
    if len(units) > 1:
        raise InputError(f"one axis can't show {' and '.join(sorted(units))}; measure all models alike.")
    figure, frames = go.Figure(), []
    for place, (name, part) in enumerate(scores.items()):
        frame = part.to_frame()
        frames.append(frame.assign(model=name))
        _curve(figure, name, frame, theme.categories[place % len(theme.categories)])
    figure.update_layout(
        xaxis={"title": "depth (0: embedding, 1: the model's prediction)", "range": (-0.02, 1.02)},
        yaxis={"title": next(iter(units))},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )
    remark = "What each layer's stream would predict if it were read at once. Bands: 95 % intervals over prompts."
    return with_table(
        titled(figure, title, [remark], theme, width=WIDTH, height=380, above=26), pd.concat(frames, ignore_index=True)
    )


def _curve(figure: go.Figure, name: str, frame: pd.DataFrame, colour: str) -> None:
    depth = [place / (len(frame) - 1) for place in range(len(frame))]
    band = {
        "x": [*depth, *depth[::-1]],
        "y": [*frame["high"], *frame["low"][::-1]],
        "fill": "toself",
        "fillcolor": faint(colour),
    }
    figure.add_scatter(
        mode="lines", line={"width": 0}, hoverinfo="skip", showlegend=False, name=f"{name}: interval", **band
    )
    about = [
        f"<b>{escaped(name)}</b> after {stage}<br>{mean:.4g}"
        for stage, mean in zip(frame["stage"], frame["mean"], strict=True)
    ]
    figure.add_scatter(
        x=depth,
        y=frame["mean"].tolist(),
        mode="lines+markers",
        name=escaped(name),
        hoverinfo="text",
        hovertext=about,
        line={"color": colour, "width": 2.4},
        marker={"size": 7},
    )
