"""What a study found: every cell with its interval over seeds, every comparison with its tests, and when alignment
helped.

Accuracies are of held-out test prompts, full model and circuit alone. Comparisons are with circuit CE and full CE on
the same seeds and prompts; prompts of one scene count as one (`workbench.values.statistics`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from workbench import storage
from workbench.distillation.reports import LOG, evaluations, read_training, steps_to_reach
from workbench.errors import InputError
from workbench.experiment.conditions import BASELINES, CONDITIONS, PLAIN, TEACHER, TITLES
from workbench.experiment.distill import trainable_heads
from workbench.experiment.results import ConditionResult, collect, in_columns, read_outcomes
from workbench.experiment.transfer import read_outcomes as read_transfer
from workbench.experiment.transfer import transfer_table, transfer_text
from workbench.study.choice import read_choice
from workbench.study.grid import Cell, Study, starting_similarity
from workbench.values.display import plain
from workbench.values.statistics import compared, mean_interval, rank_correlation

Outcomes = Mapping[str, Bool[Tensor, " prompt"]]


def summarise(study: Study) -> dict[str, Any]:
    """Summary of the finished cells of a study, as plain JSON values; also written to `summary.json`. Errors:
    `InputError` when none is."""
    cells = study.finished()
    if not cells:
        raise InputError(
            f"no cell of the study in {study.path} is finished; run `workbench study` into it with --resume."
        )
    summary = {
        "title": study.config.title,
        "task": study.recipe.data.named_task,
        "cells": [_cell(study, cell) for cell in cells],
        "diagnostic": _diagnostic(study, cells),
    }
    storage.write_json(study.path / "summary.json", summary)
    return summary


def _cell(study: Study, cell: Cell) -> dict[str, Any]:
    rows = [row for row in collect(cell.run.folder) if row.seed in study.config.seeds or row.condition == TEACHER]
    choice = read_choice(cell.path / "weight.json")
    by_condition = {name: [row for row in rows if row.condition == name] for name in TITLES}
    holder = _holder(study, cell, PLAIN)
    target = None if holder is None else _mean_end(holder, study, PLAIN)
    anew = {
        file.stem: _without_circuit(storage.read_typed(storage.read_json(file), dict, what=f"a circuit anew ({file})"))
        for file in sorted((cell.path / "anew").glob("*.json"))
    }
    return {
        "student": cell.student,
        "train_scenes": cell.scenes,
        "train_prompts": len(cell.run.prompts.train),
        "test_prompts": len(cell.run.prompts.test),
        **choice,
        "best": study.best(cell.scenes) == cell.student,
        "baseline": study.config.students[cell.student].baseline,
        "heads_trained": _heads_trained(cell),
        "conditions": {name: _condition(study, cell, rows, target) for name, rows in by_condition.items() if rows},
        "comparisons": {
            other: _comparisons(study, cell, other) for other in BASELINES if _holder(study, cell, other) is not None
        },
        "circuits_anew": anew,
        "transfer": _transfer(study, cell),
    }


def _transfer(study: Study, cell: Cell) -> dict[str, Any]:
    """What training did to the other tasks that the recipe names."""
    folders = {
        name: [cell.run.folder.condition(name, seed) for seed in study.config.seeds]
        for name in TITLES
        if name != TEACHER
    }
    folders[TEACHER] = [cell.run.folder.condition(TEACHER, 0)]
    return transfer_table({name: outcomes for name, paths in folders.items() if (outcomes := read_transfer(paths))})


def _without_circuit(condition: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in condition.items() if key != "circuit"}


def _heads_trained(cell: Cell) -> dict[str, Any]:
    """How many of the student's heads a circuit condition trains, how many are matched, and to how many of the
    teacher's."""
    head_map, shape = cell.run.head_map(), cell.run.circuit("student").shape
    able = len(trainable_heads(cell.run))
    heads = min(able, cell.run.recipe.training.most or able)
    return {
        "heads": heads,
        "of": shape[0] * shape[1],
        "matched": len(head_map.matches),
        "teacher_heads_used": len(head_map.teacher_heads),
    }


def _condition(study: Study, cell: Cell, rows: Sequence[ConditionResult], target: float | None) -> dict[str, Any]:
    seeds, rows = rows, _varied(rows)
    faithful = [row.faithfulness for row in rows if row.faithfulness is not None]
    ckas = [row.mean_cka for row in rows if row.mean_cka is not None]
    floors = [row.cka_floor for row in rows if row.cka_floor is not None]
    return {
        "seeds": [row.seed for row in seeds],
        "repeated": len(rows) < len(seeds),
        "full": mean_interval([row.full_accuracy for row in rows]).to_json(),
        "circuit": mean_interval([row.circuit_accuracy for row in rows]).to_json(),
        "random_circuit": mean_interval([row.random_circuit_accuracy for row in rows]).to_json(),
        "faithfulness": mean_interval(faithful).to_json() if faithful else None,
        "cka": mean_interval(ckas).to_json() if ckas else None,
        "cka_floor": mean_interval(floors).to_json() if floors else None,
        "trained_fraction": rows[0].trained_fraction,
        "steps_to_circuit_ce": _steps(study, cell, rows[0].condition, target),
        "curve": _curve(study, cell, rows[0].condition),
    }


