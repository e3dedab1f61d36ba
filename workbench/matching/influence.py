"""Influence-weighted alignment of two circuits: are matched heads alike, and do they matter alike? (Haskins & Adams
2025, "Distilled Circuits", arXiv 2505.10822)

    A = mean over matched pairs of  S(h_s, h_t) * (1 - |I_s(h_s) - I_t(h_t)|)

S: similarity of the pair's activations; I: the head's influence = its mean ablation impact over the largest |impact| of
its own model, in [-1, 1]. 1: every pair is alike and matters equally much in its model (a model in which no head
matters has influence 0 throughout). Two influences of opposite sign lie up to 2 apart, so a factor may be negative, and
heads whose similarity is at its shuffled floor count as little as that floor: read A beside the same number with the
floors in place of S.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.matching.head_map import HeadMap
from workbench.values.refs import Head
from workbench.values.scores import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedInfluence:
    """One pair's part of the alignment."""

    student: str
    teacher: str
    similarity: float
    student_influence: float
    teacher_influence: float
    value: float
    """similarity * (1 - |difference of influence|)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitAlignment:
    """The alignment of two circuits and the pairs that it is the mean of."""

    value: float
    pairs: tuple[AlignedInfluence, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def circuit_alignment(
    head_map: HeadMap, similarity: Mapping[tuple[Head, Head], float], student_impacts: Scores, teacher_impacts: Scores
) -> CircuitAlignment:
    """A of the matched pairs. `similarity` by (student head, teacher head), 1 = alike; impacts [layer head example] (or
    means) of each model.

    Errors: `InputError` for an empty map, a pair without similarity, and a head without a measured impact.
    """
    if not head_map.pairs:
        raise InputError("no heads are matched, so circuits can't be aligned; match heads first.")
    if absent := [f"{ours} ~ {theirs}" for ours, theirs in head_map.pairs if (ours, theirs) not in similarity]:
        raise InputError(f"no similarity is known for {', '.join(absent[:6])}; measure every matched pair.")
    influence = _influence(student_impacts), _influence(teacher_impacts)
    pairs = tuple(
        _aligned(
            ours,
            theirs,
            similarity[ours, theirs],
            float(influence[0][ours.layer, ours.index]),
            float(influence[1][theirs.layer, theirs.index]),
        )
        for ours, theirs in head_map.pairs
    )
    return CircuitAlignment(value=sum(pair.value for pair in pairs) / len(pairs), pairs=pairs)


def _influence(impacts: Scores) -> Float[Tensor, "layer head"]:
    """Mean impacts over the largest |mean impact|; 0 for every measured head where all are 0; NaN where not
    measured."""
    means = impacts.mean()
    largest = means.nan_to_num(0.0).abs().max()
    return means / torch.where(largest > 0, largest, 1.0)


def _aligned(student: Head, teacher: Head, similarity: float, ours: float, theirs: float) -> AlignedInfluence:
    if ours != ours or theirs != theirs:  # NaN: not measured
        raise InputError(
            f"no ablation impact was measured for {student if ours != ours else teacher}; profile every matched head."
        )
    value = similarity * (1 - abs(ours - theirs))
    return AlignedInfluence(
        student=str(student),
        teacher=str(teacher),
        similarity=similarity,
        student_influence=ours,
        teacher_influence=theirs,
        value=value,
    )
