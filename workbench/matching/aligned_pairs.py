"""Where the two heads of a matched pair are read.

At each head's own positions (the default: where it acts in its circuit), or at one named position for both (`last` is
the paper's reading). Models with different tokenizers each read the prompts in their own tokens
(`PromptPairs.teacher`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from workbench.circuits.circuit import Circuit
from workbench.matching import HeadMap
from workbench.matching.head_rows import place
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_same_words
from workbench.values.refs import Head, Position


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedPair:
    """A matched pair with the positions at which each side is read (equally many tokens a prompt)."""

    student: Head
    teacher: Head
    student_positions: tuple[Position, ...]
    teacher_positions: tuple[Position, ...]

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
    to the same prompts.

    `broadened` reads another position in place of an own one, e.g. `{"earlier_label": "labels"}`: a head that binds the
    queried box does the same at every other box, where no label of the task says so. Errors: as `require_same_words`.
    """
    if positions != "own":
        require_same_words(prompts, [positions], [positions])
        return tuple(
            AlignedPair(student=ours, teacher=theirs, student_positions=(positions,), teacher_positions=(positions,))
            for ours, theirs in head_map.pairs
        )
    ours, theirs = (_scope(circuit, broadened) for circuit in (student_circuit, teacher_circuit))
    return tuple(_aligned(student, teacher, ours, theirs, prompts) for student, teacher in head_map.pairs)


def _scope(circuit: Circuit, broadened: Mapping[Position, Position]) -> dict[Head, tuple[Position, ...]]:
    """Where each head of a circuit is read."""
    return {
        head: tuple(dict.fromkeys(broadened.get(name, name) for name in own)) for head, own in circuit.scope.items()
    }


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
