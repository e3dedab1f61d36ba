"""The Python lines that reproduce the view, by the same calls that made it (a test runs them and compares the
numbers)."""

import re
from collections.abc import Iterator

from workbench.circuits.circuit import Circuit
from workbench.explorer.material import PLAIN
from workbench.explorer.state import State
from workbench.explorer.subject import Subject
from workbench.tasks.pairs import Pair

IMPORTS = {
    "islice": "itertools",
    "Circuit, Member": "workbench.circuits.circuit",
    "evaluate_circuit": "workbench.circuits.evaluation",
    "Teacher": "workbench.models.hooked_model",
    "ablate, ablated_logits, plain_logits": "workbench.patching.ablation",
    "counterfactual_outputs, covers, reference_means": "workbench.patching.replacement",
    "activation_patch": "workbench.patching.activation",
    "exact_edges": "workbench.patching.attribution",
    "path_patch": "workbench.patching.path",
    "direct_logit_attribution": "workbench.readouts.logit_attribution",
    "attention_patterns": "workbench.readouts.patterns",
    "metric_named": "workbench.values.metrics",
    "Head, Receiver": "workbench.values.refs",
    "encode, to_dataset": "workbench.tasks.base",
    "Pair": "workbench.tasks.pairs",
    "numbered_pairs": "workbench.tasks.pairs",
    "PromptSettings": "workbench.tasks.prompts",
    "task_named": "workbench.tasks.registry",
    "SharedWords": "workbench.tasks.tokenizers",
    "tokenizer_of": "workbench.tasks.vocabulary",
}
"""Names that the lines may use, and where they live, in the order of the imports."""


def python_lines(state: State, subject: Subject) -> str:
    """A script for the model in view: its heat map, the head in view, its circuit alone."""
    body = "\n".join(
        [*_begin(state, subject), "", *_map(state, subject), *_head(state, subject), "", *_circuit(state, subject)]
    )
    return f"{_imports(body)}\n\n{body}\n"


def _imports(body: str) -> str:
    """One line a module, of those names that the body uses."""
    homes: dict[str, list[str]] = {}
    for names, home in IMPORTS.items():
        used = [name for name in names.split(", ") if re.search(rf"\b{name}[(.\[]", body)]
        homes.setdefault(home, []).extend(used)
    return "\n".join(f"from {home} import {', '.join(sorted(names))}" for home, names in homes.items() if names)


def _begin(state: State, subject: Subject) -> Iterator[str]:
    yield f"model = Teacher.load({subject.model.name!r})  # the {subject.side}"
    yield "tokenizer = model.tokenizer"
    yield f"metric = {state.metric!r}"
    yield ""
    yield ""
    yield "def encoded(pairs):"
    settings = subject.material.settings
    if settings == PLAIN:
        yield '    return encode(to_dataset(enumerate(pairs), tokenizer, source="the explorer"), tokenizer)'
    else:
        yield f"    settings = {settings!r}"
        yield '    dataset = settings.dataset(enumerate(pairs), tokenizer, source="the explorer")'
        yield "    return settings.encode(dataset, tokenizer)"
    yield ""
    yield ""
    yield from _pair(state.pair)
    yield "prompts = encoded([pair])"


def _pair(pair: Pair) -> Iterator[str]:
    yield "pair = Pair("
    for name in ("clean", "corrupt", "answer", "distractor"):
        yield f"    {name}={getattr(pair, name)!r},"
    for name in ("more_answers", "more_distractors"):
        if getattr(pair, name):
            yield f"    {name}={getattr(pair, name)!r},"
    yield f"    positions={dict(pair.positions)!r},"
    yield ")"


