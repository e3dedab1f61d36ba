"""What a run folder holds of the circuits, as sections of its report: scores of every head, the graphs, and what the
circuits do alone."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypedDict

from plotly import graph_objects as go

from workbench import storage
from workbench.circuits.circuit import Circuit
from workbench.circuits.curves import FaithfulnessCurve
from workbench.circuits.discovery import stacked
from workbench.circuits.evaluation import CircuitReport
from workbench.experiment.runs import RunFolder
from workbench.plots.curves import faithfulness_figure
from workbench.plots.graph import circuit_graph
from workbench.plots.importance import Scale, head_importance
from workbench.plots.looks import looks_figure
from workbench.plots.theme import Theme
from workbench.report.page import Section, Switch
from workbench.report.roles import Roles
from workbench.values.scores import Scores

MODELS = ("teacher", "student")


class Examined(TypedDict):
    """A circuit's evaluation as a run writes it."""

    report: Any
    curve: Any


def circuit_sections(folder: RunFolder, roles: Roles) -> Iterator[Section]:
    """Heads by path patching and by ablation, each circuit as a graph, and its faithfulness."""
    circuits = circuits_of(folder)
    scores = {name: folder.scores(name) for name in circuits}
    explained = roles.section(circuits)
    yield from [explained] if explained else []
    yield from _paths(circuits, scores, roles)
    yield from _graphs(circuits, scores, roles)
    yield from _looks(scores, roles)
    yield from _evaluation(folder)
    yield from _impacts(circuits, scores, roles)


def _paths(circuits: Mapping[str, Circuit], scores: Mapping[str, dict[str, Scores]], roles: Roles) -> Iterator[Section]:
    paths = {
        name: stacked({key: part for key, part in of_model.items() if key.startswith("path-")})
        for name, of_model in scores.items()
    }
    drawn = {name: part for name, part in paths.items() if part is not None}
    if drawn:
        text = (
            "The strongest path effect of each head over the stages of the backward search. Hover for the value; "
            "circuit heads are outlined with their roles."
        )
        framed = {name: circuits[name] for name in drawn}
        yield _map("Heads by path patching", text, partial(_drawn, drawn, framed, roles, title="Path patching"))


def _map(heading: str, text: str, figure: partial[go.Figure]) -> Section:
    """The models' maps, each on the scale that shows it, or both on one; a single model has the one."""
    several = len(figure.args[0]) > 1
    common = Switch(names=("Each on its own scale", "Both on one scale"), figure=partial(figure, scale="common"))
    return Section(heading=heading, text=text, figure=figure, switch=common if several else None)


def _drawn(
    scores: Mapping[str, Scores],
    circuits: Mapping[str, Circuit],
    roles: Roles,
    theme: Theme,
    *,
    title: str,
    scale: Scale = "own",
) -> go.Figure:
    return head_importance(scores, circuits=circuits, roles=roles.names, scale=scale, theme=theme, title=title)


def _graphs(
    circuits: Mapping[str, Circuit], scores: Mapping[str, dict[str, Scores]], roles: Roles
) -> Iterator[Section]:
    for name, circuit in circuits.items():
        if circuit.members and "edges" in scores[name]:
            edges = scores[name]["edges"]
            text = (
                "Each head at the token where it acts; lines are exact path effects between heads and to the "
                f"logits, on {edges.values.shape[-1]} prompts."
            )
            title = f"The circuit of the {name}"
            yield Section(heading=title, text=text, figure=partial(_graph, roles.renamed(circuit), edges, title=title))


def _graph(circuit: Circuit, edges: Scores, theme: Theme, *, title: str) -> go.Figure:
    return circuit_graph(circuit, edges, theme=theme, title=title)


def _looks(scores: Mapping[str, dict[str, Scores]], roles: Roles) -> Iterator[Section]:
    for name, of_model in scores.items():
        if "looks" in of_model:
            text = (
                "A role is a claim about what a head looks at from the token where it acts. This is what it looks "
                "at on the discovery prompts."
            )
            title, looks = f"Where the {name}'s heads look", roles.relabelled(of_model["looks"])
            yield Section(heading=title, text=text, figure=partial(_attention, looks, title=title))


def _attention(looks: Scores, theme: Theme, *, title: str) -> go.Figure:
    return looks_figure(looks, theme=theme, title=title)


def _impacts(
    circuits: Mapping[str, Circuit], scores: Mapping[str, dict[str, Scores]], roles: Roles
) -> Iterator[Section]:
    for metric in ("log_probability", "logit_difference"):
        impacts: dict[str, Scores] = {
            name: of_model[f"ablation-{metric}"]
            for name, of_model in scores.items()
            if f"ablation-{metric}" in of_model
        }
        if impacts:
            text = (
                "What the model loses when one head is mean-ablated everywhere. Heads that back each other up show "
                "little here."
            )
            framed = {name: circuits[name] for name in impacts}
            heading = f"Heads by mean ablation ({metric.replace('_', ' ')})"
            yield _map(heading, text, partial(_drawn, impacts, framed, roles, title="Mean ablation"))


def circuits_of(folder: RunFolder) -> dict[str, Circuit]:
    """The circuits that a run holds, by model."""
    return {name: folder.circuit(name) for name in MODELS if folder.circuit_file(name).exists()}


def reports_of(folder: RunFolder) -> dict[str, CircuitReport]:
    """The circuits' evaluations that a run holds, by model."""
    return {name: CircuitReport.from_json(value["report"]) for name, value in _examined(folder).items()}


def _examined(folder: RunFolder) -> dict[str, Examined]:
    files = {name: folder.examined_file(name) for name in MODELS if folder.examined_file(name).exists()}
    return {
        name: storage.read_typed(storage.read_json(file), Examined, what=f"an evaluation ({file})")
        for name, file in files.items()
    }


def _evaluation(folder: RunFolder) -> Iterator[Section]:
    examined = _examined(folder)
    if not examined:
        return
    text = "\n\n".join(f"{name}: {report.line()}." for name, report in reports_of(folder).items())
    curves = {
        name: FaithfulnessCurve.from_json(value["curve"]) for name, value in examined.items() if value.get("curve")
    }
    figure = partial(_faithfulness, curves) if curves else None
    yield Section(heading="Is the circuit enough, and is it needed?", text=text, figure=figure)


def _faithfulness(curves: Mapping[str, FaithfulnessCurve], theme: Theme) -> go.Figure:
    return faithfulness_figure(curves, theme=theme)
