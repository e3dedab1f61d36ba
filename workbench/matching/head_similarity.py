"""How alike every head of the student is to every head of the teacher, read on the same prompts and tokens."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from workbench import seeds
from workbench.circuits.circuit import Circuit
from workbench.matching.aligned_pairs import own_scope
from workbench.matching.config import Compared
from workbench.matching.distances import Similarities
from workbench.matching.head_rows import (
    Activation,
    difference,
    head_rows,
    hook_names,
    output_weights,
    place,
    read,
    require_fitting,
)
from workbench.models.hooked_model import HookedModel
from workbench.patching.counterfactual import early_corrupt_activations
from workbench.similarity.cka import Estimator
from workbench.similarity.measures import NONE, Measure, Options, pairwise_similarity, similarity_scores, unit
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_readings, require_same_words
from workbench.values.refs import Head, Position
from workbench.values.scores import Scores


class Reading(TypedDict, total=False):
    """What of the heads is read, and where."""

    activation: Activation
    """`z` unless set."""
    positions: str
    """`own` unless set: where the student's head acts."""
    compared: Compared
    """`activations` of the clean prompts unless set."""


def head_similarity(
    student: HookedModel,
    teacher: HookedModel,
    prompts: PromptPairs,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    *,
    measure: Measure = "linear_cka",
    **reading: Unpack[Reading],
) -> Scores:
    """Similarity (debiased, where it is CKA) of every circuit head of the student with every one of the teacher:
    [student teacher].

    Both are read where the student's head acts, so that all candidates are compared on the same tokens; or at one named
    position.
    """
    circuits = student_circuit, teacher_circuit
    on = head_similarities(student, teacher, prompts, *circuits, measure=measure, **reading)
    return on(torch.arange(len(prompts)))


def all_head_similarity(
    student: HookedModel,
    teacher: HookedModel,
    prompts: PromptPairs,
    *,
    position: Position = "last",
    activation: Activation = "z",
    measure: Measure = "linear_cka",
    estimator: Estimator = "debiased",
    options: Options = NONE,
) -> Scores:
    """Similarity of every head of the student with every head of the teacher at one named position, in one batched
    call: [student teacher]."""
    require_fitting(measure, activation, prompts)
    require_readings(prompts, student.tokenizer, teacher.tokenizer)
    require_same_words(prompts, [position], [position])
    rows = []
    for model, side in ((student, prompts), (teacher, prompts.for_teacher)):
        _, activations = model.activations(side.clean, side.mask, hook_names(model.heads, activation))
        weights, where = output_weights(model, model.heads, activation), place(side, [position])
        rows.append(torch.stack([head_rows(weights, activations, head, where) for head in model.heads]))
    ours, theirs = ([str(head) for head in model.heads] for model in (student, teacher))
    return similarity_scores(
        rows[0], rows[1], student=ours, teacher=theirs, measure=measure, estimator=estimator, options=options
    )


def head_similarities(
    student: HookedModel,
    teacher: HookedModel,
    prompts: PromptPairs,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    *,
    measure: Measure = "linear_cka",
    **reading: Unpack[Reading],
) -> Similarities:
    """Prompts (by index) -> `head_similarity` on them alone; the models run once, on all prompts."""
    require_fitting(measure, reading.get("activation", "z"), prompts, reading.get("compared", "activations"))
    rows = _CircuitRows(student, teacher, prompts, (student_circuit, teacher_circuit), **reading)

    def on(some: Int[Tensor, " rows"]) -> Scores:
        values = rows.blank()
        for places, x, y in rows.by_scope(some):
            values[places] = pairwise_similarity(x, y, measure=measure, estimator="debiased").to(values.dtype)
        return Scores(values=values, axes=("student", "teacher"), labels=rows.labels, unit=unit(measure, "debiased"))

    return on