def _map(state: State, subject: Subject) -> Iterator[str]:
    prompts = f"encoded({subject.material.shown.python})" if state.average else "prompts"
    yield "# the heat map: [layer head example]"
    yield f"swept = {prompts}"
    if state.method == "path":
        yield f"scores = path_patch(model, swept, metric=metric, position={state.acts!r})"
    elif state.method == "activation":
        yield f'scores = activation_patch(model, swept, "z", metric=metric, positions=({state.acts!r},))'
    else:
        yield from _stand_in(state.method, "swept", subject)
        yield f"scores = ablate(model, swept, stand_in, metric=metric, position={state.acts!r})"
    yield "print(scores.unit, *scores.top(8))"


def _stand_in(kind: str, prompts: str, subject: Subject) -> Iterator[str]:
    """What an ablated head puts out."""
    if kind == "zero":
        yield 'stand_in = "zero"'
    elif kind == "counterfactual":
        yield f"stand_in = counterfactual_outputs(model, {prompts})"
    else:
        python = "[]" if subject.material.reference is None else subject.material.reference.python
        yield f"reference = encoded({python})"
        yield f"stand_in = reference_means(model, reference, per_position=covers(reference, {prompts}))"


def _head(state: State, subject: Subject) -> Iterator[str]:
    if state.head is None:
        return
    yield ""
    yield (
        f"# {state.head}: where it looks, what it writes to the logits, what its ablation costs, who it reads from, "
        "who it feeds"
    )
    yield f"head = Head({state.head.layer}, {state.head.index})"
    yield f"attention = attention_patterns(model, prompts.clean[0], [head], value_weighted={state.weighted})"
    yield "attribution = direct_logit_attribution(model, prompts)"
    yield "share = attribution.heads.at(head)"
    for kind in ("zero", "counterfactual", "mean") if subject.material.reference else ("zero", "counterfactual"):
        yield from _stand_in(kind, "prompts", subject)
        profile = f"ablate(model, prompts, stand_in, metric=metric, heads=[head], position={state.position!r})"
        yield f"{kind}_impact = {profile}.at(head)"
    yield "into = [Receiver(head, part) for part in 'qkv']"
    yield 'reads = path_patch(model, prompts, metric=metric, position="all", receivers=into)'
    yield 'strongest = reads.top(8, by="magnitude")'
    yield "through = {"
    yield (
        '    part: path_patch(model, prompts, metric=metric, position="all", receivers=[Receiver(head, part)], '
        "senders=strongest)"
    )
    yield "    for part in 'qkv'"
    yield "}"
    yield "feeds = exact_edges(model, prompts, metric=metric, senders=[head], freeze_mlps=False)"


def _circuit(state: State, subject: Subject) -> Iterator[str]:
    circuit = state.circuits[subject.side]
    yield "# the circuit alone, all other heads ablated"
    yield from _members(circuit)
    yield f"evaluated = encoded({subject.material.evaluated.python})"
    yield from _stand_in(state.outside, "evaluated", subject)
    yield (
        f"report = evaluate_circuit(model, evaluated, circuit, stand_in, random_circuits={5 if state.compared else 0})"
    )
    yield "print(report.circuit_accuracy, report.full_accuracy, report.faithfulness, report.logit_difference_recovered)"
    if not circuit.members:
        return
    yield ""
    yield "# each role of the circuit ablated as a whole: how far the metric falls"
    yield "joint = {}"
    yield "for role in circuit.roles:"
    yield "    scope = circuit.where(lambda member: member.role == role).scope"
    yield "    with_and_without = plain_logits(model, evaluated), ablated_logits(model, evaluated, scope, stand_in)"
    yield "    whole, without = (metric_named(metric)(each, evaluated.answers, evaluated.distractors).mean()"
    yield "                      for each in with_and_without)"
    yield "    joint[role] = float(whole - without)"
    yield "print(joint)"


def _members(circuit: Circuit) -> Iterator[str]:
    yield "members = ["
    for member in circuit.members:
        yield f"    Member(Head({member.head.layer}, {member.head.index}), {member.role!r}, {member.position!r}),"
    yield "]"
    yield f"circuit = Circuit.of(members, shape={circuit.shape!r}, method={circuit.method!r})"
