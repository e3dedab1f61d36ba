"""The report of a run folder: whatever stages it holds, in the order of the road."""

from collections.abc import Iterator
from typing import Any

from workbench.distillation.reports import read_training
from workbench.errors import InputError
from workbench.experiment.results import read_results, run_logs
from workbench.experiment.runs import RunFolder
from workbench.plots.losses import loss_curves, run_of
from workbench.plots.seeds import loss_bands, seeds_chart
from workbench.plots.table import results_chart, results_html
from workbench.report.findings import comparisons_of, findings
from workbench.report.page import Section, report_html
from workbench.report.roles import Roles
from workbench.report.run_circuits import circuit_sections, circuits_of, reports_of
from workbench.report.run_matches import match_sections
from workbench.tasks.registry import task_named


def run_report(folder: RunFolder) -> str:
    """One self-contained HTML page. Errors: `InputError` when the folder is no run folder, is damaged, or holds nothing
    to show yet."""
    described = folder.described()
    recipe = described["recipe"]
    roles = Roles(stages=recipe.get("stages") or ())
    sections = [
        *_results(folder, recipe),
        *circuit_sections(folder, roles),
        *match_sections(folder, roles),
        *_training(folder),
    ]
    if not sections:
        raise InputError(
            f"{folder.path} holds nothing to report yet; run `workbench discover` or `workbench demo` into it."
        )
    return report_html(recipe["title"], [*sections, _provenance(described)], opening=_opening(folder, recipe))


def _opening(folder: RunFolder, recipe: dict[str, Any]) -> list[str]:
    """The run's findings, from what it holds."""
    file, data = folder.trial_path / "results.json", recipe["data"]
    rows = read_results(file) if file.exists() else []
    scenes = 0 if data["pairs"] else int(data["test_scenes"])
    return findings(circuits_of(folder), reports_of(folder), rows, comparisons_of(folder, rows, scenes=scenes))


def _results(folder: RunFolder, recipe: dict[str, Any]) -> Iterator[Section]:
    file = folder.trial_path / "results.json"
    if not file.exists():
        return
    results = read_results(file)
    data = recipe["data"]
    is_boxed = data["pairs"] is None and data["task"] == "entity_tracking"
    chance = task_named(data["task"], data["options"]).chance if is_boxed else None
    several = len({row.seed for row in results if row.condition != "teacher"}) > 1
    over = (
        "in the figure over seeds, in the table 95 % Wilson intervals over prompts"
        if several
        else "95 % Wilson intervals over prompts"
    )
    text = (
        "Accuracy on held-out test prompts: the whole model, and its circuit alone (every other head ablated). "
        f"Intervals are {over}; p values are "
        "McNemar's exact test on the same prompts. CKA is debiased, over the matched pairs; its floor is the same with "
        "the prompts shuffled."
    )
    chart = seeds_chart if several else results_chart
    yield Section(
        heading="Results",
        text=text,
        figure=lambda theme: chart(results, chance=chance, theme=theme),
        html=results_html(results),
    )


def _training(folder: RunFolder) -> Iterator[Section]:
    logs = {
        name: log
        for name, log in ((name, read_training(file.parent)) for name, file in run_logs(folder).items())
        if log
    }
    if logs:
        text = (
            "The two terms of the loss apart: the task loss, and the sum over pairs of 1 - CKA before it is "
            "weighted by lambda."
        )
        several = len({run_of(name)[0] for name in logs}) < len(logs)
        curves = loss_bands if several else loss_curves
        yield Section(heading="Training", text=text, figure=lambda theme: curves(logs, theme=theme))


def _provenance(described: dict[str, object]) -> Section:
    recipe = described["recipe"]
    assert isinstance(recipe, dict)
    versions = described.get("versions")
    words = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    data = recipe["data"]
    settings = data["prompts"]
    prompts = (
        f"{data['pairs'] or data['task']}, BOS {'prepended' if settings['prepend_bos'] else 'not prepended'}, chat "
        f"template: {settings['chat']}"
    )
    commit = described.get("commit")
    made_by = f"Commit: {commit}\n" if commit else ""  # a wheel has none, its version is among the versions
    text = (
        f"Teacher: {recipe['teacher']}\nStudent: {recipe['student']}\nPrompts: {prompts}\n{made_by}"
        f"Versions: {words}\nThe whole recipe is in run.json."
    )
    return Section(heading="How this was made", text=text)