def circuit_ckas(
    student: HookedModel,
    teacher: HookedModel,
    prompts: PromptPairs,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    *,
    activation: Activation = "z",
    positions: str = "own",
    shuffles: int = 8,
) -> Scores:
    """Debiased CKA of every circuit head of the student with every one of the teacher, beside its floor: [student
    teacher draw].

    The first draw (`paired`) is the CKA, the others are the same with the teacher's rows shuffled. Read where the
    student's head acts, as `head_similarity`.
    """
    circuits = student_circuit, teacher_circuit
    rows = _CircuitRows(student, teacher, prompts, circuits, activation=activation, positions=positions)
    values = torch.stack([rows.blank() for _ in range(shuffles + 1)], -1)
    for places, x, y in rows.by_scope(torch.arange(len(prompts))):
        orders = [
            torch.arange(y.shape[1]),
            *(torch.randperm(y.shape[1], generator=seeds.generator(0, "floor", draw)) for draw in range(shuffles)),
        ]
        values[places] = torch.stack(
            [pairwise_similarity(x, y[:, order], estimator="debiased") for order in orders], -1
        ).to(values.dtype)
    draws = ("paired", *(f"shuffled {draw}" for draw in range(shuffles)))
    return Scores(
        values=values,
        axes=("student", "teacher", "draw"),
        labels={**rows.labels, "draw": draws},
        unit=unit("linear_cka", "debiased"),
    )


def _read(model: HookedModel, prompts: PromptPairs, names: Sequence[str], compared: Compared) -> dict[str, Tensor]:
    """Activations of the clean prompts by hook name, or clean minus corrupt."""
    clean = read(model, prompts, names)
    return clean if compared == "activations" else difference(clean, early_corrupt_activations(model, prompts, names))


class _CircuitRows:
    """The activations of two circuits' heads on the same prompts, read where the student's heads act or at one
    position; the models run once."""

    def __init__(
        self,
        student: HookedModel,
        teacher: HookedModel,
        prompts: PromptPairs,
        circuits: tuple[Circuit, Circuit],
        *,
        activation: Activation = "z",
        positions: str = "own",
        compared: Compared = "activations",
    ) -> None:
        require_readings(prompts, student.tokenizer, teacher.tokenizer)
        ours, theirs = circuits
        self.prompts, self.ours, self.theirs = prompts, ours, theirs
        self.scope = own_scope(ours, positions) or dict.fromkeys(ours.heads, (positions,))
        sides = ((student, ours.heads, prompts), (teacher, theirs.heads, prompts.for_teacher))
        for side, scope in ((side, scope) for *_, side in sides for scope in self.scope.values()):
            if compared == "differences":
                side.require_counterparts(place(side, scope))
        self.activations = [_read(model, side, hook_names(heads, activation), compared) for model, heads, side in sides]
        self.weights = [output_weights(model, heads, activation) for model, heads, _ in sides]
        self.labels = {"student": tuple(map(str, ours.heads)), "teacher": tuple(map(str, theirs.heads))}

    def blank(self) -> Float[Tensor, "student teacher"]:
        """A matrix to fill."""
        some = next(iter(self.activations[0].values()))
        shape, dtype = (len(self.ours.heads), len(self.theirs.heads)), torch.promote_types(some.dtype, torch.float32)
        return torch.full(shape, torch.nan, dtype=dtype, device=some.device)

    def by_scope(
        self, some: Int[Tensor, " rows"]
    ) -> Iterator[tuple[list[int], Float[Tensor, "a m p"], Float[Tensor, "b m q"]]]:
        """For each set of positions: the student heads that act there (by place in the circuit) and their rows, and
        those of all teacher heads."""
        chosen = torch.isin(torch.arange(len(self.prompts)), some)[:, None].to(self.prompts.clean.device)
        for scope in dict.fromkeys(self.scope[head] for head in self.ours.heads):
            require_same_words(self.prompts, scope, scope)
            here, there = (place(side, scope) & chosen for side in (self.prompts, self.prompts.for_teacher))
            places = [at for at, head in enumerate(self.ours.heads) if self.scope[head] == scope]
            yield (
                places,
                self._rows(0, [self.ours.heads[at] for at in places], here),
                self._rows(1, self.theirs.heads, there),
            )

    def _rows(self, side: int, heads: Sequence[Head], where: Tensor) -> Float[Tensor, "head m features"]:
        return torch.stack(
            [head_rows(self.weights[side], self.activations[side], head, where) for head in heads]
        ).detach()
