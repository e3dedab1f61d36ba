"""What a state needs to be shown: the parts to compute, what is looked at first coming first, and what they say once
they are there.

A part's key holds all that its value depends on, so whatever has been seen before is there at once.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from workbench.circuits.circuit import Circuit
from workbench.explorer import view
from workbench.explorer.labels import METHODS
from workbench.explorer.library import Source
from workbench.explorer.material import key_of
from workbench.explorer.state import Beside, Side, State
from workbench.explorer.subject import LISTED, Subject, nearest_heads
from workbench.explorer.worker import Outcome, Part
from workbench.matching import HeadMap
from workbench.values.refs import Head
from workbench.values.scores import Scores

Subjects = Mapping[Side, Subject]
Key = tuple[Hashable, ...]
Known = Callable[[Key], Outcome | None]
MOST_STEPS = 24
"""How many circuits along a path are evaluated."""
LISTED_READS, LISTED_SHARES = 8, 14
"""How many neighbours of a head, and how many direct shares, are listed."""


def parts(state: State, subjects: Subjects, sources: Mapping[str, Source]) -> list[Part]:
    """Everything in view, the model in view first."""
    focus, others = subjects[state.side], [subject for side, subject in subjects.items() if side != state.side]
    first, *rest = map_parts(state, focus)
    guesses = estimate_parts(state, focus)
    look = [] if state.head is None else look_parts(state, focus, state.head)
    wanted: list[Part] = [*guesses[:1], prediction_part(state, focus), *look[:1], *guesses[1:], first, *look[1:]]
    wanted += [thumbnail_part(state, focus), *beside_parts(state, subjects)]
    wanted += [*rest, attribution_part(state, focus), *circuit_parts(state, focus)]
    for subject in others:
        wanted += [*estimate_parts(state, subject), prediction_part(state, subject), *map_parts(state, subject)]
        wanted += [*circuit_parts(state, subject)]
    if state.compared:
        wanted += [random_part(state, focus)]
    for subject in subjects.values():
        wanted += group_parts(state, subject)
    if state.head is not None:
        wanted += [*partner_parts(state, subjects)]
        wanted += [*path_parts(state, focus, state.head)]
    return [*wanted, *(part for side in state.paths for part in step_parts(state, subjects[side], sources))]


def prediction_part(state: State, subject: Subject) -> Part:
    """Tokens, predictions, metrics."""
    pair = state.pair
    return Part(
        key=("predictions", subject.side, key_of(pair)),
        label=f"{subject.side}: predictions",
        run=lambda: subject.predictions(pair),
    )


def map_parts(state: State, subject: Subject) -> list[Part]:
    """The heat map: in one piece, or in several where the model is large."""
    over = LISTED if state.average else key_of(state.pair)
    key, label = ("map", subject.side, over, state.method, state.metric, state.acts), METHODS[state.method].title
    if not subject.large:
        return [Part(key=key, label=f"{subject.side}: {label}", run=lambda: subject.heat_map(state))]
    total = subject.shape[0] * subject.shape[1]
    return [
        Part(
            key=(*key, piece.stop),
            label=f"{subject.side}: {label}, heads {piece.start + 1} to {piece.stop} of {total}",
            run=partial(subject.piece_of_map, state, piece),
        )
        for piece in subject.pieces
    ]


def estimate_parts(state: State, subject: Subject) -> list[Part]:
    """What is estimated before it is measured, of a large model: its map; of the head in view also its ablation and its
    paths."""
    if not subject.large:
        return []
    side, pair, over, metric = subject.side, state.pair, LISTED if state.average else key_of(state.pair), state.metric
    wanted = [
        Part(
            key=("map estimate", side, over, state.method, metric, state.acts),
            label=f"{side}: first estimate",
            run=lambda: subject.estimated_map(state),
        )
    ]
    if state.head is None or state.side != side:
        return wanted
    return [
        *wanted,
        Part(
            key=("impact estimates", side, key_of(pair), metric, state.position),
            label=f"{side}: first estimate of ablations",
            run=lambda: subject.impact_estimates(pair, metric=metric, position=state.position),
        ),
        Part(
            key=("edge estimates", side, key_of(pair), metric),
            label=f"{side}: first estimate of paths",
            run=lambda: subject.edge_estimates(pair, metric=metric),
        ),
    ]


def map_scores(state: State, subject: Subject, known: Known) -> tuple[Outcome | None, list[list[bool]] | None]:
    """The heat map as far as it is known, and which heads are estimated as yet (None: no head is)."""
    outcomes = [known(part.key) for part in map_parts(state, subject)]
    if not subject.large:
        return outcomes[0], None
    failed = next((outcome for outcome in outcomes if outcome is not None and outcome.error is not None), None)
    estimate = known(estimate_parts(state, subject)[0].key)
    if failed is not None:
        return failed, None
    pieces = [outcome.value for outcome in outcomes if outcome is not None]
    if estimate is None or (estimate.error is not None and not pieces):
        return estimate, None
    if estimate.error is None:
        pieces = [estimate.value, *pieces]
    values = pieces[0].values
    for piece in pieces[1:]:
        values = torch.where(piece.values.isnan(), values, piece.values)
    exact = torch.zeros(subject.shape, dtype=torch.bool)
    for outcome in outcomes:
        if outcome is not None:
            exact |= ~outcome.value.values.isnan().all(-1)
    merged = replace(pieces[-1], values=values)
    return Outcome(value=merged), None if bool(exact.all()) else (~exact).tolist()


def thumbnail_part(state: State, subject: Subject) -> Part:
    """Attention of all heads of a layer, small."""
    pair, layer, weighted = state.pair, min(state.layer_shown, subject.shape[0] - 1), state.weighted
    return Part(
        key=("thumbnails", subject.side, key_of(pair), layer, weighted),
        label=f"{subject.side}: attention of layer {layer}",
        run=lambda: view.of_thumbnails(subject.thumbnails(pair, layer, weighted=weighted)),
    )


def beside_parts(state: State, subjects: Subjects) -> list[Part]:
    """What is compared: attention, ablation and direct share of a second head or pair."""
    if state.beside is None:
        return []
    other = beside_state(state, state.beside)
    subject = subjects[state.beside.side]
    return [*look_parts(other, subject, state.beside.head), attribution_part(other, subject)]


def beside_state(state: State, beside: Beside) -> State:
    """The state in which what is beside would be in view."""
    position = state.position if state.position in {"all", "last", *beside.pair.positions} else "all"
    return replace(state, pair=beside.pair, picked=beside.picked, side=beside.side, head=beside.head, position=position)


def group_parts(state: State, subject: Subject) -> list[Part]:
    """The joint effect of each role of the circuit."""
    side, circuit, outside, metric = subject.side, state.circuits[subject.side], state.outside, state.metric
    return [
        Part(
            key=("group", side, outside, metric, tuple(m for m in circuit.members if m.role == role)),
            label=f"{side}: {role} together",
            run=partial(subject.joint, circuit, role, outside, metric=metric),
        )
        for role in circuit.roles
    ]


def step_parts(state: State, subject: Subject, sources: Mapping[str, Source]) -> list[Part]:
    """The circuits along the path, the ends and the middle first, at most `MOST_STEPS` of them."""
    source = sources.get(state.paths.get(subject.side, ""))
    if source is None or not source.ranking:
        return []
    return [
        report_part(state, subject, source.first(size))
        for size in sorted(steps_of(len(source.ranking)), key=lambda size: size % 4 != 0)
    ]


def steps_of(heads: int) -> list[int]:
    """The sizes along a path that are evaluated."""
    count = min(heads, MOST_STEPS)
    return sorted({round(heads * step / count) for step in range(count + 1)})


def look_parts(state: State, subject: Subject, head: Head) -> list[Part]:
    """What is quickly seen of a head: attention, ablation impacts."""
    side, pair, over = subject.side, state.pair, key_of(state.pair)
    impacts = ("impacts", side, over, head, state.metric, state.position)
    return [
        Part(
            key=("attention", side, over, head, state.weighted),
            label=f"{head}: attention",
            run=lambda: view.of_attention(subject.attention(pair, head, weighted=state.weighted)),
        ),
        Part(
            key=impacts,
            label=f"{head}: ablation",
            run=lambda: subject.impacts(pair, head, metric=state.metric, position=state.position),
        ),
    ]


def attribution_part(state: State, subject: Subject) -> Part:
    """What every head and MLP writes to the logit difference."""
    pair = state.pair
    return Part(
        key=("attribution", subject.side, key_of(pair)),
        label=f"{subject.side}: direct logit attribution",
        run=lambda: subject.attribution(pair),
    )


def path_parts(state: State, subject: Subject, head: Head) -> tuple[Part, Part, Part]:
    """Who a head reads from (through q, k and v together, and through each) and who it feeds."""
    side, pair, over, metric = subject.side, state.pair, key_of(state.pair), state.metric
    reads = Part(
        key=("reads", side, over, head, metric),
        label=f"{head}: who it reads from",
        run=lambda: subject.reads(pair, head, metric=metric),
    )
    singly = Part(
        key=("reads singly", side, over, head, metric),
        label=f"{head}: through q, k, v",
        run=lambda: subject.reads_singly(pair, head, metric=metric, count=LISTED_READS),
    )
    feeds = Part(
        key=("feeds", side, over, head, metric),
        label=f"{head}: who it feeds",
        run=lambda: view.of_feeds(subject.feeds(pair, head, metric=metric), LISTED_READS),
    )
    return reads, singly, feeds


def circuit_parts(state: State, subject: Subject) -> list[Part]:
    """The circuit alone: on the evaluated prompts, and on the pair in view."""
    side, circuit, outside, pair = subject.side, state.circuits[subject.side], state.outside, state.pair
    return [
        Part(
            key=("report on", side, outside, tuple(circuit.scope.items()), key_of(pair)),
            label=f"{side}: circuit on this pair",
            run=lambda: view.of_report(subject.report_on(pair, circuit, outside)),
        ),
        report_part(state, subject, circuit),
    ]


def report_part(state: State, subject: Subject, circuit: Circuit) -> Part:
    """A circuit alone on the evaluated prompts."""
    outside = state.outside
    return Part(
        key=("report", subject.side, outside, tuple(circuit.scope.items())),
        label=f"{subject.side}: {len(circuit.heads)} heads on the test prompts",
        run=lambda: view.of_report(subject.report(circuit, outside)),
    )


def random_part(state: State, subject: Subject) -> Part:
    """Random circuits of equal size, as a control."""
    side, circuit, outside = subject.side, state.circuits[subject.side], state.outside
    return Part(
        key=("random", side, outside, tuple(circuit.scope.items())),
        label=f"{side}: random circuits",
        run=lambda: view.of_report(subject.report(circuit, outside, random_circuits=5)),
    )


def partner_parts(state: State, subjects: Subjects) -> list[Part]:
    """Similarity of all heads of the teacher with those of the model in view (of each student, when the teacher is in
    view)."""
    students: list[Side] = [side for side in subjects if side != "teacher" and state.side in ("teacher", side)]
    teacher = subjects["teacher"]
    return [
        Part(
            key=("similarity", side),
            label=f"{side}: similarity of heads",
            run=partial(subjects[side].similarity, teacher),
        )
        for side in students
    ]


def shown(
    state: State, subjects: Subjects, known: Known, head_map: HeadMap | None, sources: Mapping[str, Source]
) -> dict[str, Any]:
    """What is known of everything in view, by its place on the page; what is not there yet is null, what failed says
    why."""
    return {
        "prompts": {side: _said(known, prediction_part(state, subject)) for side, subject in subjects.items()},
        "maps": _maps(state, subjects, known),
        "circuits": {side: _circuit(state, subject, known, sources) for side, subject in subjects.items()},
        "thumbnails": _thumbnails(state, subjects[state.side], known),
        "beside": None if state.beside is None else _beside(state, subjects, state.beside, known),
        "matches": _matches(state, head_map),
        "attribution": _said(
            known,
            attribution_part(state, subjects[state.side]),
            lambda found: view.of_attribution(found, LISTED_SHARES),
        ),
        "head": None if state.head is None else _head(state, subjects, state.head, known, head_map),
    }


def _said(known: Known, part: Part, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """A part's value as it is read, {"error": ...} where it failed, None while it is not there."""
    return _read(known(part.key), read)


