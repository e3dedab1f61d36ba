"""Which student head is matched to which teacher head, and how alike each pair's activations are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from plotly import graph_objects as go

from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.matching import HeadMap, Match
from workbench.matching.match import Matching
from workbench.matching.pair_cka import PairCka
from workbench.plots.export import with_table
from workbench.plots.theme import LIGHT, Theme, colour_scale, escaped, titled
from workbench.values.display import plain
from workbench.values.refs import Head

Ckas = Mapping[tuple[Head, Head], PairCka]
ROW, WIDTH, WIDE = 28, 720, 900
"""Pixels from head to head, and across a figure of one panel or two."""


def matching(
    head_map: HeadMap,
    *,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    ckas: Sequence[PairCka] | None = None,
    theme: Theme = LIGHT,
    title: str = "Matched heads",
) -> go.Figure:
    """Student heads on the left, teacher heads on the right (low layers at the bottom), a link for each match.

    A link's colour is the CKA of the pair (0 to 1; grey where not measured), dashed where it is no higher than the
    highest with prompts shuffled. The point on each link says distance and margin (in the unit of the impacts) and CKA
    with its floor. Teacher heads without a student are open. Errors: `InputError` for the CKA of a pair that is not in
    the map.
    """
    panel = Panel(head_map=head_map, ours=student_circuit, theirs=teacher_circuit, ckas=_known(head_map, ckas or ()))
    figure = _drawn([("", panel)], theme)
    return with_table(_finished(figure, [panel], title, theme, width=WIDTH), _frame([("", panel)]))


def matches(matched: Matching, *, theme: Theme = LIGHT, title: str = "Matched heads") -> go.Figure:
    """Which teacher head each student head goes to, and the CKA of each pair: what `match` returned. As `matching`."""
    if not isinstance(matched, Matching):
        raise InputError(
            "this draws what `match` returns; for a bare HeadMap give its circuits to `head_maps.matching`."
        )
    return matching(
        matched.head_map,
        student_circuit=matched.ours,
        teacher_circuit=matched.theirs,
        ckas=matched.ckas,
        theme=theme,
        title=title,
    )


def matching_change(
    head_map: HeadMap,
    *,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    before: Sequence[PairCka],
    after: Sequence[PairCka],
    theme: Theme = LIGHT,
    title: str = "Matched heads before and after training",
) -> go.Figure:
    """The same matches twice on one colour scale: links coloured by the pairs' CKA before training (left) and after it
    (right). As `matching`.

    Errors: `InputError` for the CKA of a pair that is not in the map.
    """
    named = [
        (name, Panel(head_map=head_map, ours=student_circuit, theirs=teacher_circuit, ckas=_known(head_map, ckas)))
        for name, ckas in (("before", before), ("after", after))
    ]
    figure = _drawn(named, theme)
    finished = _finished(figure, [panel for _, panel in named], title, theme, width=WIDE)
    return with_table(finished, _frame(named))


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One drawing of a head map."""

    head_map: HeadMap
    ours: Circuit
    theirs: Circuit
    ckas: Ckas

    @property
    def students(self) -> list[Head]:
        """All heads of the left column, low layers first."""
        return sorted({*self.ours.heads, *(match.student for match in self.head_map.matches)})

    @property
    def teachers(self) -> list[Head]:
        """All heads of the right column, low layers first."""
        return sorted({*self.theirs.heads, *self.head_map.teacher_heads})


def _drawn(named: Sequence[tuple[str, Panel]], theme: Theme) -> go.Figure:
    figure = go.Figure(layout={"coloraxis": _colour_axis(theme)})
    hidden = {"showgrid": False, "showticklabels": False, "showline": False, "ticks": ""}
    for place, (name, panel) in enumerate(named):
        number = "" if place == 0 else str(place + 1)
        axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        left, right = _heights(panel.students), _heights(panel.teachers)
        matches = panel.head_map.matches
        for match in matches:
            _link(
                figure,
                left[match.student],
                right[match.teacher],
                match,
                panel.ckas.get((match.student, match.teacher)),
                theme,
                axes,
            )
        _points(
            figure, [(left[match.student], right[match.teacher]) for match in matches], matches, panel.ckas, theme, axes
        )
        _column(figure, "student", left, panel.ours, {match.student for match in matches}, theme, axes, name)
        _column(figure, "teacher", right, panel.theirs, set(panel.head_map.teacher_heads), theme, axes, "")
        edge = 0.42 if len(named) == 1 else 0.55
        across = {
            "range": (-edge, 1 + edge),
            "domain": (place / len(named), (place + 1) / len(named)),
            "anchor": axes["yaxis"],
        }
        figure.update_layout(
            {
                f"xaxis{number}": hidden | across,
                f"yaxis{number}": hidden | {"range": (-0.04, 1.04), "anchor": axes["xaxis"]},
            }
        )
    return figure


