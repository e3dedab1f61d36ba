"""The CKA of each matched pair, with the floor that shuffled prompts give, and what both say about alignment."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError
from workbench.matching import CircuitAlignment, HeadMap, circuit_alignment
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_rows import Activation, head_rows, hook_names, output_weights, place, read
from workbench.models.hooked_model import HookedModel
from workbench.similarity.cka import Estimator, linear_cka, shuffled_floor
from workbench.storage import read_typed
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_readings
from workbench.values.refs import Head
from workbench.values.scores import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCka:
    """CKA of a pair on held-out prompts, beside the CKA of the same rows with the teacher's prompts shuffled."""

    pair: AlignedPair
    cka: float
    floor: float
    """Mean over shuffles: what unrelated rows of this shape give."""
    floor_high: float
    """The highest of the shuffles."""
    rows: int
    """m."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "student": str(self.pair.student),
            "teacher": str(self.pair.teacher),
            "student_positions": list(self.pair.student_positions),
            "teacher_positions": list(self.pair.teacher_positions),
            "cka": self.cka,
            "floor": self.floor,
            "floor_high": self.floor_high,
            "rows": self.rows,
        }

    @classmethod
    def from_json(cls, value: Any) -> "PairCka":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        remedy = "run `workbench match` or `workbench evaluate` again"
        written = read_typed(value, _Written, what="the CKA of a pair", remedy=remedy)
        pair = AlignedPair(
            student=written.student,
            teacher=written.teacher,
            student_positions=written.student_positions,
            teacher_positions=written.teacher_positions,
        )
        return cls(pair=pair, cka=written.cka, floor=written.floor, floor_high=written.floor_high, rows=written.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """The CKA of a pair as it is written."""

    student: Head
    teacher: Head
    student_positions: tuple[str, ...]
    teacher_positions: tuple[str, ...]
    cka: float
    floor: float
    floor_high: float
    rows: int


def pair_ckas(
    student: HookedModel,
    teacher: HookedModel,
    prompts: PromptPairs,
    pairs: Sequence[AlignedPair],
    *,
    activation: Activation = "z",
    estimator: Estimator = "debiased",
    shuffles: int = 8,
    seed: int = 0,
) -> list[PairCka]:
    """CKA of every pair on these prompts with its shuffled floor. The debiased estimator has a floor of 0; the biased
    one's depends on m."""
    require_readings(prompts, student.tokenizer, teacher.tokenizer)
    ours = read(student, prompts, hook_names([pair.student for pair in pairs], activation))
    theirs = read(teacher, prompts.for_teacher, hook_names([pair.teacher for pair in pairs], activation))
    our_weights, their_weights = (
        output_weights(model, heads, activation)
        for model, heads in ((student, [p.student for p in pairs]), (teacher, [p.teacher for p in pairs]))
    )
    return [
        _pair_cka(x, y, pair, estimator, shuffles, seed)
        for pair, x, y in _rows(pairs, prompts, ours, theirs, our_weights, their_weights)
    ]


def _rows(
    pairs: Sequence[AlignedPair],
    prompts: PromptPairs,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    our_weights: Any,
    their_weights: Any,
) -> Iterator[tuple[AlignedPair, Tensor, Tensor]]:
    for pair in pairs:
        x = head_rows(our_weights, ours, pair.student, place(prompts, pair.student_positions))
        yield (
            pair,
            x,
            head_rows(their_weights, theirs, pair.teacher, place(prompts.for_teacher, pair.teacher_positions)),
        )


def _pair_cka(x: Tensor, y: Tensor, pair: AlignedPair, estimator: Estimator, shuffles: int, seed: int) -> PairCka:
    x, y = x.detach(), y.detach()
    if len(x) != len(y):
        raise InputError(
            f"{pair}: {len(x)} rows of the student against {len(y)} of the teacher; align both at one named position."
        )
    orders = [torch.randperm(len(y), generator=seeds.generator(seed, "floor", draw)) for draw in range(shuffles)]
    floors = torch.stack([shuffled_floor(x, y, order=order, estimator=estimator) for order in orders])
    return PairCka(
        pair=pair,
        cka=float(linear_cka(x, y, estimator=estimator)),
        floor=float(floors.mean()),
        floor_high=float(floors.max()),
        rows=len(x),
    )


def floor_warning(ckas: Sequence[PairCka]) -> str | None:
    """A warning when the matched pairs' CKA is at the shuffled floor: alignment presupposes shared geometry, and hurts
    without it."""
    if not ckas:
        return None
    mean, floor = (sum(getattr(c, name) for c in ckas) / len(ckas) for name in ("cka", "floor"))
    at_floor = [str(c.pair) for c in ckas if c.cka <= c.floor_high + 0.05]
    if mean - floor > 0.2 and len(at_floor) * 2 <= len(ckas):
        return None
    return (
        f"the matched pairs' mean CKA is {mean:.2f} where shuffled prompts give {floor:.2f} ({len(at_floor)} of "
        f"{len(ckas)} pairs at the floor: "
        f"{', '.join(at_floor[:6])}). These models share little geometry there; the alignment term will probably hurt."
    )


def aligned_influence(
    head_map: HeadMap, ckas: Sequence[PairCka], student: Scores, teacher: Scores
) -> tuple[CircuitAlignment, float]:
    """The influence-weighted alignment of matched heads by their CKA, and its value with the shuffled floors in place
    of CKA.

    `student`, `teacher`: ablation impacts. Errors: as `circuit_alignment`.
    """
    measured, floor = (
        circuit_alignment(
            head_map, {(each.pair.student, each.pair.teacher): getattr(each, name) for each in ckas}, student, teacher
        )
        for name in ("cka", "floor")
    )
    return measured, floor.value
