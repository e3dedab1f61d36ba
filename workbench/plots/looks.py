"""Where a circuit's heads look: members down, named positions across, attention as numbers and colour."""

import pandas as pd
from plotly import graph_objects as go

from workbench.errors import InputError
from workbench.plots.export import with_table
from workbench.plots.theme import LIGHT, Theme, colour_scale, escaped, titled
from workbench.values.scores import Scores

WIDTH, ROW = 820, 26
"""Pixels across, and for a member."""


def looks_figure(scores: Scores, *, theme: Theme = LIGHT, title: str = "Where the circuit's heads look") -> go.Figure:
    """The mean attention of `circuits.looks.attention_to_positions`, from 0 to 1. Errors: `InputError` for other
    scores."""
    if scores.axes != ("member", "position", "example"):
        raise InputError(
            f"this figure needs scores over (member, position, example), not {scores.axes}; make them with "
            "`attention_to_positions`."
        )
    members, positions = scores.labels["member"], [name.replace("_", " ") for name in scores.labels["position"]]
    means, errors = scores.mean().double(), scores.standard_error().double()
    about = [
        [
            f"<b>{member}</b><br>looks at {position}<br>{means[row, column]:.3f} (standard error "
            f"{errors[row, column]:.3f})"
            for column, position in enumerate(positions)
        ]
        for row, member in enumerate(members)
    ]
    figure = go.Figure()
    figure.add_heatmap(
        z=means.tolist(),
        x=positions,
        y=list(range(len(members))),
        zmin=0,
        zmax=1,
        colorscale=colour_scale(theme.wash),
        xgap=2,
        ygap=2,
        hoverinfo="text",
        hovertext=about,
        texttemplate="%{z:.2f}",
        textfont={"size": 11},
        colorbar={"title": {"text": "attention", "side": "top"}, "thickness": 12, "outlinewidth": 0},
    )
    figure.update_yaxes(
        tickvals=list(range(len(members))),
        ticktext=list(map(escaped, members)),
        autorange="reversed",
        showgrid=False,
        ticks="",
        automargin=True,
    )
    figure.update_xaxes(title="token looked at", showgrid=False, ticks="")
    remark = (
        "Down: heads in their roles, at the token where they act. Across: the tokens looked at. Mean over "
        f"{scores.values.shape[-1]} prompts; the rest to 1 has no name."
    )
    titled(figure, title, [remark], theme, width=WIDTH, height=190 + ROW * len(members))
    rows = [
        (member, position, means[r, c].item(), errors[r, c].item())
        for r, member in enumerate(members)
        for c, position in enumerate(positions)
    ]
    return with_table(figure, pd.DataFrame(rows, columns=["member", "position", "attention", "standard_error"]))
