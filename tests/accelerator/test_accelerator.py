"""On an accelerator everything gives what it gives on the CPU, to rounding; skipped where there is none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from miniatures import SUPPORTED, miniature

from tests.conftest import ModelFolder
from workbench.circuits.evaluation import circuit_logits, evaluate_circuit
from workbench.circuits.methods.registry import OURS
from workbench.circuits.search import find_circuit
from workbench.experiment.arms import run_condition
from workbench.experiment.conditions import CONDITIONS
from workbench.experiment.match import match
from workbench.experiment.recipe import read_recipe
from workbench.experiment.road import run_recipe
from workbench.experiment.run import Run
from workbench.experiment.runs import RunFolder
from workbench.explorer.api import session_of
from workbench.models.devices import accelerators
from workbench.models.hooked_model import Student, Teacher
from workbench.patching.ablation import ablate, reference_means
from workbench.patching.attribution import attribute_edges, attribute_nodes
from workbench.patching.conformance import check_model
from workbench.patching.execution import Execution
from workbench.patching.path import path_patch
from workbench.pretraining.finetuning import FinetuningConfig, finetune
from workbench.readouts.logit_attribution import direct_logit_attribution
from workbench.study.config import read_study
from workbench.study.grid import Study
from workbench.study.launch import run_in_processes
from workbench.study.summary import summarise
from workbench.tasks.base import PromptPairs, encode, task_dataset
from workbench.tasks.entity_tracking import EntityTracking
from workbench.values.refs import Head

pytestmark = pytest.mark.skipif(not accelerators(), reason="no accelerator here")
QUIET = Execution(progress=False)
TOLERANCE = 1e-4
"""How far two devices may differ in float32, relative to the largest value."""


def device() -> str:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return kind.type


def pairs_for(model: Any, *, scenes: int = 4, seed: int = 0, split: str = "calibration") -> PromptPairs:
    dataset = task_dataset(EntityTracking(boxes=3), model.tokenizer, split=split, scenes=scenes, seed=seed)
    return encode(dataset, model.tokenizer).to(model.device)


def on_both(folder: Path) -> tuple[Teacher, Teacher]:
    """The same model on the CPU and on the accelerator."""
    return Teacher.load(folder), Teacher.load(folder, device=device())


def same(here: torch.Tensor, there: torch.Tensor, *, tolerance: float = TOLERANCE) -> None:
    here, there = here.detach().cpu().double(), there.detach().cpu().double()
    scale = float(here.nan_to_num().abs().max())
    assert scale > 0
    torch.testing.assert_close(there, here, atol=tolerance * scale, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_model_is_patched_exactly(family: str, tmp_path: Path) -> None:
    found = check_model(miniature(family, SUPPORTED[family], tmp_path / family), device=device())
    assert found.passed, found.text()
    assert found.engine == "replay"


MEASURES: dict[str, Callable[[Teacher, PromptPairs], torch.Tensor]] = {
    "path patching to the logits": lambda model, pairs: (
        path_patch(model, pairs, metric="logit_difference", execution=QUIET).values
    ),
    "ablation": lambda model, pairs: ablate(model, pairs, execution=QUIET).values,
    "attribution of edges": lambda model, pairs: attribute_edges(model, pairs, execution=QUIET).values,
    "attribution of heads": lambda model, pairs: (
        attribute_nodes(attribute_edges(model, pairs, steps=3, execution=QUIET)).values
    ),
    "logit attribution": lambda model, pairs: direct_logit_attribution(model, pairs).heads.values,
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("what", MEASURES)
def test_effects_are_the_cpus(what: str, architecture: str, model_folder: ModelFolder) -> None:
    here, there = (MEASURES[what](model, pairs_for(model)) for model in on_both(model_folder(architecture)))
    same(torch.as_tensor(here), torch.as_tensor(there))


@pytest.mark.parametrize("name", OURS)
def test_every_method_finds_the_cpus_circuit(name: str, model_folder: ModelFolder) -> None:
    settings: dict[str, dict[str, Any]] = {
        "path_patching": {"stages": EntityTracking.stages, "least_effect": 0.0, "confidence": 0.01},
        **{key: {"until": "metric"} for key in ("elimination", "elimination_by_gates", "greedy")},
        "learned_gates": {"until": "metric", "steps": 4, "batch": 6, "learning_rate": 0.2},
    }
    found = []
    for model in on_both(model_folder("llama")):
        found.append(
            find_circuit(model, pairs_for(model), method=name, heads=4, execution=QUIET, **settings.get(name, {}))
        )
    here, there = found
    assert here.circuit == there.circuit
    assert here.ranking == there.ranking


def test_a_circuit_alone_answers_alike(model_folder: ModelFolder) -> None:
    rows = []
    for model in on_both(model_folder("llama")):
        pairs = pairs_for(model)
        circuit = find_circuit(model, pairs, method="eap", heads=4, execution=QUIET).circuit
        means = reference_means(model, pairs_for(model, seed=3))
        rows.append((circuit_logits(model, pairs, circuit, means), evaluate_circuit(model, pairs, circuit, means)))
    same(rows[0][0], rows[1][0])
    assert rows[0][1].full_accuracy == rows[1][1].full_accuracy


def losses(folder: RunFolder, condition: str) -> list[dict[str, Any]]:
    lines = (folder.condition(condition, 0) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


ALL = list(CONDITIONS)


def test_the_whole_road_is_the_cpus(small_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Every condition: head map, losses and accuracies."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(conditions=ALL)))
    here = run_recipe(recipe, tmp_path / "here")
    there = run_recipe(recipe, tmp_path / "there", device=device())
    folders = [RunFolder(tmp_path / name) for name in ("here", "there")]
    assert folders[0].head_map().pairs == folders[1].head_map().pairs
    for own, other in zip(here.rows, there.rows, strict=True):
        assert (own.condition, own.full_accuracy, own.circuit_accuracy) == (
            other.condition,
            other.full_accuracy,
            other.circuit_accuracy,
        )
    for condition in ALL:
        if CONDITIONS[condition].trains is None:
            continue
        for first, second in zip(*(losses(folder, condition) for folder in folders), strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-4), condition


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(
    precision: str, small_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {"device": device(), "training.precision": precision}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(conditions=["circuit_ce_cka"])))
    recipe = read_recipe(path, overrides=changes)
    texts = []
    for name in ("whole", "cut"):
        run = Run(recipe, RunFolder(tmp_path / name))
        run.begin(resume=False)
        match(run)
        if name == "cut":
            with pytest.MonkeyPatch.context() as patch:
                step = torch.optim.AdamW.step
                calls = []

                def three(self: Any, *args: Any, calls: list[int] = calls, step: Any = step, **kwargs: Any) -> Any:
                    calls.append(1)
                    if len(calls) > 3:
                        raise KeyboardInterrupt
                    return step(self, *args, **kwargs)

                patch.setattr(torch.optim.AdamW, "step", three)
                with pytest.raises(KeyboardInterrupt):
                    run_condition(run, "circuit_ce_cka", 0, resume=False)
            run = Run(recipe, RunFolder(tmp_path / name))
        run_condition(run, "circuit_ce_cka", 0, resume=True)
        texts.append([line["loss"] for line in losses(run.folder, "circuit_ce_cka")])
    assert texts[0] == texts[1]


def test_workers_share_the_device_to_the_same_bits(small_recipe: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(conditions=["base", "circuit_ce", "circuit_ce_cka"], device=device())))
    run_recipe(path, tmp_path / "one")
    run_recipe(path, tmp_path / "two", workers=2)
    for condition in ("circuit_ce", "circuit_ce_cka"):
        first, second = (losses(RunFolder(tmp_path / name), condition) for name in ("one", "two"))
        assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_a_study_runs(small_recipe: Callable[..., Any], tmp_path: Path) -> None:
    base, path = tmp_path / "base.yaml", tmp_path / "study.yaml"
    recipe = small_recipe(device=device())
    student = recipe.pop("student")
    recipe["data"]["validation_scenes"], recipe["training"]["evaluate_every"] = 2, recipe["training"]["steps"]
    base.write_text(yaml.safe_dump(recipe))
    plain = {"recipe": str(base), "students": {"one": {"source": student}}, "train_scenes": [8], "weights": [1.0]}
    conditions = ["base", "circuit_ce", "circuit_ce_cka"]
    path.write_text(yaml.safe_dump({**plain, "seeds": [0], "conditions": conditions, "anew": []}))
    study = Study(read_study(path), tmp_path / "study")
    study.begin(resume=False)
    run_in_processes(study, 2)
    assert summarise(study)


def test_a_model_is_fine_tuned_as_on_the_cpu(model_folder: ModelFolder, tmp_path: Path) -> None:
    found = []
    for place in ("cpu", device()):
        config = FinetuningConfig(
            model=str(model_folder("llama")),
            options={"boxes": 3},
            scenes=3,
            steps=4,
            evaluate_every=2,
            evaluation_scenes=4,
            warmup=2,
            precision="full",
            device=place,
        )
        finetune(config, tmp_path / place, tmp_path / f"{place}-work")
        found.append(Student.load(tmp_path / place))
    for (name, here), (_, there) in zip(*(model.model.named_parameters() for model in found), strict=True):
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-3, msg=name)


def test_the_explorer_shows_the_cpus_numbers(model_folder: ModelFolder) -> None:
    views = []
    for place in ("cpu", device()):
        session = session_of(
            Teacher.load(model_folder("llama"), device=place), task="entity_tracking", options={"boxes": 3}, prompts=6
        )
        session.handle({"do": "select", "side": "teacher", "head": str(Head(1, 2))})
        view = session.settle()
        assert view["error"] is None
        assert view["pending"] == []
        views.append(view)
        session.close()
    for name in ("share", "impacts"):
        here, there = (json.loads(json.dumps(view["head"][name])) for view in views)
        torch.testing.assert_close(_numbers(here), _numbers(there), atol=1e-3, rtol=1e-3)


def _numbers(value: Any) -> torch.Tensor:
    """All numbers of a JSON value, in order."""
    if isinstance(value, dict):
        parts = [_numbers(value[key]) for key in sorted(value)]
    elif isinstance(value, list):
        parts = [_numbers(each) for each in value]
    else:
        parts = [torch.tensor([float(value)])] if isinstance(value, (int, float)) else []
    return torch.cat([part for part in parts if len(part)] or [torch.zeros(0)])
