"""A student trained on its matched heads in one call (eq 6, 7): no run folder, and the student that came stays as it
is."""

import json
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from typing_extensions import TypedDict, Unpack

from workbench.distillation.answers import answered
from workbench.distillation.assembly import trained_slices
from workbench.distillation.config import (
    AlignmentConfig,
    AlignmentLoss,
    Pairs,
    TaskLoss,
    Tracker,
    TrainingConfig,
    WeightSchedule,
)
from workbench.distillation.counterfactual import teacher_alignment_outputs
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices
from workbench.distillation.reports import StepReport, Validation, training_facts
from workbench.distillation.teacher_cache import computed
from workbench.errors import InputError, nearest
from workbench.matching.aligned_pairs import AlignedPair, weighted_by_impact
from workbench.matching.config import Compared
from workbench.matching.head_map import HeadMap
from workbench.matching.head_rows import Activation
from workbench.matching.match import Matching, pairs_of
from workbench.models.card import StudentDescription
from workbench.models.hooked_model import Student, Teacher
from workbench.patching.reference import require_model, require_pairs
from workbench.similarity.cka import Estimator
from workbench.similarity.measures import Measure
from workbench.tasks.base import PromptPairs
from workbench.values.settings import configured
from workbench.values.tables import html_table, number, text_table

Trains = Literal["heads", "all"]
ALIGNMENT = {
    "estimator": "estimator",
    "measure": "measure",
    "measure_options": "options",
    "pair_losses": "pairs",
    "activation": "activation",
    "compared": "compared",
    "alignment_loss": "loss",
    "interchange_weight": "interchange_weight",
    "interchanged": "interchanged",
    "pair_weights": "pair_weights",
}
"""Settings of the alignment by name -> their name in `AlignmentConfig`."""
ALWAYS = ("weight", "positions", "seed", "out")
"""Settings that `distill` names itself."""


