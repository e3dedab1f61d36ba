"""What a state needs to be shown: the parts to compute, what is looked at first coming first, and what they say once
they are there.

A part's key holds all that its value depends on, so whatever has been seen before is there at once.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

from workbench.explorer import view
from workbench.explorer.labels import METHODS
from workbench.explorer.material import key_of
from workbench.explorer.state import Side, State
from workbench.explorer.subject import LISTED, Subject, nearest_heads
from workbench.explorer.worker import Outcome, Part
from workbench.matching import HeadMap
from workbench.values.refs import Head
from workbench.values.scores import Scores

Subjects = Mapping[Side, Subject]
Key = tuple[Hashable, ...]
Known = Callable[[Key], Outcome | None]
LISTED_READS, LISTED_SHARES = 8, 14
"""How many neighbours of a head, and how many direct shares, are listed."""


def parts(state: State, subjects: Subjects) -> list[Part]:
    """Everything in view, the model in view first."""
    focus, others = subjects[state.side], [subject for side, subject in subjects.items() if side != state.side]
    wanted: list[Part] = [prediction_part(state, focus), map_part(state, focus)]
    wanted += [] if state.head is None else look_parts(state, focus, state.head)
    wanted += [attribution_part(state, focus), *circuit_parts(state, focus)]
    for subject in others:
        wanted += [prediction_part(state, subject), map_part(state, subject)]
        wanted += [*circuit_parts(state, subject)]
    if state.compared:
        wanted += [random_part(state, focus)]
    if state.head is not None:
        wanted += [*partner_parts(state, subjects)]
        wanted += [*path_parts(state, focus, state.head)]
    return wanted


def prediction_part(state: State, subject: Subject) -> Part:
    """Tokens, predictions, metrics."""
    pair = state.pair
    return Part(
        key=("predictions", subject.side, key_of(pair)),
        label=f"{subject.side}: predictions",
        run=lambda: subject.predictions(pair),
    )


def map_part(state: State, subject: Subject) -> Part:
    """The heat map."""
    over = LISTED if state.average else key_of(state.pair)
    key = ("map", subject.side, over, state.method, state.metric, state.acts)
    return Part(key=key, label=f"{subject.side}: {METHODS[state.method].title}", run=lambda: subject.heat_map(state))


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
            key=("report on", side, outside, circuit.members, key_of(pair)),
            label=f"{side}: circuit on this pair",
            run=lambda: view.of_report(subject.report_on(pair, circuit, outside)),
        ),
        Part(
            key=("report", side, outside, circuit.members),
            label=f"{side}: circuit on the test prompts",
            run=lambda: view.of_report(subject.report(circuit, outside)),
        ),
    ]


def random_part(state: State, subject: Subject) -> Part:
    """Random circuits of equal size, as a control."""
    side, circuit, outside = subject.side, state.circuits[subject.side], state.outside
    return Part(
        key=("random", side, outside, circuit.members),
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


def shown(state: State, subjects: Subjects, known: Known, head_map: HeadMap | None) -> dict[str, Any]:
    """What is known of everything in view, by its place on the page; what is not there yet is null, what failed says
    why."""
    return {
        "prompts": {side: _said(known, prediction_part(state, subject)) for side, subject in subjects.items()},
        "maps": _maps(state, subjects, known),
        "circuits": {side: _circuit(state, subject, known) for side, subject in subjects.items()},
        "attribution": _said(
            known,
            attribution_part(state, subjects[state.side]),
            lambda found: view.of_attribution(found, LISTED_SHARES),
        ),
        "head": None if state.head is None else _head(state, subjects, state.head, known, head_map),
    }


def _said(known: Known, part: Part, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """A part's value as it is read, {"error": ...} where it failed, None while it is not there."""
    outcome = known(part.key)
    if outcome is None:
        return None
    return {"error": outcome.error} if outcome.error is not None else read(outcome.value)


def _maps(state: State, subjects: Subjects, known: Known) -> dict[str, Any]:
    order = METHODS[state.method].order
    panels = {
        side: _said(known, map_part(state, subject), partial(view.of_map, order=order))
        for side, subject in subjects.items()
    }
    measured = [panel for panel in panels.values() if panel and "error" not in panel]
    return {"panels": panels, "largest": view.common_scale(measured), "order": order}


def _circuit(state: State, subject: Subject, known: Known) -> dict[str, Any]:
    on_pair, on_prompts = circuit_parts(state, subject)
    shown = {
        "on_pair": _said(known, on_pair),
        "on_prompts": _said(known, on_prompts),
        "random": _said(known, random_part(state, subject)),
    }
    return {**view.of_circuit(state.circuits[subject.side]), **shown}


def _head(state: State, subjects: Subjects, head: Head, known: Known, head_map: HeadMap | None) -> dict[str, Any]:
    subject = subjects[state.side]
    attention, impacts = look_parts(state, subject, head)
    reads, singly, feeds = path_parts(state, subject, head)
    each = known(singly.key)
    each_input = {} if each is None or each.error is not None else each.value
    scores = known(map_part(state, subject).key)
    return {
        "head": head,
        "side": state.side,
        "score": None
        if scores is None or scores.error is not None
        else float(scores.value.mean()[head.layer, head.index]),
        "member": head in state.circuits[state.side].heads,
        "attention": _said(known, attention),
        "share": _said(known, attribution_part(state, subject), lambda found: view.of_share(found, head)),
        "impacts": _said(known, impacts),
        "reads": _said(known, reads, lambda together: view.of_reads(together, each_input, LISTED_READS)),
        "feeds": _said(known, feeds),
        "partners": _partners(state, subjects, head, known, head_map),
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
