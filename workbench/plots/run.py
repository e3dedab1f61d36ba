"""The report of a run folder: whatever stages it holds, in the order of the road."""

from collections.abc import Iterator

from workbench import storage
from workbench.alignment import AlignedPair, PairCka
from workbench.circuits.curves import FaithfulnessCurve
from workbench.circuits.discovery import stacked
from workbench.circuits.evaluation import CircuitReport
from workbench.distillation.reports import read_log
from workbench.errors import InputError
from workbench.plots.curves import faithfulness_figure
from workbench.plots.heads import head_importance
from workbench.plots.matching import matching
from workbench.plots.report import Section, report_html
from workbench.plots.table import results_chart, results_html
from workbench.plots.training import loss_curves
from workbench.refs import Head
from workbench.runs import RunFolder
from workbench.scores import Scores
from workbench.study.rows import ConditionResult, run_logs

MODELS = ("teacher", "student")


def run_report(folder: RunFolder) -> str:
    """One self-contained HTML page. Errors: `InputError` when the folder is no run folder, is damaged, or holds nothing to show yet."""
    described = folder.described()
    recipe = described["recipe"]
    sections = [*_results(folder, recipe), *_heads(folder), *_evaluation(folder), *_matching(folder), *_training(folder)]
    if not sections:
        raise InputError(f"{folder.path} holds nothing to report yet; run `workbench discover` or `workbench demo` into it.")
    return report_html(recipe["title"], [*sections, _provenance(described)])


def _results(folder: RunFolder, recipe: dict[str, object]) -> Iterator[Section]:
    file = folder.path / "results.json"
    if not file.exists():
        return
    results = [ConditionResult.from_json(row) for row in storage.read_json(file)]
    data = recipe["data"]
    boxes = data["boxes"] if isinstance(data, dict) and data["pairs"] is None and data["task"] == "entity_tracking" else None
    text = (
        "Accuracy on held-out test prompts: the whole model, and its circuit alone (every other head ablated). Intervals are 95 % Wilson "
        "intervals over prompts; p values are McNemar's exact test on the same prompts. CKA is debiased, over the matched pairs; its floor is "
        "the same with the prompts shuffled."
    )
    yield Section(heading="Results", text=text, figure=results_chart(results, chance=1 / boxes if boxes else None), html=results_html(results))


def _heads(folder: RunFolder) -> Iterator[Section]:
    circuits = {name: folder.circuit(name) for name in MODELS if folder.circuit_file(name).exists()}
    scores = {name: folder.scores(name) for name in circuits}
    paths = {name: stacked({key: part for key, part in found.items() if key.startswith("path-")}) for name, found in scores.items()}
    drawn = {name: part for name, part in paths.items() if part is not None}
    if drawn:
        text = "The strongest path effect of each head over the stages of the backward search. Hover for the value; circuit heads are outlined with their roles."
        figure = head_importance(drawn, circuits={name: circuits[name] for name in drawn}, by="lowest", title="Path patching")
        yield Section(heading="Heads by path patching", text=text, figure=figure)
    for metric in ("log_probability", "logit_difference"):
        impacts: dict[str, Scores] = {name: found[f"ablation-{metric}"] for name, found in scores.items() if f"ablation-{metric}" in found}
        if impacts:
            text = "What the model loses when one head is mean-ablated everywhere. Heads that back each other up show little here."
            figure = head_importance(impacts, circuits={name: circuits[name] for name in impacts}, by="highest", title="Mean ablation")
            yield Section(heading=f"Heads by mean ablation ({metric.replace('_', ' ')})", text=text, figure=figure)


def _evaluation(folder: RunFolder) -> Iterator[Section]:
    found = {name: storage.read_json(folder.examined_file(name)) for name in MODELS if folder.examined_file(name).exists()}
    if not found:
        return
    reports = {name: CircuitReport.from_json(value["report"]) for name, value in found.items()}
    text = "\n\n".join(
        f"{name}: {report.heads} of {report.total_heads} heads alone (scope: {report.scope}) have accuracy {report.circuit_accuracy:.3f} of {report.full_accuracy:.3f} "
        f"on {report.prompts} test prompts; {report.random_circuits} random circuits of equal size {report.random_circuit_accuracy:.3f}, no head at all {report.empty_accuracy:.3f}."
        for name, report in reports.items()
    )
    figure = faithfulness_figure({name: FaithfulnessCurve.from_json(value["curve"]) for name, value in found.items()})
    yield Section(heading="Is the circuit enough, and is it needed?", text=text, figure=figure)


def _matching(folder: RunFolder) -> Iterator[Section]:
    if not folder.head_map_file.exists():
        return
    head_map = folder.head_map()
    ckas = read_ckas(folder) if (folder.path / "ckas.json").exists() else None
    text = (
        f"{len(head_map.matches)} student heads on {len(head_map.teacher_heads)} teacher heads (rule {head_map.rule}, {head_map.ties} ties). "
        "CKA before training, on the discovery prompts; a dashed link is no better than shuffled prompts."
    )
    figure = matching(head_map, student_circuit=folder.circuit("student"), teacher_circuit=folder.circuit("teacher"), ckas=ckas)
    yield Section(heading="Matching", text=text, figure=figure)


def read_ckas(folder: RunFolder) -> list[PairCka]:
    """The matched pairs' CKA before training, as `workbench match` wrote it."""
    return [
        PairCka(
            pair=AlignedPair(
                student=Head.parse(row["student"]),
                teacher=Head.parse(row["teacher"]),
                student_positions=tuple(row["student_positions"]),
                teacher_positions=tuple(row["teacher_positions"]),
            ),
            **{name: row[name] for name in ("cka", "floor", "floor_high", "rows")},
        )
        for row in storage.read_json(folder.path / "ckas.json")
    ]


def _training(folder: RunFolder) -> Iterator[Section]:
    logs = {name: read_log(file) for name, file in run_logs(folder).items()}
    if any(logs.values()):
        text = "The two terms of the loss apart: the task loss, and the sum over pairs of 1 - CKA before it is weighted by lambda."
        yield Section(heading="Training", text=text, figure=loss_curves({name: log for name, log in logs.items() if log}))


def _provenance(described: dict[str, object]) -> Section:
    recipe = described["recipe"]
    assert isinstance(recipe, dict)
    versions = described.get("versions")
    words = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    data = recipe["data"]
    prompts = (
        f"{data['pairs'] or data['task']}, BOS {'prepended' if data['prepend_bos'] else 'not prepended'}, chat template: {data.get('chat', 'none')}"
    )
    text = f"Teacher: {recipe['teacher']}\nStudent: {recipe['student']}\nPrompts: {prompts}\nCommit: {described.get('commit')}\nVersions: {words}\nThe whole recipe is in run.json."
    return Section(heading="How this was made", text=text)