def _varied(rows: Sequence[ConditionResult]) -> Sequence[ConditionResult]:
    """The rows of a condition's seeds; of seeds that all gave one and the same training (a batch that holds all prompts
    leaves nothing to draw) the first alone, because they repeat nothing: no interval over them means anything."""
    kinds = {
        (row.full_accuracy, row.circuit_accuracy, None if row.mean_cka is None else round(row.mean_cka, 4))
        for row in rows
    }
    return rows[:1] if len(kinds) == 1 else rows


def _trainings(study: Study, cell: Cell, condition: str) -> list[Path]:
    folders = [cell.run.folder.condition(condition, seed) for seed in study.config.seeds]
    return [folder for folder in folders if (folder / LOG).exists()]


def _mean_end(cell: Cell, study: Study, condition: str) -> float | None:
    """Mean validation accuracy that a condition ends at."""
    ends = [evaluations(read_training(folder))[-1][1] for folder in _trainings(study, cell, condition)]
    return sum(ends) / len(ends) if ends else None


def _steps(study: Study, cell: Cell, condition: str, target: float | None) -> list[int | None]:
    """Steps of each seed to the validation accuracy that circuit CE ends at on average."""
    return (
        []
        if target is None
        else [steps_to_reach(read_training(folder), target) for folder in _trainings(study, cell, condition)]
    )


def _curve(study: Study, cell: Cell, condition: str) -> list[dict[str, Any]]:
    """Validation accuracy over the steps, mean and interval over seeds."""
    runs = [dict(evaluations(read_training(folder))) for folder in _trainings(study, cell, condition)]
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return [{"step": step, **mean_interval([run[step] for run in runs]).to_json()} for step in steps]


def _outcomes(study: Study, cell: Cell, condition: str) -> list[Outcomes]:
    trained = CONDITIONS[condition].trains is not None
    seeds = study.config.seeds if trained else study.config.seeds[:1] * len(study.config.seeds)
    return [read_outcomes(cell.run.folder.condition(condition, seed)) for seed in seeds]


def _holder(study: Study, cell: Cell, condition: str) -> Cell | None:
    """The cell whose rows of a condition this one is compared with: itself, or its student's baseline where that has
    been run. None where neither has the condition."""
    if condition in study.conditions(cell.student, cell.scenes):
        return cell
    name = study.config.students[cell.student].baseline
    if name is None or condition not in study.conditions(name, cell.scenes):
        return None
    return next((each for each in study.finished() if (each.student, each.scenes) == (name, cell.scenes)), None)


def _comparisons(study: Study, cell: Cell, other: str) -> dict[str, Any]:
    """Every condition against another one: full accuracy and circuit accuracy."""
    holder = _holder(study, cell, other)
    assert holder is not None, "asked before"
    second, scene = (
        _outcomes(study, holder, other),
        len(cell.run.prompts.test) // cell.run.prompts.allotment.sizes["test"],
    )
    comparisons, repeated = {}, _repeated(study, holder, other)
    for condition in study.conditions(cell.student, cell.scenes):
        if other in CONDITIONS[condition].compared_with:
            first = _outcomes(study, cell, condition)
            count = 1 if repeated and _repeated(study, cell, condition) else len(first)
            comparisons[condition] = {
                part: compared(
                    [run[part] for run in first[:count]], [run[part] for run in second[:count]], clusters=scene
                ).to_json()
                for part in ("full", "circuit")
            }
    return comparisons


def _repeated(study: Study, cell: Cell, condition: str) -> bool:
    """Whether all seeds of a condition are one training."""
    rows = [row for row in collect(cell.run.folder) if row.condition == condition and row.seed in study.config.seeds]
    return len(_varied(rows)) == 1


