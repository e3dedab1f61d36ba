"""Where heads look: a small map a head (`attention_maps`), or the prompt itself as text, shaded by what one token looks
at (`attention_text`).

Every cell and token carries (head, query position, key position) as `customdata`, so that a click says what was
clicked.
"""

import math
from collections.abc import Iterator, Sequence

from plotly import graph_objects as go

from workbench.errors import InputError
from workbench.plots.export import with_table
from workbench.plots.theme import LIGHT, Theme, colour_scale, escaped, titled
from workbench.readouts.patterns import AttentionPatterns

WIDTH, LINE, CHARACTER = 820, 22, 7.3
"""Pixels across a figure, from line to line of text, and across a character of it."""
LABELLED = 60
"""Tokens up to which a map names them all, if there is room."""
TEXT_SIZE = 12


def attention_maps(
    patterns: AttentionPatterns, *, columns: int | None = None, theme: Theme = LIGHT, title: str = "Attention patterns"
) -> go.Figure:
    """A map a head: the token that looks downwards, the token looked at across; darker is more. All maps share one
    scale from 0.

    Tokens stand beside the maps as far as there is room (else every second, third, ... with its position); hovering
    names each.
    """
    count, length = len(patterns.heads), len(patterns.tokens)
    across = columns or (1 if count == 1 else 2 if count <= 4 else 3 if count <= 9 else 4)
    labels = _labels(patterns.tokens)
    side = 64 + min(7 * max(map(len, labels)), 90)
    cell = min(560.0, (WIDTH - 90) / across - 24) if across == 1 else (WIDTH - side - 80 - 20 * (across - 1)) / across
    rows, gap = math.ceil(count / across), 34
    plot = (across * cell + 20 * (across - 1), rows * cell + gap * (rows - 1))
    every = max(1, math.ceil(length * 10 / cell))
    ticks = {
        "tickvals": list(range(0, length, every)),
        "ticktext": [escaped(labels[at]) for at in range(0, length, every)],
    }
    ticks |= {
        "tickfont": {"family": theme.mono, "size": 10 if every == 1 else 9},
        "showgrid": False,
        "ticks": "",
        "showline": False,
        "automargin": False,
    }
    figure = go.Figure(layout={"coloraxis": _colour_axis(float(patterns.weights.max()), patterns, theme)})
    for place, head in enumerate(patterns.heads):
        row, column = divmod(place, across)
        x, y = (f"{axis}{place + 1 if place else ''}" for axis in "xy")
        left, top = column * (cell + 20) / plot[0], 1 - row * (cell + gap) / plot[1]
        _map(figure, patterns, place, x, y)
        last_row = place + across >= count
        figure.update_layout(
            {
                x.replace("x", "xaxis"): {
                    **ticks,
                    "domain": (left, min(1.0, left + cell / plot[0])),
                    "anchor": y,
                    "tickangle": 90,
                    "showticklabels": last_row,
                },
                y.replace("y", "yaxis"): {
                    **ticks,
                    "domain": (max(0.0, top - cell / plot[1]), top),
                    "anchor": x,
                    "autorange": "reversed",
                    "showticklabels": column == 0,
                },
            }
        )
        figure.add_annotation(
            text=f"<b>{head}</b>",
            x=0,
            xref=f"{x} domain",
            xanchor="left",
            y=1,
            yref=f"{y} domain",
            yanchor="bottom",
            showarrow=False,
        )
    return with_table(_framed(figure, patterns, title, theme, plot=plot, side=side, every=every), patterns.to_frame())


def _framed(
    figure: go.Figure,
    patterns: AttentionPatterns,
    title: str,
    theme: Theme,
    *,
    plot: tuple[float, float],
    side: int,
    every: int,
) -> go.Figure:
    remarks = ["Down: the token that looks. Across: the token it looks at. " + _about_weights(patterns)]
    if every > 1:
        remarks.append(f"One token in {every} is named; hover for the others.")
    titled(figure, title, remarks, theme, width=WIDTH, height=round(plot[1] + side - 30), above=24)
    return figure.update_layout(margin={"l": side, "r": WIDTH - side - plot[0], "b": side - 30})


