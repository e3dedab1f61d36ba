"""Training and evaluation of conditions x seeds in one run folder, after discovery and matching."""

import logging
from collections.abc import Sequence
from typing import Any

from workbench import storage
from workbench.circuits.evaluation import CircuitReport
from workbench.distillation.processes import launched
from workbench.distillation.reports import read_log
from workbench.experiment import Experiment, mean_cka_and_floor
from workbench.experiment.results import TITLES, ConditionResult, collect
from workbench.experiment.transfer import record_transfer
from workbench.models.hooked_model import HookedModel
from workbench.tasks.scoring import sequence_preference

log = logging.getLogger("workbench")


def run_study(experiment: Experiment, *, resume: bool = False) -> list[ConditionResult]:
    """Discover, match, then train and evaluate every condition with every seed, and the teacher; writes `results.json`.

    What is already in the run folder is not done again; a condition that was killed in training goes on from its last
    checkpoint.
    """
    return run_conditions(
        experiment,
        [(condition, seed) for seed in experiment.recipe.seeds for condition in experiment.recipe.conditions],
        resume=resume,
    )


def run_conditions(
    experiment: Experiment, arms: Sequence[tuple[str, int]], *, resume: bool = False
) -> list[ConditionResult]:
    """Some (condition, seed) arms and the teacher, after discovery and matching. Returns all rows that the run folder
    then holds."""
    with launched(experiment.recipe.device).main_first():
        experiment.require_trainable(condition for condition, _ in arms)
        experiment.match()
    return run_arms(experiment, arms, resume=resume)


def run_arms(experiment: Experiment, arms: Sequence[tuple[str, int]], *, resume: bool = False) -> list[ConditionResult]:
    """`run_conditions` where circuits and head map are there already."""
    folder, processes = experiment.folder, launched(experiment.recipe.device)
    for condition, seed in arms:
        if not (folder.condition(condition, seed) / "result.json").exists():
            log.info("%s, seed %d", TITLES[condition], seed)
            run_condition(experiment, condition, seed, resume=resume, records=processes.is_main)
    processes.wait()
    if processes.is_main and not (folder.condition("teacher", 0) / "result.json").exists():
        _record(experiment, "teacher", 0, experiment.teacher, trained=0, steps=0)
    with processes.main_first():
        return collect(folder)


def run_condition(experiment: Experiment, condition: str, seed: int, *, resume: bool, records: bool = True) -> None:
    """Train one student under a condition and, where this process `records`, evaluate it and write its row."""
    student, slices = experiment.distill(condition, seed, resume=resume)
    if records:  # under `accelerate launch` all processes train, one evaluates
        steps = len(read_log(experiment.folder.condition(condition, seed) / "log.jsonl")) if slices.count else 0
        _record(experiment, condition, seed, student, trained=slices.count, steps=steps)


def _record(experiment: Experiment, condition: str, seed: int, model: HookedModel, *, trained: int, steps: int) -> None:
    """Evaluate a model on the test prompts and write its row and its per-prompt outcomes."""
    folder, is_teacher = experiment.folder.condition(condition, seed), condition == "teacher"
    report, outcomes = experiment.evaluate(model, experiment.folder.circuit("teacher" if is_teacher else "student"))
    ckas = [] if is_teacher else experiment.ckas(model, experiment.folder.head_map(), experiment.prompts.test)
    if not is_teacher:
        experiment.circuit_ckas(model, experiment.prompts.test).save(folder / "circuit_ckas.safetensors")
    cka, floor = mean_cka_and_floor(ckas)
    total = sum(parameter.numel() for parameter in model.parameters().values())
    result = ConditionResult(
        condition=condition,
        seed=seed,
        **_accuracies(report),
        mean_cka=cka,
        cka_floor=floor,
        trained_parameters=trained,
        trained_fraction=trained / total,
        steps=steps,
        mcnemar={},
        whole_answers=_whole_answers(experiment, model),
    )
    storage.write_tensors(folder / "outcomes.safetensors", outcomes)
    record_transfer(experiment, model, folder)
    storage.write_json(folder / "ckas.json", [value.to_json() for value in ckas])
    storage.write_json(folder / "circuit_report.json", report.to_json())
    storage.write_json(folder / "result.json", result.to_json())
    log.info(
        "  full %.3f, circuit %.3f, random circuit %.3f",
        report.full_accuracy,
        report.circuit_accuracy,
        report.random_circuit_accuracy,
    )


def _whole_answers(experiment: Experiment, model: HookedModel) -> float | None:
    if not experiment.recipe.data.multi_token:
        return None
    return float((sequence_preference(model, experiment.read_by(model, experiment.prompts.test)) > 0).float().mean())


def _accuracies(report: CircuitReport) -> dict[str, Any]:
    names = (
        "full_accuracy",
        "full_interval",
        "circuit_accuracy",
        "circuit_interval",
        "random_circuit_accuracy",
        "faithfulness",
    )
    return {name: getattr(report, name) for name in names}