def _read(outcome: Outcome | None, read: Callable[[Any], Any]) -> Any:
    if outcome is None:
        return None
    return {"error": outcome.error} if outcome.error is not None else read(outcome.value)


def _maps(state: State, subjects: Subjects, known: Known) -> dict[str, Any]:
    order = METHODS[state.method].order
    panels: dict[str, Any] = {}
    for side, subject in subjects.items():
        outcome, estimated = map_scores(state, subject, known)
        panel = _read(outcome, partial(view.of_map, order=order))
        panels[side] = panel if panel is None or "error" in panel else {**panel, "estimated": estimated}
    measured = [panel for panel in panels.values() if panel and "error" not in panel]
    return {"panels": panels, "largest": view.common_scale(measured), "order": order}


def _circuit(state: State, subject: Subject, known: Known, sources: Mapping[str, Source]) -> dict[str, Any]:
    on_pair, on_prompts = circuit_parts(state, subject)
    shown = {
        "on_pair": _said(known, on_pair),
        "on_prompts": _said(known, on_prompts),
        "random": _said(known, random_part(state, subject)),
        "groups": _groups(state, subject, known),
        "path": _path(state, subject, known, sources),
    }
    return {**view.of_circuit(state.circuits[subject.side]), **shown}


def _head(state: State, subjects: Subjects, head: Head, known: Known, head_map: HeadMap | None) -> dict[str, Any]:
    subject = subjects[state.side]
    attention, impacts = look_parts(state, subject, head)
    reads, singly, feeds = path_parts(state, subject, head)
    each = known(singly.key)
    each_input = {} if each is None or each.error is not None else each.value
    scores, estimated = map_scores(state, subject, known)
    return {
        "head": head,
        "side": state.side,
        "score": None
        if scores is None or scores.error is not None
        else float(scores.value.mean()[head.layer, head.index]),
        "estimated": bool(estimated and estimated[head.layer][head.index]),
        "change": _change(state, subjects, head, known),
        "member": head in state.circuits[state.side].heads,
        "attention": _said(known, attention),
        "share": _said(known, attribution_part(state, subject), lambda found: view.of_share(found, head)),
        "impacts": _said(known, impacts),
        "reads": _said(known, reads, lambda together: view.of_reads(together, each_input, LISTED_READS)),
        "feeds": _said(known, feeds),
        "guess": _guess(state, subject, head, known),
        "partners": _partners(state, subjects, head, known, head_map),
    }


