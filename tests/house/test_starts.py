"""What is known before training: the committed file has every student with the start that its study stored, and on
random miniatures the measures agree with slow loops, and are 1 of a model beside itself."""

from collections.abc import Iterator

import pytest
import torch
import yaml

from docs import starts
from workbench import storage
from workbench.experiment.match import aligned
from workbench.matching.head_rows import place
from workbench.models import hooks
from workbench.similarity.cka import linear_cka
from workbench.study.config import read_study
from workbench.study.grid import Cell

KNOWN = storage.read_json(starts.FILE)["studies"]


@pytest.mark.parametrize("study", starts.STUDIES)
def test_every_student_is_measured_and_starts_where_its_study_says(study: str) -> None:
    assert list(KNOWN[study]) == list(read_study(study).students)
    for name, student in KNOWN[study].items():
        start = starts.stored(study, name, student["train_scenes"])
        assert starts.near(student["cka"], start["stored_cka"])
        assert starts.near(student["cka_floor"], start["stored_floor"])
        assert starts.near(student["stored_cka"], start["stored_cka"])
        assert 0 < student["matched"] <= student["student_circuit"] <= student["student_heads"]


@pytest.fixture(scope="module")
def cells(model_folder, tmp_path_factory) -> Iterator[dict[str, Cell]]:
    """A study of a teacher beside itself, and of another model."""
    tmp_path = tmp_path_factory.mktemp("starts")
    recipe = {
        "teacher": str(model_folder("llama", seed=1)),
        "data": {"boxes": 3, "reference_scenes": 4, "discovery_scenes": 4, "test_scenes": 5, "validation_scenes": 3},
        "discovery": {"heads": 2, "least_effect": 0.0, "confidence": 0.01},
        "matching": {"rule": "similarity", "one_to_one": True},
        "alignment": {"positions": "all"},
        "training": {"steps": 4, "batch": 6, "evaluate_every": 2},
        "evaluation": {"random_circuits": 1, "curve": False},
    }
    study = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "students": {name: {"source": str(model_folder("llama", seed=n))} for name, n in (("itself", 1), ("other", 2))},
        "train_scenes": [6, 8],
        "weights": [0.1, 1.0],
        "validation_seeds": [7],
        "seeds": [1],
        "conditions": ["base", "circuit_ce", "circuit_ce_cka"],
    }
    for name, value in (("recipe", recipe), ("study", study)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(value))
    with pytest.MonkeyPatch.context() as patch, storage.command():
        patch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
        yield {cell.student: cell for cell in starts.cells(str(tmp_path / "study.yaml"), tmp_path / "work")}


def test_a_model_agrees_with_itself_and_another_one_does_not(cells: dict[str, Cell]) -> None:
    itself, other = (starts.similarities(cell.run) for cell in cells.values())
    for name in ("cka", "cka_of_differences"):
        assert itself[name] == pytest.approx(1, abs=1e-5)
        assert other[name] < 0.9
    run = cells["itself"].run
    agreement = starts.agreements(run, aligned(run, run.head_map()))
    assert agreement["plain_agreement"] == agreement["interchange_agreement"] == 1
    assert agreement["interchange_changes"] > 0
    assert starts.agreements(run, ())["interchange_changes"] == 0
    run = cells["other"].run
    assert starts.agreements(run, aligned(run, run.head_map()))["interchange_agreement"] < 1


def test_differences_are_read_where_the_pairs_are_aligned(cells: dict[str, Cell]) -> None:
    run = cells["other"].run
    prompts, expected = run.prompts.discovery, []
    for pair in aligned(run, run.head_map()):
        rows = []
        for model, head, positions in (
            (run.student, pair.student, pair.student_positions),
            (run.teacher, pair.teacher, pair.teacher_positions),
        ):
            name = hooks.z(head.layer)
            clean, corrupt = (model.activations(one, prompts.mask, [name]) for one in (prompts.clean, prompts.corrupt))
            rows.append((clean[1][name] - corrupt[1][name])[:, :, head.index][place(prompts, positions)].detach())
        expected.append(float(linear_cka(*rows, estimator="debiased")))
    found = starts.similarities(run)
    assert found["cka_of_differences"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert abs(found["cka_of_differences"] - found["cka"]) > 1e-3


def test_interchanged_answers_are_those_of_a_loop_over_prompts(cells: dict[str, Cell]) -> None:
    run = cells["other"].run
    prompts, pairs, expected = run.prompts.discovery, aligned(run, run.head_map()), []
    for row in range(len(prompts)):
        one = prompts.rows(slice(row, row + 1))
        layers = sorted({pair.student.layer for pair in pairs})
        source = run.student.activations(one.corrupt, one.mask, [hooks.z(layer) for layer in layers])[1]

        def edit(layer: int, one=one, source=source):
            def hook(z: torch.Tensor) -> torch.Tensor:
                z = z.clone()
                for pair in pairs:
                    if pair.student.layer == layer:
                        where = place(one, pair.student_positions)
                        z[:, :, pair.student.index][where] = source[hooks.z(layer)][:, :, pair.student.index][where]
                return z

            return hook

        with torch.no_grad(), hooks.edit(run.student.model, {hooks.z(layer): edit(layer) for layer in layers}):
            expected.append(int(run.student.final_logits(one.clean, one.mask).argmax()))
    assert starts.answers(run.student, prompts, pairs, "student")[1].tolist() == expected