def _labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as tick labels: stripped, short, with their position in long prompts."""
    texts = [_visible(token).strip() or "␣" for token in tokens]
    short = [text if len(text) <= 12 else text[:11] + "…" for text in texts]
    return short if len(tokens) <= LABELLED else [f"{text} {place}" for place, text in enumerate(short)]


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥")


def _about_weights(patterns: AttentionPatterns) -> str:
    if patterns.value_weighted:
        return "Colour: attention times the norm of the value after W_O, in units of the residual stream."
    return "Colour: attention probability; a row sums to 1."


def _colour_axis(most: float, patterns: AttentionPatterns, theme: Theme) -> dict[str, object]:
    words = "weighted<br>attention" if patterns.value_weighted else "attention"
    bar = {
        "title": {"text": words, "side": "top"},
        "thickness": 12,
        "outlinewidth": 0,
        "len": 200,
        "lenmode": "pixels",
        "y": 1,
        "yanchor": "top",
    }
    return {"cmin": 0, "cmax": most or 1.0, "colorscale": colour_scale(theme.wash), "colorbar": bar}


def _map(figure: go.Figure, patterns: AttentionPatterns, place: int, x: str, y: str) -> None:
    weights, length, head = patterns.weights[place].tolist(), len(patterns.tokens), str(patterns.heads[place])
    seen = [[weights[query][key] if key <= query else None for key in range(length)] for query in range(length)]
    words = [escaped(_visible(token)) for token in patterns.tokens]
    about = [
        [
            f"<b>{head}</b><br>{words[query]} ({query}) looks at {words[key]} ({key})<br>{weights[query][key]:.3f}"
            if key <= query
            else ""
            for key in range(length)
        ]
        for query in range(length)
    ]
    where = [[[head, query, key] for key in range(length)] for query in range(length)]
    figure.add_heatmap(
        z=seen,
        coloraxis="coloraxis",
        xaxis=x,
        yaxis=y,
        name=head,
        hoverinfo="text",
        hovertext=about,
        customdata=where,
        hoverongaps=False,
        xgap=1 if length <= 40 else 0,
        ygap=1 if length <= 40 else 0,
    )


def attention_text(
    patterns: AttentionPatterns, *, query: int = -1, theme: Theme = LIGHT, title: str = "What a token looks at"
) -> go.Figure:
    """The prompt as text, once a head: each token is shaded by how much the token at `query` (framed; default the last)
    looks at it.

    Made for long prompts: lines wrap, nothing is left out. Tokens after `query`, which it can't see, are muted.
    Errors: `InputError` for a position outside the prompt.
    """
    length = len(patterns.tokens)
    if not -length <= query < length:
        raise InputError(f"position {query} is outside a prompt of {length} tokens.")
    query %= length
    places, lines = _wrapped_tokens(patterns.tokens, (WIDTH - 190) / CHARACTER)
    weights = patterns.weights[:, query]
    figure = go.Figure(layout={"coloraxis": _colour_axis(float(weights.max()), patterns, theme), "barmode": "overlay"})
    pitch = lines + 0.9
    for place, head in enumerate(patterns.heads):
        _block(
            figure,
            patterns,
            place,
            query,
            [(left, width, line + place * pitch) for left, width, line in places],
            theme,
            float(weights.max()) or 1.0,
        )
        figure.add_annotation(
            text=f"<b>{head}</b>", x=0, xref="paper", xanchor="right", xshift=-10, y=place * pitch, showarrow=False
        )
    hidden = {"showgrid": False, "showticklabels": False, "showline": False, "ticks": ""}
    total = pitch * len(patterns.heads)
    figure.update_layout(
        xaxis=hidden | {"range": (0, (WIDTH - 190) / CHARACTER), "fixedrange": True},
        yaxis=hidden | {"range": (total - 0.9, -0.6)},
        showlegend=False,
    )
    asking = _visible(patterns.tokens[query]).strip()
    remarks = [f"Framed: the token that looks, “{asking}” at position {query}. " + _about_weights(patterns)]
    titled(figure, title, remarks, theme, width=WIDTH, height=round(max(total * LINE, 230)) + 20, above=8)
    figure.update_layout(margin={"l": 64, "r": 126, "b": 20})
    return with_table(figure, patterns.to_frame().query("query == @query"))


def _wrapped_tokens(tokens: Sequence[str], most: float) -> tuple[list[tuple[float, float, int]], int]:
    """(left, width, line) of each token in characters and lines, and the number of lines."""
    places: list[tuple[float, float, int]] = []
    left, line = 0.0, 0
    for token in tokens:
        width = max(1, len(_visible(token).strip())) + 0.8
        if left + width > most and left:
            left, line = 0.0, line + 1
        places.append((left, width, line))
        left += width + 0.25
    return places, line + 1


def _block(
    figure: go.Figure,
    patterns: AttentionPatterns,
    place: int,
    query: int,
    spots: Sequence[tuple[float, float, float]],
    theme: Theme,
    most: float,
) -> None:
    """One head's prompt: a bar a token, with its text inside."""
    weights, head = patterns.weights[place, query].tolist(), str(patterns.heads[place])
    inks = [
        theme.muted if key > query else theme.strong_ink if weights[key] > 0.55 * most else theme.ink
        for key in range(len(spots))
    ]
    words = [escaped(_visible(token).strip()) for token in patterns.tokens]
    frames = [2 if key == query else 0 for key in range(len(spots))]
    figure.add_bar(
        orientation="h",
        base=[left for left, _, _ in spots],
        x=[width for _, width, _ in spots],
        y=[line for _, _, line in spots],
        width=0.86,
        text=words,
        textposition="inside",
        insidetextanchor="middle",
        constraintext="none",
        cliponaxis=False,
        name=head,
        textangle=0,
        insidetextfont={"family": theme.mono, "size": TEXT_SIZE, "color": inks},
        hoverinfo="text",
        hovertext=list(_about(patterns, head, query, weights, words)),
        customdata=[[head, query, key] for key in range(len(spots))],
        marker={"color": weights, "coloraxis": "coloraxis", "line": {"width": frames, "color": theme.helps}},
    )


def _about(
    patterns: AttentionPatterns, head: str, query: int, weights: Sequence[float], words: Sequence[str]
) -> Iterator[str]:
    for key, word in enumerate(words):
        seen = f"{weights[key]:.3f}" if key <= query else "comes later"
        yield f"<b>{head}</b><br>{words[query]} ({query}) looks at {word} ({key})<br>{seen}"