def _guess(state: State, subject: Subject, head: Head, known: Known) -> dict[str, Any] | None:
    """Estimates of what is not measured yet, of a large model: ablation, reads, feeds."""
    if not subject.large:
        return None
    _, impacts, edges = estimate_parts(state, subject)
    return {
        "impacts": _said(known, impacts, lambda each: {kind: float(s.at(head).mean()) for kind, s in each.items()}),
        "reads": _said(known, edges, lambda scores: view.of_estimated_reads(scores, head, LISTED_READS)),
        "feeds": _said(known, edges, lambda scores: view.of_estimated_feeds(scores, head, LISTED_READS)),
    }


def _thumbnails(state: State, subject: Subject, known: Known) -> dict[str, Any]:
    """The small pictures of a layer, the strongest head of the heat map first."""
    part, layer = thumbnail_part(state, subject), min(state.layer_shown, subject.shape[0] - 1)
    scores, _ = map_scores(state, subject, known)
    effects = None if scores is None or scores.error is not None else scores.value.mean()[layer]
    order = range(subject.shape[1])
    if effects is not None:
        order = sorted(order, key=lambda index: -abs(float(effects[index].nan_to_num(0.0))))
    heads = [
        {"head": str(Head(layer, index)), "score": None if effects is None else float(effects[index])}
        for index in order
    ]
    return {"layer": layer, "follows": state.layer is None, "heads": heads, "pictures": _said(known, part)}


