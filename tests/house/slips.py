"""Slips at the front door and what is said to each: `python -m tests.house.slips` prints them as JSON.

A process of its own, without the type checks of the tests, which would answer first.
"""

import json
from collections.abc import Callable
from typing import Any

import workbench as wb
from workbench.circuits.circuit import Circuit, Member
from workbench.matching.head_map import HeadMap, Match
from workbench.tasks.base import PromptPairs


class Bundle:
    """The bundled models, a few pairs, and a circuit and a map made by hand."""

    def __init__(self) -> None:
        self.teacher = wb.Teacher.load("teacher", check=False)
        self.student = wb.Student.load("student", check=False)
        self.pairs: PromptPairs = wb.task("entity_tracking").pairs(self.student, scenes=1)
        members = [Member(wb.Head(0, 4), "A", "last")]
        shape = (self.student.n_layers, self.student.n_heads)
        self.ours = Circuit.of(members, shape=shape, method="by hand")
        self.theirs = Circuit.of(members, shape=(self.teacher.n_layers, self.teacher.n_heads), method="by hand")
        match = Match(student=wb.Head(0, 4), teacher=wb.Head(0, 4), distance=None, margin=None)
        self.head_map = HeadMap(matches=(match,), rule="paper", one_to_one=False)


SLIPS: dict[str, tuple[Callable[[Any], object], str]] = {
    "metric": (lambda b: wb.ablate(b.student, b.pairs, metric="logit_diff"), "did you mean .*'logit_difference'"),
    "metric of a search": (lambda b: wb.find_circuit(b.student, b.pairs, metric="acuracy"), "'accuracy'"),
    "method": (lambda b: wb.find_circuit(b.student, b.pairs, method="path_patch"), "'path_patching'"),
    "setting of a search": (lambda b: wb.find_circuit(b.student, b.pairs, confidense=0.9), "'confidence'"),
    "senders as tuples": (lambda b: wb.path_patch(b.student, b.pairs, senders=[(0, 1)]), "write L5H3"),
    "a head that is not there": (lambda b: wb.ablate(b.student, b.pairs, heads=["L9H0"]), "has no head L9H0"),
    "reference": (lambda b: wb.ablate(b.student, b.pairs, "mean"), "For mean ablation give prompts"),
    "a path for a model": (lambda b: wb.find_circuit("student", b.pairs), r"it must be what Teacher\.load"),
    "text for pairs": (lambda b: wb.find_circuit(b.student, "pairs.jsonl"), r"read_pairs\(file, model\)"),
    "no pairs": (lambda b: wb.find_circuit(b.student, b.pairs[:0]), "there are no pairs"),
    "pairs by number": (lambda b: b.pairs[3], r"take a slice, such as pairs\[:40\]"),
    "circuit of another model": (
        lambda b: wb.evaluate_circuit(b.student, b.pairs, b.theirs),
        "find the circuit in this",
    ),
    "no circuit": (lambda b: wb.evaluate_circuit(b.student, b.pairs, "L0H4"), "give what find_circuit returns"),
    "scope": (lambda b: wb.evaluate_circuit(b.student, b.pairs, b.ours, scope="position"), "'positions'"),
    "student for teacher": (
        lambda b: wb.match(b.student, b.student, b.ours, b.theirs, b.pairs),
        r"the teacher is of type Student; it must be what Teacher\.load",
    ),
    "setting of a matching": (
        lambda b: wb.match(b.student, b.teacher, b.ours, b.theirs, b.pairs, one_to_on=True),
        "'one_to_one'",
    ),
    "position of a matching": (
        lambda b: wb.match(b.student, b.teacher, b.ours, b.theirs, b.pairs, positions="query"),
        "'query_label'",
    ),
    "setting of a training": (lambda b: wb.distill(b.student, b.teacher, b.head_map, b.pairs, step=3), "'steps'"),
    "value of a training": (lambda b: wb.distill(b.student, b.teacher, b.head_map, b.pairs, steps=0), "steps: "),
    "batch": (lambda b: wb.distill(b.student, b.teacher, b.head_map, b.pairs, batch=640), "lower `batch`"),
    "what trains": (
        lambda b: wb.distill(b.student, b.teacher, b.head_map, b.pairs, trains="circuit"),
        "neither 'heads'",
    ),
    "own positions of a bare map": (
        lambda b: wb.distill(b.student, b.teacher, b.head_map, b.pairs, positions="own"),
        "give what `match` returns",
    ),
    "nothing to compare": (lambda b: wb.compare({}, b.pairs), "give them by name"),
    "compared against": (lambda b: wb.compare({"base": b.student}, b.pairs, against="bas"), "'base'"),
    "circuit of nobody": (lambda b: wb.compare({"base": b.student}, b.pairs, circuits={"bse": b.ours}), "'base'"),
    "task": (lambda b: wb.task("entity_traking"), "'entity_tracking'"),
    "class of a task": (lambda b: wb.task(type(wb.task("ioi").task)), "with `name`"),
    "no task": (lambda b: wb.task(7), "int, no task"),
    "options of an object": (lambda b: wb.task(wb.task("ioi").task, boxes=3), "boxes can't be set"),
    "explorer's setting": (lambda b: wb.explore(b.teacher, promts=3), "'prompts'"),
    "split": (lambda b: wb.task("ioi").pairs(b.student, split="tests"), "'test'"),
    "scenes": (lambda b: wb.task("entity_tracking").pairs(b.student, scenes=0), "at least 1"),
    "file": (lambda b: wb.read_pairs("missing.csv", b.student), "is not a file"),
    "recipe": (lambda b: wb.run_recipe("dem", "nowhere"), "'demo'"),
    "key of a recipe": (lambda b: wb.run_recipe("demo", "nowhere", training__step=3), "'steps'"),
    "scores": (lambda b: wb.plots.heads({"mine": b.ours}), "no scores"),
    "matches": (lambda b: wb.plots.matches(b.head_map), "what `match` returns"),
    "trainings": (lambda b: wb.plots.training({"mine": b.head_map}), "what `distill` returns"),
}


def answers() -> dict[str, str]:
    """Each slip's message, with the kind of error before it where that is none of ours."""
    bundle, said = Bundle(), {}
    for name, (call, _) in SLIPS.items():
        try:
            said[name] = f"no error: {call(bundle)!r}"
        except wb.InputError as error:
            said[name] = str(error)
        except Exception as error:
            said[name] = f"raw {type(error).__name__}: {error}"
    return said


if __name__ == "__main__":
    print(json.dumps(answers()))