def _finished(figure: go.Figure, panels: Sequence[Panel], title: str, theme: Theme, *, width: int) -> go.Figure:
    figure.update_layout(showlegend=False, margin={"l": 20, "r": 20, "b": 24})
    first = panels[0]
    height = max(220, ROW * max(len(first.students), len(first.teachers)))
    known = {pair: cka for panel in panels for pair, cka in panel.ckas.items()}
    remarks = _remarks(first.head_map, known, first.teachers)
    if len(panels) > 1 and all(panel.ckas for panel in panels):
        means = [sum(cka.cka for cka in panel.ckas.values()) / len(panel.ckas) for panel in panels]
        remarks.append(f"Mean CKA {means[0]:.2f} before, {means[1]:.2f} after.")
    return titled(
        figure, title, remarks, theme, width=width, height=height + 24, above=24 * (1 if len(panels) == 1 else 2)
    )


def _frame(named: Sequence[tuple[str, Panel]]) -> pd.DataFrame:
    rows = []
    for name, panel in named:
        for match in panel.head_map.matches:
            cka = panel.ckas.get((match.student, match.teacher))
            row: dict[str, object] = {
                "student": str(match.student),
                "teacher": str(match.teacher),
                "distance": match.distance,
                "margin": match.margin,
            }
            row |= {field: getattr(cka, field) if cka else None for field in ("cka", "floor", "floor_high", "rows")}
            rows.append({"when": name, **row} if name else row)
    return pd.DataFrame(rows)


def _known(head_map: HeadMap, ckas: Sequence[PairCka]) -> Ckas:
    known = {(cka.pair.student, cka.pair.teacher): cka for cka in ckas}
    strange = [str(cka.pair) for pair, cka in known.items() if pair not in set(head_map.pairs)]
    if strange:
        raise InputError(
            f"there is a CKA of {', '.join(strange)}, which the head map does not pair; measure the CKA of this map's "
            "pairs."
        )
    return known


def _heights(heads: Sequence[Head]) -> dict[Head, float]:
    """Evenly from 0 to 1 in order; a single head stands in the middle."""
    return {head: place / (len(heads) - 1) if len(heads) > 1 else 0.5 for place, head in enumerate(heads)}


def _colour_axis(theme: Theme) -> dict[str, object]:
    bar = {
        "title": {"text": "CKA", "side": "top"},
        "thickness": 14,
        "outlinewidth": 0,
        "tickvals": [0, 0.25, 0.5, 0.75, 1],
        "len": 0.8,
    }
    return {"cmin": 0, "cmax": 1, "colorscale": colour_scale(theme.sequential), "colorbar": bar}


def _link(
    figure: go.Figure, low: float, high: float, match: Match, cka: PairCka | None, theme: Theme, axes: Mapping[str, str]
) -> None:
    """A straight line; its colour is read off the scale here, because plotly gives a line one fixed colour."""
    colour = shade(cka.cka, theme.sequential) if cka else theme.missing
    dash = "dash" if cka and at_floor(cka) else "solid"
    name = f"{match.student}~{match.teacher}"
    figure.add_scatter(
        x=(0, 1),
        y=(low, high),
        mode="lines",
        line={"color": colour, "width": 2.5, "dash": dash},
        hoverinfo="skip",
        name=name,
        **axes,
    )


def at_floor(cka: PairCka) -> bool:
    """Whether a pair is no more alike than the same rows with prompts shuffled."""
    return cka.cka <= cka.floor_high