def _beside(state: State, subjects: Subjects, beside: Beside, known: Known) -> dict[str, Any]:
    """The second head or pair, in the same words as the first."""
    other, subject = beside_state(state, beside), subjects[beside.side]
    attention, impacts = look_parts(other, subject, beside.head)
    scores, estimated = map_scores(other, subject, known)
    here = beside.head.layer, beside.head.index
    return {
        "head": beside.head,
        "side": beside.side,
        "picked": beside.picked,
        "clean": beside.pair.clean,
        "same_pair": key_of(beside.pair) == key_of(state.pair),
        "score": None if scores is None or scores.error is not None else float(scores.value.mean()[here]),
        "estimated": bool(estimated and estimated[here[0]][here[1]]),
        "attention": _said(known, attention),
        "impacts": _said(known, impacts),
        "share": _said(known, attribution_part(other, subject), lambda read: view.of_share(read, beside.head)),
    }


def _change(state: State, subjects: Subjects, head: Head, known: Known) -> dict[str, float | None] | None:
    """The score of a head of the student before and after distillation; None where there is no such pair."""
    if state.side == "teacher" or not {"student", "after"} <= set(subjects):
        return None
    scores: dict[str, float | None] = {}
    for side in ("student", "after"):
        outcome, _ = map_scores(state, subjects[side], known)
        inside = head.layer < subjects[side].shape[0] and head.index < subjects[side].shape[1]
        there = outcome is not None and outcome.error is None and inside
        scores[side] = float(outcome.value.mean()[head.layer, head.index]) if there and outcome else None
    return scores