def _diagnostic(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    """When does alignment help: the gain over circuit CE against how far the aligned pairs' CKA starts above its
    floor."""
    points = []
    for cell in cells:
        results = {(row.condition, row.seed): row for row in collect(cell.run.folder)}
        holder = _holder(study, cell, PLAIN)
        plain = (
            {} if holder is None else {row.seed: row for row in collect(holder.run.folder) if row.condition == PLAIN}
        )
        for condition in study.conditions(cell.student, cell.scenes):
            for seed in study.config.seeds:
                start = starting_similarity(cell, condition, seed)
                if start is None or seed not in plain or not _is_plain_with_alignment(condition):
                    continue
                gain = results[condition, seed].full_accuracy - plain[seed].full_accuracy
                points.append(
                    {
                        "student": cell.student,
                        "train_scenes": cell.scenes,
                        "condition": condition,
                        "seed": seed,
                        "cka": start[0],
                        "floor": start[1],
                        "gain": gain,
                    }
                )
    above = [point["cka"] - point["floor"] for point in points]
    gains = [point["gain"] for point in points]
    return {"points": points, "rank_correlation": rank_correlation(above, gains)}


def _is_plain_with_alignment(name: str) -> bool:
    """Whether a condition is circuit CE and an alignment, so that its gain is the alignment's."""
    condition, plain = CONDITIONS[name], CONDITIONS[PLAIN]
    return (condition.trains, condition.task_loss) == (plain.trains, plain.task_loss) and condition.aligns is not None


def text(summary: Mapping[str, Any]) -> str:
    """The cells as text tables."""
    return "\n\n".join(_cell_text(cell) for cell in summary["cells"]) + "\n\n" + _diagnostic_text(summary["diagnostic"])


def _cell_text(cell: Mapping[str, Any]) -> str:
    heads = cell["heads_trained"]
    title = (
        f"{cell['student']}, {cell['train_scenes']} scenes ({cell['train_prompts']} prompts), lambda "
        f"{cell['weight']:g}; "
        f"{heads.get('matched', heads['heads'])} of {heads['of']} heads matched to {heads['teacher_heads_used']} of "
        f"the teacher's, {heads['heads']} train"
    )
    if cell.get("learning_rates"):
        rates = ", ".join(f"{TITLES[name]} {rate:g}" for name, rate in cell["learning_rates"].items())
        title += f"\nlearning rates chosen on validation prompts: {rates}"
    head = (
        "condition",
        "full accuracy",
        "circuit accuracy",
        "random",
        "faithful",
        "CKA",
        "floor",
        "full - circuit CE",
        "p",
        "circuit - circuit CE",
        "p",
        "steps",
    )
    lines = [
        title,
        in_columns([head, *(_condition_text(name, condition, cell) for name, condition in cell["conditions"].items())]),
    ]
    if cell.get("transfer"):
        lines += [
            "",
            "accuracy on the other tasks, and its change from the untrained student's",
            transfer_text(cell["transfer"]),
        ]
    alike = [TITLES[name] for name, condition in cell["conditions"].items() if condition.get("repeated")]
    if alike:
        lines.append(
            f"no interval over seeds for {', '.join(alike)}: every seed gave the same training, because nothing in it "
            "is drawn (a batch holds all prompts)."
        )
    return "\n".join(lines)


def _condition_text(name: str, condition: Mapping[str, Any], cell: Mapping[str, Any]) -> tuple[str, ...]:
    against = cell["comparisons"].get(PLAIN, {}).get(name)
    differences = [
        text for part in ("full", "circuit") for text in (_difference_text(against[part]) if against else ("-", "-"))
    ]
    steps = sorted(step if step is not None else float("inf") for step in condition["steps_to_circuit_ce"])
    middle = steps[len(steps) // 2] if steps else None
    return (
        TITLES[name],
        _interval_text(condition["full"]),
        _interval_text(condition["circuit"]),
        f"{condition['random_circuit']['mean']:.3f}",
        "-" if condition["faithfulness"] is None else f"{condition['faithfulness']['mean']:.2f}",
        "-" if condition["cka"] is None else f"{condition['cka']['mean']:.2f}",
        "-" if condition["cka_floor"] is None else plain(condition["cka_floor"]["mean"], 2),
        *differences,
        "-" if middle is None else "not reached" if middle == float("inf") else f"{middle:.0f}",
    )


def _interval_text(value: Mapping[str, Any]) -> str:
    spread = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{spread}"


def _difference_text(difference: Mapping[str, Any]) -> tuple[str, str]:
    seeds = difference["over_seeds"]
    spread = "" if seeds["low"] is None else f" [{seeds['low']:+.3f}, {seeds['high']:+.3f}]"
    return f"{seeds['mean']:+.3f}{spread}", f"{difference['pooled_p']:.1g}"


def _diagnostic_text(diagnostic: Mapping[str, Any]) -> str:
    if diagnostic["rank_correlation"] is None:
        return "Too few trainings with alignment to say when it helps."
    return (
        "Gain of alignment over circuit CE against the pairs' CKA above its floor before training: rank correlation "
        f"{diagnostic['rank_correlation']:.2f} "
        f"over {len(diagnostic['points'])} trainings."
    )
