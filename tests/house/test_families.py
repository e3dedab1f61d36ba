"""Families x methods: the committed table has a row for each miniature and says what they say today, and the whole road
is walked with families that the replay does not know, or whose heads do not add up."""

import pytest
import torch
from miniatures import FAMILIES, miniature

from docs import families, tables
from workbench import storage
from workbench.circuits.search import find_circuit
from workbench.distillation.distill import distill
from workbench.distillation.masks import slices_of_heads
from workbench.errors import InputError
from workbench.matching.match import match
from workbench.models.hooked_model import Student, Teacher
from workbench.patching.attribution import attribute_edges
from workbench.patching.edge_circuit import EdgePatcher
from workbench.patching.execution import Execution
from workbench.tasks.source import task

TRIED = storage.read_json(families.FILE)["families"]
AGAIN = ["Olmo2", "Mixtral", "Bloom"]
"""A norm after attention, a mixture of experts, ALiBi."""
ROAD = {"Gemma2": "replay", "Bloom": "hooks"}
"""Norms after attention, ALiBi -> the engine of their patching."""
QUIET = Execution(progress=False)


@pytest.mark.parametrize("family", AGAIN)
def test_a_row_made_anew_is_the_committed_one(family: str) -> None:
    assert families.row(family) == TRIED[family]


def test_every_miniature_is_tried_and_none_is_computed_wrongly() -> None:
    assert sorted(TRIED) == sorted(FAMILIES)
    assert len([name for name, row in TRIED.items() if "refused" not in row]) >= 25
    assert not [name for name, row in TRIED.items() if row.get("wrong")]
    said = [method["how"] for row in TRIED.values() for method in row.get("methods", {}).values()]
    assert not [how for how in said if "fault" in how or "Error" in how]


def test_the_table_has_a_row_for_each() -> None:
    page = (tables.ROOT / "docs/concepts/families.md").read_text()
    assert tables.filled(page) == page, "make tables"
    there = {line.split("|")[1].strip() for line in tables.families().splitlines()[2:]}
    assert there == {name for name, row in TRIED.items() if "refused" not in row}


@pytest.mark.parametrize("family", ROAD)
def test_circuits_are_found_matched_and_trained(family: str, tmp_path) -> None:
    """A model is matched with itself: each head of its circuit is most like itself, and trains alone."""
    folder = miniature(family, FAMILIES[family], tmp_path / family)
    teacher, student = Teacher.load(folder), Student.load(folder, check=False)
    pairs = task("entity_tracking", boxes=3).pairs(teacher, scenes=4)
    circuits = find_circuit(teacher, pairs, method="mean_ablation", heads=4, selection="top", execution=QUIET)
    assert QUIET.replay(teacher, pairs) is None if ROAD[family] == "hooks" else QUIET.replay(teacher, pairs)
    matching = match(student, teacher, circuits, circuits, pairs, rule="similarity", positions="all")
    assert matching.head_map.pairs
    assert all(ours == theirs for ours, theirs in matching.head_map.pairs)
    assert all(abs(pair.cka - 1) < 1e-4 for pair in matching.ckas)

    trained = distill(student, teacher, matching, pairs, steps=2, batch=8)
    parts = slices_of_heads(student, [ours for ours, _ in matching.head_map.pairs])
    for name, before in student.parameters().items():
        moved = trained.student.parameters()[name].detach() - before.detach()
        mine = torch.zeros_like(moved, dtype=torch.bool)
        for part in parts:
            if part.parameter == name:
                mine[part.index] = True
        assert not moved[~mine].any()
        assert bool(moved[mine].any()) == bool(mine.any())


def test_where_heads_do_not_add_up_nothing_is_attributed_to_edges(tmp_path) -> None:
    model = Teacher.load(miniature("Gemma2", FAMILIES["Gemma2"], tmp_path), check=False)
    pairs = task("entity_tracking", boxes=3).pairs(model, scenes=2)
    for method in (lambda: attribute_edges(model, pairs, execution=QUIET), lambda: EdgePatcher(model, pairs)):
        with pytest.raises(InputError, match=r"pre-norm attention.*; (use exact path patching|evaluate circuits of h)"):
            method()
