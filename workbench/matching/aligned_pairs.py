"""Where the two heads of a matched pair are read.

At each head's own positions (the default: where it acts in its circuit), or at one named position for both (`last` is
the paper's reading). Models with different tokenizers each read the prompts in their own tokens
(`PromptPairs.teacher`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.matching import HeadMap
from workbench.matching.head_rows import place
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_same_words
from workbench.values.refs import Head, Position
from workbench.values.scores import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedPair:
    """A matched pair with the positions at which each side is read (equally many tokens a prompt)."""

    student: Head
    teacher: Head
    student_positions: tuple[Position, ...]
    teacher_positions: tuple[Position, ...]
    weight: float = field(default=1.0, repr=False)
    """Of the pair in the alignment loss, beside the others."""

    def __str__(self) -> str:
        return f"{self.student}~{self.teacher}"


def aligned_pairs(
    head_map: HeadMap,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    prompts: PromptPairs,
    *,
    positions: str = "own",
    broadened: Mapping[Position, Position] = MappingProxyType({}),
) -> tuple[AlignedPair, ...]:
    """Each match with its positions. With `own`, a teacher head outside its circuit (random control) is read where its
    student head acts, and so is one whose own positions hold another number of tokens: rows of both sides must belong
    to the same prompts. `own+last` adds a named position to each head's own.

    `broadened` reads another position in place of an own one, e.g. `{"earlier_label": "labels"}`: a head that binds the
    queried box does the same at every other box, where no label of the task says so. Errors: as `require_same_words`.
    """
    if not is_own(positions):
        require_same_words(prompts, [positions], [positions])
        return tuple(
            AlignedPair(student=ours, teacher=theirs, student_positions=(positions,), teacher_positions=(positions,))
            for ours, theirs in head_map.pairs
        )
    ours, theirs = (own_scope(circuit, positions, broadened) for circuit in (student_circuit, teacher_circuit))
    return tuple(_aligned(student, teacher, ours, theirs, prompts) for student, teacher in head_map.pairs)


def is_own(positions: str) -> bool:
    """Whether heads are read where each acts: `own`, or `own+NAME` with another position beside."""
    return positions == "own" or positions.startswith("own+")


def own_scope(
    circuit: Circuit, positions: str = "own", broadened: Mapping[Position, Position] = MappingProxyType({})
) -> dict[Head, tuple[Position, ...]]:
    """Where each head of a circuit is read; nothing for one named position for all."""
    if not is_own(positions):
        return {}
    beside = positions.split("+")[1:]
    return {
        head: tuple(dict.fromkeys([*(broadened.get(name, name) for name in own), *beside]))
        for head, own in circuit.scope.items()
    }


def weighted_by_impact(pairs: Sequence[AlignedPair], impacts: Scores) -> tuple[AlignedPair, ...]:
    """The pairs weighted by the size of the mean ablation impact of their student's head, over the mean of these: the
    weights' mean is 1, so that lambda keeps its meaning. Errors: `InputError` for a head without an impact."""
    means = impacts.mean().abs()
    sizes = [float(means[pair.student.layer, pair.student.index]) for pair in pairs]
    missing = [str(pair.student) for pair, size in zip(pairs, sizes, strict=True) if math.isnan(size)]
    if missing:
        raise InputError(f"no ablation impact was measured for {', '.join(missing)}; profile every matched head.")
    average = sum(sizes) / max(len(sizes), 1)
    return tuple(
        replace(pair, weight=size / average if average else 1.0) for pair, size in zip(pairs, sizes, strict=True)
    )


def _aligned(
    student: Head,
    teacher: Head,
    ours: Mapping[Head, tuple[Position, ...]],
    theirs: Mapping[Head, tuple[Position, ...]],
    prompts: PromptPairs,
) -> AlignedPair:
    mine = ours.get(student, ("last",))
    other = theirs.get(teacher, mine)
    if not torch.equal(place(prompts, mine).sum(1), place(prompts.for_teacher, other).sum(1)):
        other = mine
    require_same_words(prompts, mine, other)
    return AlignedPair(student=student, teacher=teacher, student_positions=mine, teacher_positions=other)
