"""Training and evaluation of conditions x seeds in one run folder, after discovery and matching."""

import logging
from collections.abc import Sequence
from typing import Any

from workbench import storage
from workbench.circuits.evaluation import CircuitReport
from workbench.distillation.processes import launched
from workbench.distillation.reports import read_training
from workbench.experiment.cards import write_cards
from workbench.experiment.conditions import TEACHER, TITLES
from workbench.experiment.discover import discover
from workbench.experiment.distill import distill
from workbench.experiment.evaluate import evaluate
from workbench.experiment.match import aligned_ckas, all_ckas, match, mean_cka_and_floor
from workbench.experiment.origins import to_metadata
from workbench.experiment.preflight import preflight
from workbench.experiment.results import OUTCOMES, ConditionResult, collect, read_row
from workbench.experiment.run import Run
from workbench.experiment.transfer import record_transfer
from workbench.matching.head_rows import Readings, reading_once
from workbench.models.hooked_model import HookedModel
from workbench.patching.shared import shared_prefixes
from workbench.tasks.forcing import whole_answers_right
from workbench.tasks.scoring import sequence_preference

log = logging.getLogger("workbench")


def run_recipe(run: Run, *, resume: bool = False, workers: int | None = None) -> list[ConditionResult]:
    """Discover, match, then train and evaluate every condition with every seed, and the teacher; writes `results.json`.

    What is already in the run folder is not done again; a condition that was killed in training goes on from its last
    checkpoint. `workers`: processes that the trainings are spread over, one thread each; None: one after another here.
    """
    return run_conditions(
        run,
        [(condition, seed) for seed in run.recipe.seeds for condition in run.recipe.conditions],
        resume=resume,
        workers=workers,
    )


def run_conditions(
    run: Run, arms: Sequence[tuple[str, int]], *, resume: bool = False, workers: int | None = None
) -> list[ConditionResult]:
    """Some (condition, seed) arms and the teacher, after discovery and matching. Returns all rows that the run folder
    then holds."""
    with launched(run.recipe.device).main_first():
        run.prompts.require("reference", "discovery", "train", "validation", "test")
        preflight(run, dict.fromkeys(condition for condition, _ in arms))
        if workers is not None:
            from workbench.experiment.workers import discover_in_processes  # which trains by what stands here

            discover_in_processes(run, workers)
        if run.recipe.endpoint is None:
            match(run)
        else:
            discover(run)
    if workers is not None:
        from workbench.experiment.workers import run_in_processes

        run_in_processes(run, [arm for arm in arms if not _has_row(run, *arm)], workers)
    return run_arms(run, arms, resume=resume)


def run_arms(run: Run, arms: Sequence[tuple[str, int]], *, resume: bool = False) -> list[ConditionResult]:
    """`run_conditions` where circuits and head map are there already."""
    folder, processes = run.folder, launched(run.recipe.device)
    for condition, seed in arms:
        if not _has_row(run, condition, seed):
            log.info("%s, seed %d", TITLES[condition], seed)
            run_condition(run, condition, seed, resume=resume, records=processes.is_main)
    processes.wait()
    if processes.is_main and run.recipe.endpoint is None and not _has_row(run, TEACHER, 0):
        with shared_prefixes(run.recipe.evaluation.shared_prefixes):
            _record(run, TEACHER, 0, run.teacher, trained=0, steps=0)
    with processes.main_first():
        rows = collect(folder)
        if processes.is_main:
            write_cards(run, rows)
        return rows


def _has_row(run: Run, condition: str, seed: int) -> bool:
    """Whether a condition and seed have been evaluated. Errors: `InputError` when the row there is not this run's."""
    file = run.folder.condition(condition, seed) / "result.json"
    return file.exists() and bool(read_row(file, run.condition_origin(condition, seed)))


def run_condition(run: Run, condition: str, seed: int, *, resume: bool, records: bool = True) -> None:
    """Train one student under a condition and, where this process `records`, evaluate it and write its row."""
    with shared_prefixes(run.recipe.evaluation.shared_prefixes):
        student, slices = distill(run, condition, seed, resume=resume)
        if records:  # under `accelerate launch` all processes train, one evaluates
            steps = len(read_training(run.folder.condition(condition, seed))) if slices.count else 0
            _record(run, condition, seed, student, trained=slices.count, steps=steps)


def _record(run: Run, condition: str, seed: int, model: HookedModel, *, trained: int, steps: int) -> None:
    """Evaluate a model on the test prompts and write its row and its per-prompt outcomes."""
    folder, is_teacher = run.folder.condition(condition, seed), condition == TEACHER
    origin = run.condition_origin(condition, seed)
    report, outcomes = evaluate(run, model, run.circuit("teacher" if is_teacher else "student"))
    ckas = []
    if not is_teacher and run.recipe.endpoint is None:  # else there is no teacher's head to compare with
        with reading_once(run.models.readings(run.teacher), Readings(model)):  # all heads first, then some of them
            all_ckas(run, model, run.prompts.test).save(folder / "circuit_ckas.safetensors")
            ckas = aligned_ckas(run, model, run.head_map(), run.prompts.test)
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
        **_whole_answers(run, model),
        origin=origin,
    )
    storage.write_tensors(folder / OUTCOMES, outcomes, metadata=to_metadata(origin))
    record_transfer(run, model, folder, origin)
    storage.write_json(folder / "ckas.json", [value.to_json() for value in ckas])
    storage.write_json(folder / "circuit_report.json", report.to_json())
    storage.write_json(folder / "result.json", result.to_json())
    log.info(
        "  full %.3f, circuit %.3f, random circuit %.3f",
        report.full_accuracy,
        report.circuit_accuracy,
        report.random_circuit_accuracy,
    )


def _whole_answers(run: Run, model: HookedModel) -> dict[str, Any]:
    """With answers of several tokens: how often the whole answer is preferred, and how often decoding gives it."""
    if not run.recipe.data.prompts.multi_token:
        return {}
    prompts = run.read_by(model, run.prompts.test)
    return {
        "whole_answers": float((sequence_preference(model, prompts) > 0).float().mean()),
        "whole_accuracy": float(whole_answers_right(model, prompts).float().mean()),
    }


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