def _matches(state: State, head_map: HeadMap | None) -> dict[str, Any] | None:
    """How many matched pairs there are, and which of them is in view."""
    pairs = [] if head_map is None else list(head_map.pairs)
    if not pairs:
        return None
    at = None if state.side != "teacher" else match_in_view(state, pairs)
    return {"count": len(pairs), "at": at, "rule": head_map.rule if head_map else ""}


def match_in_view(state: State, pairs: Sequence[tuple[Head, Head]]) -> int | None:
    """The place of the matched pair whose two heads are in view."""
    if state.beside is None or state.beside.side == "teacher" or state.head is None:
        return None
    both = (state.beside.head, state.head)
    return pairs.index(both) if both in pairs else None


def _groups(state: State, subject: Subject, known: Known) -> list[dict[str, Any]]:
    circuit = state.circuits[subject.side]
    return [
        {"role": role, "heads": [str(head) for head in heads], "effect": _said(known, part)}
        for (role, heads), part in zip(circuit.roles.items(), group_parts(state, subject), strict=True)
    ]


def _path(state: State, subject: Subject, known: Known, sources: Mapping[str, Source]) -> dict[str, Any] | None:
    """The ranking that the circuit is stepped along: what the search measured, and what is measured here."""
    source = sources.get(state.paths.get(subject.side, ""))
    if source is None:
        return None
    total = len(source.ranking)
    here: list[tuple[int, float | None]] = []
    for size in steps_of(total) if total else []:
        outcome = known(report_part(state, subject, source.first(size)).key)
        if outcome is not None and outcome.error is None:
            here.append((size, outcome.value["faithfulness"]))
    curve = source.curve
    of_search = [] if curve is None else [(size, curve.share(size)) for size in curve.sizes]
    circuit = state.circuits[subject.side]
    size = len(circuit.heads) if set(source.ranking[: len(circuit.heads)]) == set(circuit.heads) else None
    return {
        "source": source.name,
        "heads": total,
        "size": size,
        "chosen": len(source.circuit.heads),
        "next": str(source.ranking[size - 1]) if size else None,
        "here": here,
        "search": of_search,
        "search_prompts": None if curve is None else curve.prompts,
    }


def _partners(
    state: State, subjects: Subjects, head: Head, known: Known, head_map: HeadMap | None
) -> list[dict[str, Any]]:
    """The heads of the other models that are most alike, and the one that the given head map names."""
    partners = []
    for part in partner_parts(state, subjects):
        student = part.key[1]
        other = student if state.side == "teacher" else "teacher"

        def read(similarity: Scores) -> list[tuple[str, float]]:
            return nearest_heads(similarity, head, of="teacher" if state.side == "teacher" else "student")

        partners.append(
            {
                "side": other,
                "nearest": _said(known, part, read),
                "mapped": _mapped(state.side, head, head_map),
                "unit": _said(known, part, lambda each: each.unit),
            }
        )
    return partners


def _mapped(side: Side, head: Head, head_map: HeadMap | None) -> list[str]:
    pairs = head_map.pairs if head_map else ()
    return [
        str(theirs if side != "teacher" else ours)
        for ours, theirs in pairs
        if head == (ours if side != "teacher" else theirs)
    ]
