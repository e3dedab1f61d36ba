"""The model cards of a run's students: written when they are saved, and again once there is a table of results."""

from collections.abc import Sequence

import yaml

from workbench import storage
from workbench.distillation.masks import TrainedSlices
from workbench.distillation.reports import training_facts
from workbench.experiment.conditions import CONDITIONS, TEACHER, TITLES
from workbench.experiment.match import head_map_of
from workbench.experiment.recipe import to_plain
from workbench.experiment.results import ConditionResult
from workbench.experiment.run import Run
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.match import shared_files
from workbench.models.card import FILE, StudentDescription, shown, with_results
from workbench.storage.assets import short_name
from workbench.values.tables import accuracy_text, number

STUDENT = "student"
"""In a condition's folder: the trained student."""
HEAD = ("condition", "seed", "full accuracy", "circuit accuracy", "random circuit", "faithfulness", "CKA", "floor")


def described(
    run: Run, condition: str, seed: int, slices: TrainedSlices, steps: int, pairs: Sequence[AlignedPair]
) -> StudentDescription:
    """What the card of a condition's student says before it is evaluated."""
    assert run.recipe.student is not None
    spec = CONDITIONS[condition]
    config = run.recipe.training_of(spec)
    models = {"teacher": shown(run.recipe.teacher), "student": shown(run.recipe.student)}
    facts = training_facts(
        config, count=slices.count, fraction=slices.fraction, steps=steps, prompts=len(run.prompts.train)
    )
    circuits = {name: run.circuit(name) for name in run.both()}
    head_map = head_map_of(run, spec, seed) if spec.aligns else None
    return StudentDescription(
        base=short_name(run.recipe.student),
        teacher=short_name(run.recipe.teacher),
        facts={"condition": f"{TITLES[condition]}, seed {seed}", "task": run.recipe.data.task, **facts},
        circuits={
            name: [str(head) for head in circuits[name].heads] for name in ("student", "teacher") if name in circuits
        },
        matches=[str(pair) for pair in pairs],
        recipe=yaml.safe_dump({**to_plain(run.recipe), **models}, sort_keys=False),
        files=shared_files(head_map, circuits["student"], circuits.get("teacher")),
    )


def write_cards(run: Run, rows: Sequence[ConditionResult]) -> None:
    """The table of results into the card of every student of the run that has one."""
    for row in rows:
        card = run.folder.condition(row.condition, row.seed) / STUDENT / FILE
        if row.condition != TEACHER and card.is_file():
            beside = [other for other in rows if other.seed == row.seed or other.condition == TEACHER]
            storage.write_text(card, with_results(card.read_text(encoding="utf-8"), [HEAD, *map(_cells, beside)]))


def _cells(row: ConditionResult) -> tuple[str, ...]:
    return (
        TITLES[row.condition],
        str(row.seed),
        accuracy_text(row.full_accuracy, row.full_interval),
        accuracy_text(row.circuit_accuracy, row.circuit_interval),
        number(row.random_circuit_accuracy),
        number(row.faithfulness, 2),
        number(row.mean_cka, 2),
        number(row.cka_floor, 2),
    )