class DistillSettings(TypedDict, total=False):
    """What of a training can be set besides lambda, positions and seed; see `TrainingConfig` for each."""

    steps: int
    batch: int
    """64, or all pairs where there are fewer, unless set."""
    learning_rate: float
    task_loss: TaskLoss
    trains: Trains
    """`heads`: the matched student heads (the paper); `all`: every parameter."""
    train_kv: bool
    """With grouped-query attention: whether a matched head's shared key-value group trains too (True)."""
    validation: Validation
    """With `evaluate_every`: prompts that are neither trained nor tested on."""
    answers: Literal["whole", "first"]
    """Of answers of several tokens: the loss over all of them, or over the first."""
    temperature: float
    weight_schedule: WeightSchedule
    weight_steps: int | None
    estimator: Estimator
    measure: Measure
    measure_options: dict[str, Any]
    pair_losses: Pairs
    """`sum` (the paper) or `mean` over the matched pairs."""
    activation: Activation
    compared: Compared
    """`activations` (the paper) or `differences` between the clean and the corrupt run."""
    alignment_loss: AlignmentLoss
    """`similarity` (the paper), `interchange` (causal alignment) or `both`."""
    interchange_weight: float
    interchanged: Literal["all", "one"]
    pair_weights: Literal["equal", "impact"]
    lora_rank: int | None
    lora_alpha: float
    accumulate: int
    alignment_batch: Literal["whole", "micro"]
    precision: Literal["full", "bf16"]
    weight_decay: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup: int
    clip: float
    checkpoint_every: int
    evaluate_every: int | None
    patience: int | None
    restore_best: bool
    trackers: tuple[Tracker, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistillationResult:
    """A trained student, and how its training went."""

    student: Student
    """The trained copy."""
    reports: tuple[StepReport, ...]
    """One for each step: losses, the pairs' CKA, gradient norm."""
    trained_parameters: int
    trained_fraction: float
    """Share of all the student's parameters."""
    pairs: tuple[AlignedPair, ...]
    """What was aligned; none with weight 0."""
    config: TrainingConfig
    seed: int

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
        count = len(self.reports)
        shown = sorted({round(share * (count - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}) if count else []
        rows = [
            (
                str(report.step + 1),
                number(report.task_loss),
                number(report.alignment_loss),
                number(sum(report.ckas.values()) / len(report.ckas) if report.ckas else None, 2),
                number(report.accuracy),
            )
            for report in (self.reports[step] for step in shown)
        ]
        title = (
            f"{self.student.name}: {count} steps on {self.trained_parameters:,} parameters "
            f"({self.trained_fraction:.0%}), lambda {self.config.weight:g} over {len(self.pairs)} matched pairs"
        )
        return ("step", "task loss", "alignment loss", "mean CKA", "validation"), rows, title

    def __repr__(self) -> str:
        head, rows, title = self._table()
        return text_table(head, rows, title=title)

    def _repr_html_(self) -> str:
        head, rows, title = self._table()
        return html_table(head, rows, title=title)


def distill(
    student: Student,
    teacher: Teacher,
    matching: Matching | HeadMap,
    pairs: PromptPairs,
    *,
    weight: float | int = 1.0,
    positions: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **settings: Unpack[DistillSettings],
) -> DistillationResult:
    """Train a copy of the student on `task loss + weight * SUM over matched pairs (1 - CKA)` (eq 7).

    Only the matched student heads train (`trains="all"`: every parameter), on the pairs' clean prompts; the task loss
    is cross-entropy on the teacher's labels (over whole answers, where pairs were made with
    `multi_token`). `weight=0` leaves the alignment out: the control at equal budget.
    `positions`: where pairs are read, None = as they were matched (of a bare `HeadMap`: `last`), or a named position
    for all. `out`: a folder for log and checkpoint, from which the same call goes on after an interruption to the same
    bits; without it nothing is written. Errors: `InputError` for an unknown setting, too few pairs, a loss that is not
    finite, and an `out` that holds another training.
    """
    require_model(student, Student, role="student")
    require_model(teacher, Teacher, role="teacher")
    require_pairs(pairs, student, teacher)
    head_map = matching.head_map if isinstance(matching, Matching) else matching
    if not isinstance(head_map, HeadMap):
        raise InputError("distill trains matched heads; give what `match` returns, or a HeadMap.")
    if not head_map.pairs:
        raise InputError("no heads are matched, so there is nothing to train; match circuits that hold heads.")
    config, trains, train_kv, validation = _settings(dict(settings), weight, len(pairs))
    aligned = pairs_of(matching, pairs, positions) if config.weight > 0 else ()
    if config.alignment is not None and config.alignment.pair_weights == "impact":
        if not isinstance(matching, Matching):
            raise InputError("a bare HeadMap holds no impacts to weight its pairs by; give what `match` returns.")
        aligned = weighted_by_impact(aligned, matching.impacts["student"])
    trained = student.copy()
    for ours, theirs in head_map.pairs:
        trained.checked(ours)
        teacher.checked(theirs)
    heads = None if trains == "all" else [ours for ours, _ in head_map.pairs]
    slices = trained_slices(trained, heads, config, train_kv=train_kv, seed=seed)
    pairs = answered(pairs, teacher, trained, config)
    outputs = teacher_alignment_outputs(partial(computed, teacher), teacher, pairs, aligned, config.alignment)
    run = Distillation(trained, slices, pairs, outputs, aligned, config, seed=seed, validation=validation)
    with nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory() as folder:
        reports = run.run(Path(folder), resume=True)
    trained.description = _described(matching, teacher, student, config, slices, len(reports), len(pairs))
    return DistillationResult(
        student=trained,
        reports=tuple(reports),
        trained_parameters=slices.count,
        trained_fraction=slices.fraction,
        pairs=aligned,
        config=config,
        seed=seed,
    )


def _settings(
    settings: dict[str, Any], weight: float | int, prompts: int
) -> tuple[TrainingConfig, Trains, bool, Validation | None]:
    """(configuration of the training, what trains, whether key-value groups do, validation)."""
    known = DistillSettings.__annotations__
    for name in settings:
        if name not in known:
            raise InputError(
                f"distill has no setting {name!r}; {nearest(name, [*known, 'weight', 'positions', 'seed'])}"
            )
    trains, train_kv = settings.pop("trains", "heads"), settings.pop("train_kv", True)
    validation = settings.pop("validation", None)
    if trains not in ("heads", "all"):
        raise InputError(f"trains={trains!r} is neither 'heads' (the matched ones) nor 'all'.")
    batch = {"batch": min(64, prompts)} if "batch" not in settings else {}
    chosen = {ALIGNMENT[name]: settings.pop(name) for name in list(settings) if name in ALIGNMENT}
    alignment = configured(AlignmentConfig, {"weight": float(weight), **chosen}, call="distill")
    return (
        configured(TrainingConfig, {"alignment": alignment, **batch, **settings}, call="distill"),
        trains,
        train_kv,
        validation,
    )


def _described(
    matching: Matching | HeadMap,
    teacher: Teacher,
    student: Student,
    config: TrainingConfig,
    slices: TrainedSlices,
    steps: int,
    prompts: int,
) -> StudentDescription:
    """For the student's model card."""
    head_map = matching.head_map if isinstance(matching, Matching) else matching
    circuits = {"student": matching.ours, "teacher": matching.theirs} if isinstance(matching, Matching) else {}
    return StudentDescription(
        base=student.name if student.description is None else student.description.base,
        teacher=teacher.name,
        facts=training_facts(config, count=slices.count, fraction=slices.fraction, steps=steps, prompts=prompts),
        circuits={name: [str(head) for head in circuit.heads] for name, circuit in circuits.items()},
        matches=[f"{ours}~{theirs}" for ours, theirs in head_map.pairs] if config.weight > 0 else (),
        files=matching.files if isinstance(matching, Matching) else {HeadMap.FILE: matching.to_json()},
        recipe=yaml.safe_dump({"training": json.loads(json.dumps(asdict(config)))}, sort_keys=False),
    )
