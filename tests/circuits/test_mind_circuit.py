"""The committed circuit of theory of mind: whole, where as many heads of another choice are not, on stories that its
search never saw; and the tokens where its heads are said to act are the ones they look from."""

from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench import seeds, storage
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.looks import attention_to_positions
from workbench.circuits.remaining import Remaining
from workbench.patching.ablation import ablate, reference_means
from workbench.patching.execution import Execution
from workbench.values.refs import Head

FILE = Path(storage.located("assets/results/mind_circuit/teacher.json"))
QUIET = Execution(progress=False)


@pytest.fixture(scope="module")
def teacher() -> wb.Teacher:
    """The mixture's."""
    return wb.Teacher.load("mixture-teacher")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    """As the recipe `mind` found it."""
    file = storage.read_json(FILE)
    return Circuit.from_json({key: value for key, value in file.items() if key != "origin"})


def test_no_other_choice_of_as_many_heads_carries_the_task(teacher, circuit):
    task = wb.task("theory_of_mind")
    few, test = task.pairs(teacher, scenes=10, seed=5), task.pairs(teacher, scenes=24, split="test", seed=5)
    means = reference_means(teacher, task.pairs(teacher, scenes=30, seed=6))
    remaining = Remaining(teacher, test, means, "log_probability", QUIET)

    def accuracy(kept: list[Head]) -> float:
        return float(remaining.after([(head, "all") for head in teacher.heads if head not in kept])[1].mean())

    chooser, size = seeds.chooser(0, "as many heads"), len(circuit.heads)
    single = ablate(teacher, few, means, execution=QUIET)
    assert size <= 0.3 * len(teacher.heads)
    assert accuracy(list(circuit.heads)) >= 0.85
    assert accuracy(single.ranked()[:size]) <= 0.8
    assert max(accuracy(chooser.sample(list(teacher.heads), size)) for _ in range(3)) <= 0.65


def test_its_heads_look_where_the_page_says(teacher, circuit):
    told = {
        ("L0H0", "state"): "object",
        ("L0H1", "last"): "query_object",
        ("L0H6", "last"): "query_character",
        ("L1H1", "last"): "visibility_word",
        ("L1H3", "last"): "state",
    }
    assert {head for head, _ in told} <= set(map(str, circuit.heads))
    stories = wb.task("theory_of_mind").pairs(teacher, scenes=12, split="test", seed=5)
    heads = {str(head): head for head in circuit.heads}
    members = [Member(heads[name], "circuit", place) for name, place in told]
    looks = attention_to_positions(teacher, stories, members)
    means = looks.values.nanmean(-1)
    for row, target in enumerate(told.values()):
        column = looks.labels["position"].index(target)
        assert float(means[row, column]) > 0.8
        others = [place for place, name in enumerate(looks.labels["position"]) if name in {*told.values()} - {target}]
        assert float(torch.stack([means[row, place] for place in others]).max()) < 0.2
