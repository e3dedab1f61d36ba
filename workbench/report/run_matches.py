"""What a run folder holds of the matching, as sections of its report: the pairs' CKA before and after training, all
pairs of heads, impacts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.experiment.conditions import METHOD
from workbench.experiment.runs import RunFolder
from workbench.matching import HeadMap
from workbench.matching.pair_cka import PairCka
from workbench.plots.head_maps import matching, matching_change
from workbench.plots.matrices import cka_change
from workbench.plots.similarity import impact_scatter
from workbench.plots.table import condition_title
from workbench.report.page import Section
from workbench.report.roles import Roles
from workbench.values.scores import Scores

PAIRS, MATRIX = "ckas.json", "circuit_ckas.safetensors"


def match_sections(folder: RunFolder, roles: Roles) -> Iterator[Section]:
    """The head map with its pairs' CKA, the CKA of all pairs of circuit heads, and what ablating matched heads
    costs."""
    if folder.head_map_file.exists():
        head_map, trained = folder.head_map(), training_of(folder)
        yield _matches(folder, head_map, trained, roles)
        if trained and (trained.before / MATRIX).exists() and (trained.after / MATRIX).exists():
            text = (
                "Every circuit head of the student against every one of the teacher, read where the student's head "
                "acts, on the test prompts."
            )
            before, after = (Scores.load(place / MATRIX) for place in (trained.before, trained.after))
            yield Section(
                heading="CKA of all pairs of circuit heads",
                text=text,
                figure=lambda theme: cka_change(before, after, head_map=head_map, theme=theme),
            )
        yield from _impacts(folder, head_map, roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The folders of the untrained student and of one that was trained with alignment, both evaluated on the test
    prompts."""

    before: Path
    after: Path

    @property
    def title(self) -> str:
        """`circuit / CE + CKA, seed 0`."""
        condition, _, seed = self.after.name.rpartition("-")
        return f"{condition_title(condition)}, seed {seed}"


def training_of(folder: RunFolder) -> Training | None:
    """The method's first seed beside the untrained student; None where one of them has not been evaluated."""
    ckas = {name: _first(folder, name) for name in ("base", METHOD)}
    before, after = ckas["base"], ckas[METHOD]
    return Training(before=before, after=after) if before and after else None


def _first(folder: RunFolder, condition: str) -> Path | None:
    seeds = {
        path.parent.name.rpartition("-")[2]: path.parent
        for path in (folder.trial_path / "conditions").glob(f"{condition}-*/{PAIRS}")
    }
    numbered = {int(seed): path for seed, path in seeds.items() if seed.isdecimal()}
    return numbered[min(numbered)] if numbered else None


def read_ckas(place: Path) -> list[PairCka] | None:
    """The matched pairs' CKA in a folder, if it holds any: before training as `workbench match` wrote it, or a
    condition's on the test prompts."""
    if not (place / PAIRS).exists():
        return None
    rows = storage.read_typed(storage.read_json(place / PAIRS), list[Any], what=f"CKAs of pairs ({place / PAIRS})")
    return [PairCka.from_json(row) for row in rows]


def _matches(folder: RunFolder, head_map: HeadMap, trained: Training | None, roles: Roles) -> Section:
    text = (
        f"{len(head_map.matches)} student heads on {len(head_map.teacher_heads)} teacher heads (rule {head_map.rule}, "
        f"{head_map.ties} ties). "
        "A dashed link is no better than shuffled prompts."
    )
    ours, theirs = folder.circuit("student"), folder.circuit("teacher")
    key = roles.key({"student": ours, "teacher": theirs})
    text += f" Letters are roles: {key}." if key else ""
    if trained is None:
        ckas = read_ckas(folder.path)
        return Section(
            heading="Matching",
            text=f"{text} CKA before training, on the discovery prompts.",
            figure=lambda theme: matching(
                head_map, student_circuit=ours, teacher_circuit=theirs, ckas=ckas, theme=theme
            ),
        )
    before, after = read_ckas(trained.before) or [], read_ckas(trained.after) or []
    return Section(
        heading="Matching",
        text=f"{text} CKA on the test prompts, in the untrained student and after {trained.title}.",
        figure=lambda theme: matching_change(
            head_map, student_circuit=ours, teacher_circuit=theirs, before=before, after=after, theme=theme
        ),
    )


def _impacts(folder: RunFolder, head_map: HeadMap, roles: Roles) -> Iterator[Section]:
    name = "ablation-log_probability"
    student, teacher = (folder.scores(model).get(name) for model in ("student", "teacher"))
    if student is not None and teacher is not None and head_map.matches:
        text = (
            "What the paper's rule matches by: heads on a falling or scattered cloud are not alike in what their "
            "ablation costs."
        )
        ours = roles.renamed(folder.circuit("student"))
        yield Section(
            heading="Impact of matched heads",
            text=text,
            figure=lambda theme: impact_scatter(
                head_map, student=student, teacher=teacher, student_circuit=ours, theme=theme
            ),
        )