def shade(share: float, colours: Sequence[str]) -> str:
    """The colour at a share from 0 to 1 (held inside) of evenly spaced `#rrggbb` colours, as plotly's colour bar mixes
    them."""
    place = min(1.0, max(0.0, share)) * (len(colours) - 1)
    below = min(int(place), len(colours) - 2)
    pairs = [(int(colours[below][at : at + 2], 16), int(colours[below + 1][at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * (place - below)):02x}" for a, b in pairs)


def _points(
    figure: go.Figure,
    ends: Sequence[tuple[float, float]],
    matches: Sequence[Match],
    known: Ckas,
    theme: Theme,
    axes: Mapping[str, str],
) -> None:
    """A point near the middle of each link to hover on."""
    places = _apart(ends)
    pairs = [known.get((match.student, match.teacher)) for match in matches]
    for name, shown in (("CKA", [bool(pair) for pair in pairs]), ("CKA not measured", [not pair for pair in pairs])):
        chosen = [at for at, yes in enumerate(shown) if yes]
        ckas = [pair.cka for at in chosen if (pair := pairs[at]) is not None]
        colour = {"color": ckas, "coloraxis": "coloraxis"} if name == "CKA" else {"color": theme.missing}
        if chosen:
            figure.add_scatter(
                x=[places[at][0] for at in chosen],
                y=[places[at][1] for at in chosen],
                mode="markers",
                name=name,
                hoverinfo="text",
                hovertext=[_about(matches[at], pairs[at]) for at in chosen],
                marker={"size": 9, "line": {"color": theme.background, "width": 1}, **colour},
                **axes,
            )


def _apart(ends: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A point on each link, at its middle unless another link's point is there."""
    taken: list[tuple[float, float]] = []
    for low, high in ends:
        options = [(share, low + (high - low) * share) for share in (0.5, 0.44, 0.56, 0.38, 0.62, 0.32, 0.68)]
        free = [(x, y) for x, y in options if all(abs(x - a) > 0.03 or abs(y - b) > 0.03 for a, b in taken)]
        taken.append((free or options)[0])
    return taken


def _about(match: Match, cka: PairCka | None) -> str:
    lines = [f"<b>{match.student} → {match.teacher}</b>"]
    lines.append("distance not measured (a control)" if match.distance is None else f"distance {match.distance:.4g}")
    if match.margin is not None:
        lines.append(
            "margin 0: a tie, chosen by order" if match.margin == 0 else f"margin to the runner-up {match.margin:.4g}"
        )
    if cka is None:
        return "<br>".join([*lines, "CKA not measured"])
    return "<br>".join(
        [
            *lines,
            f"CKA {cka.cka:.3f}, floor {plain(cka.floor, 3)} (highest {plain(cka.floor_high, 3)}) with prompts "
            "shuffled",
            f"{cka.rows} rows",
        ]
    )


def _column(
    figure: go.Figure,
    side: str,
    heights: Mapping[Head, float],
    circuit: Circuit,
    matched: set[Head],
    theme: Theme,
    axes: Mapping[str, str],
    above: str,
) -> None:
    x, position = (0.0, "middle left") if side == "student" else (1.0, "middle right")
    labels = [_label(head, circuit, side) for head in heights]
    figure.add_scatter(
        x=[x] * len(heights),
        y=list(heights.values()),
        mode="markers+text",
        text=[f" {label} " for label in labels],
        textposition=position,
        name=f"{side} heads",
        cliponaxis=False,
        marker={
            "size": 11,
            "color": [theme.ink if head in matched else theme.background for head in heights],
            "line": {"color": theme.ink, "width": 1.5},
        },
        hoverinfo="text",
        hovertext=[
            f"{side} {label}{'' if head in matched else ': unmatched'}"
            for head, label in zip(heights, labels, strict=True)
        ],
        **axes,
    )
    name = f"{above} training<br><b>{side}</b>" if above else f"<b>{side}</b>"
    place = {
        "xref": axes["xaxis"],
        "yref": f"{axes['yaxis']} domain",
        "yanchor": "bottom",
        "yshift": 4,
        "xanchor": "right" if x == 0 else "left",
    }
    figure.add_annotation(x=x, y=1, text=name, showarrow=False, align="left", **place)


def _label(head: Head, circuit: Circuit, side: str) -> str:
    role = circuit.role_of(head)
    return f"{head} · {escaped(role)}" if role else f"{head} (outside the circuit)"


def _remarks(head_map: HeadMap, known: Ckas, theirs: Sequence[Head]) -> list[str]:
    used = f"{len(head_map.teacher_heads)} of {len(theirs)} teacher heads in use"
    ties = f"; {head_map.ties} tie{'' if head_map.ties == 1 else 's'}" if head_map.ties else ""
    remarks = [
        f"Rule {head_map.rule.replace('_', ' ')}, {'one to one' if head_map.one_to_one else 'many to one'}: "
        f"{len(head_map.matches)} student heads, {used}{ties}."
    ]
    marks = [
        "Open circle: no student head." if len(head_map.teacher_heads) < len(theirs) else "",
        "Dashed: CKA no higher than with prompts shuffled." if any(map(at_floor, known.values())) else "",
    ]
    marks.append(
        ""
        if head_map.stability is None
        else f"Again on resampled prompts: {head_map.stability:.0%} of matches; {head_map.within_noise} within noise."
    )
    marks.append("Grey: CKA not measured." if len(known) < len(head_map.matches) else "")
    return [*remarks, *([" ".join(filter(None, marks))] if any(marks) else [])]
