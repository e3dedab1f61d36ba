"""A teacher's circuit, head by head: `python -m docs.circuit_heads mind` or `thin` measures what a search found.

    workbench discover --recipe mind --set discovery.resamples=3 --out runs/mind-circuit
    python -m docs.circuit_heads mind runs/mind-circuit     # copies its circuits to assets/results/mind_circuit
    python -m docs.circuit_heads thin                       # the circuit of study_thin

On fresh prompts, with every head outside the circuit at its mean: what each head's removal at each named position
costs the circuit; what it reads and writes (exact path effects in the whole model); where it looks from there; and how
much random circuits of its size and the strongest heads by single ablation carry. The figure is drawn from that.
"""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from workbench import seeds, storage
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.looks import FIRST, attention_to_positions
from workbench.circuits.remaining import Remaining
from workbench.experiment.prompts import Prompts
from workbench.experiment.recipe import read_recipe
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablate, reference_means
from workbench.patching.attribution import exact_edges
from workbench.patching.execution import Execution
from workbench.plots.export import save_figure
from workbench.plots.graph import circuit_graph
from workbench.storage import located
from workbench.storage.provenance import provenance
from workbench.values.refs import Embedding, Head, Mlp
from workbench.values.scores import Scores

ROOT = Path(__file__).parents[1]
COPIED = [f"{who}{kind}.json" for who in ("teacher", "student") for kind in ("", "-search", "-evaluation")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A circuit, and where its heads are asked for."""

    recipe: str
    circuit: str
    """Below assets/results; `heads.json` goes to the first folder of it."""
    figure: str
    named: tuple[str, ...]
    """Positions in the order of the prompt; their complement is asked for too."""
    beside: tuple[str, ...]
    """Positions that hold others of these: not told of what a head looks at."""
    wide: tuple[str, ...]
    """Positions that name no head's role in the figure where a narrower one does."""
    title: str

    @property
    def places(self) -> tuple[str, ...]:
        """The named positions and all others."""
        return (*self.named, f"not {'+'.join(self.named)}")

    @property
    def folder(self) -> Path:
        """Of what is measured."""
        return ROOT / "assets/results" / self.circuit.partition("/")[0]


SUBJECTS = {
    "mind": Subject(
        recipe="mind",
        circuit="mind_circuit/teacher.json",
        figure="mind_circuit.png",
        named=(
            *("state", "other_state", "object", "character"),
            *("visibility_word", "query_character", "query_object", "last"),
        ),
        beside=("states",),
        wide=("states", "visibility", FIRST),
        title="Theory of mind in the teacher: heads by what they look at",
    ),
    "thin": Subject(
        recipe="thin",
        circuit="study_thin/circuits/teacher.json",
        figure="thin_circuit.png",
        named=("object", "earlier_label", "query_label", "last"),
        beside=(),
        wide=("objects", "labels", FIRST),
        title="Boxes in the teacher of thin heads: heads by what they look at",
    ),
}
ACTS, LOOKS, WRITES = 0.1, 0.15, 0.1
"""Told of a head: a place whose removal costs this many nats; an attention of at least so much; a path of at least so
many nats."""
RANDOM, PROMPTS, PATHS = 40, 120, 24
"""Random circuits; fresh prompts, and those of them for the paths."""
QUIET = Execution(progress=False)
log = logging.getLogger("circuit_heads")


def main() -> int:
    """Copy what was found, where a run is named; measure and draw."""
    name, *run = sys.argv[1:]
    subject = SUBJECTS[name]
    if run:
        for file in (Path(run[0]) / "run.json", *(Path(run[0]) / "circuits" / each for each in COPIED)):
            storage.write_json(subject.folder / file.name, storage.read_json(file))
    circuit = Circuit.load(ROOT / "assets/results" / subject.circuit)
    recipe = read_recipe(subject.recipe)
    task = recipe.data.task.replace("_", " ")
    model = Teacher.load(located(recipe.teacher))
    prompts = Prompts(recipe, model.tokenizer)
    test, means = prompts.test.rows(slice(0, PROMPTS)), reference_means(model, prompts.reference)
    remaining = Remaining(model, test, means, "log_probability", QUIET)
    costs = place_costs(remaining, circuit, subject.places)
    members = acting(circuit, costs, subject.places)
    log.info("%d members: %s", len(members), ", ".join(f"{member.head} at {member.position}" for member in members))
    looks = attention_to_positions(model, test, members)
    paths = exact_edges(
        model,
        test.rows(slice(0, PATHS)),
        metric="log_probability",
        senders=senders(circuit),
        freeze_mlps=False,
        execution=QUIET,
    )
    log.info("paths done")
    storage.write_json(
        subject.folder / "heads.json",
        {
            "command": " ".join(("python -m docs.circuit_heads", *sys.argv[1:])),
            "commit": provenance()["commit"],
            "seed": 0,
            "test_prompts": len(test),
            "path_prompts": PATHS,
            "unit": "nats of the answer's log-probability",
            "heads": {str(head): told(head, costs, members, looks, paths, subject) for head in circuit.heads},
            "carries": carries(remaining, circuit, ablate(model, prompts.discovery, means, execution=QUIET), task),
        },
    )
    placed = Circuit.of(drawn(members, looks, subject), shape=circuit.shape, method=circuit.method)
    columns = [place for place in subject.places if place in {member.position for member in placed.members}]
    figure = circuit_graph(placed, among(paths, circuit), positions=columns, title=subject.title)
    save_figure(figure, ROOT / "assets/figures" / subject.figure)
    return 0


def place_costs(remaining: Remaining, circuit: Circuit, places: Sequence[str]) -> dict[tuple[Head, str], float]:
    """What the circuit loses without a head at a place, in nats."""
    remaining.restart()
    remaining.remove([(head, "all") for head in remaining.model.heads if head not in circuit.heads])
    sites = list(product(circuit.heads, places))
    without = remaining.without_each(sites).mean(1)
    whole = float(remaining.measured()[0].mean())
    return {site: whole - float(value) for site, value in zip(sites, without, strict=True)}


def acting(circuit: Circuit, costs: dict[tuple[Head, str], float], places: Sequence[str]) -> list[Member]:
    """The circuit's heads where they are needed; each at one place at least."""
    members = []
    for head in circuit.heads:
        mine = {place: costs[head, place] for place in places}
        needed = [place for place, cost in mine.items() if cost >= ACTS] or [max(mine, key=lambda place: mine[place])]
        members += [Member(head, "circuit", place) for place in needed]
    return sorted(members)


def drawn(members: Sequence[Member], looks: Scores, subject: Subject) -> list[Member]:
    """Each head once, at the last named place where it is needed, with what it looks at most from there for a role (a
    narrow position before one that holds it)."""
    names, at = looks.labels["position"], looks.values.nanmean(-1)
    narrow = [place for place, name in enumerate(names) if name not in subject.wide]
    latest = {}
    order = (subject.places[-1], *subject.named)  # at a named position, where there is one
    for row, member in sorted(enumerate(members), key=lambda one: order.index(one[1].position)):
        values = at[row].tolist()
        role = names[max(narrow, key=lambda place: values[place])].replace("_", " ")
        latest[member.head] = Member(member.head, role, member.position)
    return sorted(latest.values())


def senders(circuit: Circuit) -> list[Any]:
    """Whose paths are measured: the circuit's heads, the embedding and the MLPs."""
    return [Embedding(), *circuit.heads, *(Mlp(layer) for layer in range(circuit.shape[0]))]


def among(paths: Scores, circuit: Circuit) -> Scores:
    """The paths that start at the circuit's heads."""
    rows = [place for place, name in enumerate(paths.labels["sender"]) if name in map(str, circuit.heads)]
    labels = {**paths.labels, "sender": tuple(paths.labels["sender"][row] for row in rows)}
    return Scores(values=paths.values[rows], axes=paths.axes, labels=labels, unit=paths.unit)


def told(
    head: Head,
    costs: dict[tuple[Head, str], float],
    members: Sequence[Member],
    looks: Scores,
    paths: Scores,
    subject: Subject,
) -> dict[str, Any]:
    """What there is to say of a head."""
    at = looks.values.nanmean(-1)
    rows = [row for row, member in enumerate(members) if member.head == head]
    seen = {
        members[row].position: strongest(
            zip(looks.labels["position"], at[row].tolist(), strict=True), least=LOOKS, leave=subject.beside
        )
        for row in rows
    }
    means = paths.values.nanmean(-1)
    inputs = [
        (place, name)
        for place, name in enumerate(paths.labels["receiver"])
        if name != "logits" and "." in name and reads_for(head, name, paths)
    ]
    reads = {
        f"{sender} -> {name.partition('.')[2]}": float(means[row, place])
        for row, sender in enumerate(paths.labels["sender"])
        for place, name in inputs
    }
    out = {}
    row = paths.labels["sender"].index(str(head))
    for place, name in enumerate(paths.labels["receiver"]):
        out[name] = float(means[row, place])
    return {
        "costs": {place: round(costs[head, place], 4) for place in subject.places},
        "looks": {place: {name: round(value, 3) for name, value in found.items()} for place, found in seen.items()},
        "reads": {name: round(value, 3) for name, value in strongest(reads.items(), least=WRITES).items()},
        "writes": {name: round(value, 3) for name, value in strongest(out.items(), least=WRITES).items()},
    }


def reads_for(head: Head, name: str, paths: Scores) -> bool:
    """Whether an input is the head's own q, or its group's k or v."""
    reader, _, kind = name.partition(".")
    layer, index = (int(part) for part in reader[1:].split("H"))
    if layer != head.layer:
        return False
    keys = sorted(
        int(each.partition(".")[0][1:].split("H")[1])
        for each in paths.labels["receiver"]
        if each.startswith(f"L{layer}H") and each.endswith(".k")
    )
    return index == head.index if kind == "q" else index == max(key for key in keys if key <= head.index)


def strongest(values: Iterable[tuple[str, float]], *, least: float, leave: Sequence[str] = ()) -> dict[str, float]:
    """Those of at least so much in absolute value, the strongest first, five at most."""
    there = [(name, value) for name, value in values if value == value and abs(value) >= least and name not in leave]
    return dict(sorted(there, key=lambda one: -abs(one[1]))[:5])


def carries(remaining: Remaining, circuit: Circuit, single: Scores, task: str) -> dict[str, Any]:
    """Accuracy and log-probability of circuits alone, heads kept everywhere."""

    def alone(heads: Iterable[Head]) -> dict[str, float]:
        kept = set(heads)
        gone = [(head, "all") for head in remaining.model.heads if head not in kept]
        value, accuracy, _ = remaining.after(gone).mean(1).tolist()
        return {"accuracy": accuracy, "log_probability": value}

    size = len(circuit.heads)
    chooser = seeds.chooser(0, f"random circuits of {task}")
    random = [alone(chooser.sample(list(remaining.model.heads), size)) for _ in range(RANDOM)]
    accuracies = sorted(each["accuracy"] for each in random)
    return {
        "size": size,
        "whole": alone(remaining.model.heads),
        "circuit": alone(circuit.heads),
        "top by single ablation": alone(single.ranked()[:size]),
        "top six by single ablation": alone(single.ranked()[:6]),
        "nothing": alone([]),
        "random": {
            "circuits": RANDOM,
            "mean": sum(accuracies) / RANDOM,
            "median": accuracies[RANDOM // 2],
            "most": accuracies[-1],
        },
        "without it": float(remaining.after([(head, "all") for head in circuit.heads])[1].mean()),
    }


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main())
