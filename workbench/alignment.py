"""Which activations of a matched pair are compared, and the CKA of each pair with its shuffled floor.

A pair is compared on `hook_z` (or the head's output in the residual stream) at positions: each head's own (the default: where it acts in its
circuit), or one named position for both (`last` is the paper's reading). m, the number of examples that CKA sees, is the number of
prompts times the tokens of the position. Models with different tokenizers each read the prompts in their own tokens (`PromptPairs.teacher`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import hooks, seeds
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.matching import CircuitAlignment, HeadMap, circuit_alignment
from workbench.matching.distances import Similarities
from workbench.models import HookedModel
from workbench.refs import Head, Position
from workbench.scores import Scores
from workbench.similarity.cka import Estimator, linear_cka, shuffled_floor
from workbench.similarity.measures import NONE, Measure, Options, pairwise_similarity, similarity_scores, unit
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_readings, require_same_words

Activation = Literal["z", "result", "pattern"]
"""`hook_z` [d_head], what the head writes to the residual stream [d_model], or its attention probabilities over the keys [pos]."""


def require_fitting(measure: Measure, activation: Activation, prompts: PromptPairs) -> None:
    """Refuse attention KL on anything but attention patterns, and these where the models read different tokens."""
    if activation == "pattern" and prompts.teacher is not None:
        raise InputError("attention patterns are over the tokens of a prompt, which differ with the tokenizer; align z or result.")
    if measure == "attention_kl" and activation != "pattern":
        raise InputError(f"measure attention_kl compares attention patterns, not activation {activation}; set `activation: pattern`.")


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
    """Each match with its positions. With `own`, a teacher head outside its circuit (random control) is read where its student head acts,
    and so is one whose own positions hold another number of tokens: rows of both sides must belong to the same prompts.

    `broadened` reads another position in place of an own one, e.g. `{"earlier_label": "labels"}`: a head that binds the queried box does the
    same at every other box, where no label of the task says so. Errors: as `require_same_words`.
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
    return {head: tuple(dict.fromkeys(broadened.get(name, name) for name in own)) for head, own in circuit.scope.items()}


def _aligned(
    student: Head, teacher: Head, ours: Mapping[Head, tuple[Position, ...]], theirs: Mapping[Head, tuple[Position, ...]], prompts: PromptPairs
) -> AlignedPair:
    mine = ours.get(student, ("last",))
    other = theirs.get(teacher, mine)
    if not torch.equal(place(prompts, mine).sum(1), place(prompts.for_teacher, other).sum(1)):
        other = mine
    require_same_words(prompts, mine, other)
    return AlignedPair(student=student, teacher=teacher, student_positions=mine, teacher_positions=other)


def place(prompts: PromptPairs, positions: Sequence[Position]) -> Tensor:
    """The mask of several named positions together: [batch pos]."""
    masks = [prompts.position(position) for position in positions]
    return torch.stack(masks).any(0)


def hook_names(heads: Sequence[Head], activation: Activation = "z") -> list[str]:
    """The hooks that heads are read from, in layer order."""
    name = hooks.pattern if activation == "pattern" else hooks.z
    return [name(layer) for layer in sorted({head.layer for head in heads})]


def head_rows(
    model_weights: Mapping[int, Float[Tensor, "head d_head d_model"]] | None, activations: Mapping[str, Tensor], head: Head, where: Tensor
) -> Float[Tensor, "m features"]:
    """A head's rows at the chosen tokens, prompt by prompt; with `model_weights` (layer -> W_O) as written to the residual stream. Where
    attention patterns were captured, the rows are those of the chosen query tokens, over all keys."""
    pattern = activations.get(hooks.pattern(head.layer))
    rows = activations[hooks.z(head.layer)][:, :, head.index][where] if pattern is None else pattern[:, head.index][where]
    return rows if model_weights is None else rows @ model_weights[head.layer][head.index]


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
    def from_json(cls, value: Mapping[str, Any]) -> "PairCka":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        try:
            student, teacher = Head.parse(value["student"]), Head.parse(value["teacher"])
            ours, theirs = tuple(value["student_positions"]), tuple(value["teacher_positions"])
            pair = AlignedPair(student=student, teacher=teacher, student_positions=ours, teacher_positions=theirs)
            return cls(pair=pair, **{name: value[name] for name in ("cka", "floor", "floor_high", "rows")})
        except (KeyError, TypeError) as error:
            raise InputError(f"this is not the CKA of a pair ({error!r}); run `workbench match` or `workbench evaluate` again.") from None


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
    """CKA of every pair on these prompts with its shuffled floor. The debiased estimator has a floor of 0; the biased one's depends on m."""
    require_readings(prompts, student.tokenizer, teacher.tokenizer)
    ours = student.early_activations(prompts.clean, prompts.mask, hook_names([pair.student for pair in pairs], activation))
    theirs = teacher.early_activations(prompts.for_teacher.clean, prompts.for_teacher.mask, hook_names([pair.teacher for pair in pairs], activation))
    our_weights, their_weights = (
        output_weights(model, heads, activation) for model, heads in ((student, [p.student for p in pairs]), (teacher, [p.teacher for p in pairs]))
    )
    return [_pair_cka(x, y, pair, estimator, shuffles, seed) for pair, x, y in _rows(pairs, prompts, ours, theirs, our_weights, their_weights)]


def head_similarity(
    student: HookedModel,
    teacher: HookedModel,
    prompts: PromptPairs,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    *,
    activation: Activation = "z",
    measure: Measure = "linear_cka",
    positions: str = "own",
) -> Scores:
    """Similarity (debiased, where it is CKA) of every circuit head of the student with every one of the teacher: [student teacher].

    Both are read where the student's head acts, so that all candidates are compared on the same tokens; or at one named position.
    """
    circuits = student_circuit, teacher_circuit
    on = head_similarities(student, teacher, prompts, *circuits, activation=activation, measure=measure, positions=positions)
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
    """Similarity of every head of the student with every head of the teacher at one named position, in one batched call: [student teacher]."""
    require_fitting(measure, activation, prompts)
    require_readings(prompts, student.tokenizer, teacher.tokenizer)
    require_same_words(prompts, [position], [position])
    rows = []
    for model, side in ((student, prompts), (teacher, prompts.for_teacher)):
        _, found = model.activations(side.clean, side.mask, hook_names(model.heads, activation))
        weights, where = output_weights(model, model.heads, activation), place(side, [position])
        rows.append(torch.stack([head_rows(weights, found, head, where) for head in model.heads]))
    ours, theirs = ([str(head) for head in model.heads] for model in (student, teacher))
    return similarity_scores(rows[0], rows[1], student=ours, teacher=theirs, measure=measure, estimator=estimator, options=options)


def head_similarities(
    student: HookedModel,
    teacher: HookedModel,
    prompts: PromptPairs,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    *,
    activation: Activation = "z",
    measure: Measure = "linear_cka",
    positions: str = "own",
) -> Similarities:
    """Prompts (by index) -> `head_similarity` on them alone; the models run once, on all prompts."""
    require_fitting(measure, activation, prompts)
    rows = _CircuitRows(student, teacher, prompts, student_circuit, teacher_circuit, activation, positions)

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
    seed: int = 0,
) -> Scores:
    """Debiased CKA of every circuit head of the student with every one of the teacher, beside its floor: [student teacher draw].

    The first draw (`paired`) is the CKA, the others are the same with the teacher's rows shuffled. Read where the student's head acts, as `head_similarity`.
    """
    rows = _CircuitRows(student, teacher, prompts, student_circuit, teacher_circuit, activation, positions)
    values = torch.stack([rows.blank() for _ in range(shuffles + 1)], -1)
    for places, x, y in rows.by_scope(torch.arange(len(prompts))):
        orders = [torch.arange(y.shape[1]), *(torch.randperm(y.shape[1], generator=seeds.generator(seed, "floor", draw)) for draw in range(shuffles))]
        values[places] = torch.stack([pairwise_similarity(x, y[:, order], estimator="debiased") for order in orders], -1).to(values.dtype)
    draws = ("paired", *(f"shuffled {draw}" for draw in range(shuffles)))
    return Scores(values=values, axes=("student", "teacher", "draw"), labels={**rows.labels, "draw": draws}, unit=unit("linear_cka", "debiased"))


class _CircuitRows:
    """The activations of two circuits' heads on the same prompts, read where the student's heads act or at one position; the models run once."""

    def __init__(
        self, student: HookedModel, teacher: HookedModel, prompts: PromptPairs, ours: Circuit, theirs: Circuit, activation: Activation, positions: str
    ) -> None:
        require_readings(prompts, student.tokenizer, teacher.tokenizer)
        self.prompts, self.ours, self.theirs = prompts, ours, theirs
        self.scope = ours.scope if positions == "own" else dict.fromkeys(ours.heads, (positions,))
        sides = ((student, ours.heads, prompts), (teacher, theirs.heads, prompts.for_teacher))
        self.found = [model.activations(side.clean, side.mask, hook_names(heads, activation))[1] for model, heads, side in sides]
        self.weights = [output_weights(model, heads, activation) for model, heads, _ in sides]
        self.labels = {"student": tuple(map(str, ours.heads)), "teacher": tuple(map(str, theirs.heads))}

    def blank(self) -> Float[Tensor, "student teacher"]:
        """A matrix to fill."""
        some = next(iter(self.found[0].values()))
        shape, dtype = (len(self.ours.heads), len(self.theirs.heads)), torch.promote_types(some.dtype, torch.float32)
        return torch.full(shape, torch.nan, dtype=dtype, device=some.device)

    def by_scope(self, some: Int[Tensor, " rows"]) -> Iterator[tuple[list[int], Float[Tensor, "a m p"], Float[Tensor, "b m q"]]]:
        """For each set of positions: the student heads that act there (by place in the circuit) and their rows, and those of all teacher heads."""
        chosen = torch.isin(torch.arange(len(self.prompts)), some)[:, None].to(self.prompts.clean.device)
        for scope in dict.fromkeys(self.scope[head] for head in self.ours.heads):
            require_same_words(self.prompts, scope, scope)
            here, there = (place(side, scope) & chosen for side in (self.prompts, self.prompts.for_teacher))
            places = [at for at, head in enumerate(self.ours.heads) if self.scope[head] == scope]
            yield places, self._rows(0, [self.ours.heads[at] for at in places], here), self._rows(1, self.theirs.heads, there)

    def _rows(self, side: int, heads: Sequence[Head], where: Tensor) -> Float[Tensor, "head m features"]:
        return torch.stack([head_rows(self.weights[side], self.found[side], head, where) for head in heads]).detach()


def output_weights(model: HookedModel, heads: Sequence[Head], activation: Activation) -> dict[int, Tensor] | None:
    """W_O of the layers of some heads for activation `result`; None for the others, which need none."""
    return None if activation != "result" else {layer: model.output_weights(layer) for layer in {head.layer for head in heads}}


def _rows(
    pairs: Sequence[AlignedPair], prompts: PromptPairs, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], our_weights: Any, their_weights: Any
) -> Iterator[tuple[AlignedPair, Tensor, Tensor]]:
    for pair in pairs:
        x = head_rows(our_weights, ours, pair.student, place(prompts, pair.student_positions))
        yield pair, x, head_rows(their_weights, theirs, pair.teacher, place(prompts.for_teacher, pair.teacher_positions))


def _pair_cka(x: Tensor, y: Tensor, pair: AlignedPair, estimator: Estimator, shuffles: int, seed: int) -> PairCka:
    x, y = x.detach(), y.detach()
    if len(x) != len(y):
        raise InputError(f"{pair}: {len(x)} rows of the student against {len(y)} of the teacher; align both at one named position.")
    orders = [torch.randperm(len(y), generator=seeds.generator(seed, "floor", draw)) for draw in range(shuffles)]
    floors = torch.stack([shuffled_floor(x, y, order=order, estimator=estimator) for order in orders])
    return PairCka(
        pair=pair, cka=float(linear_cka(x, y, estimator=estimator)), floor=float(floors.mean()), floor_high=float(floors.max()), rows=len(x)
    )


def floor_warning(ckas: Sequence[PairCka]) -> str | None:
    """A warning when the matched pairs' CKA is at the shuffled floor: alignment presupposes shared geometry, and hurts without it."""
    if not ckas:
        return None
    mean, floor = (sum(getattr(c, name) for c in ckas) / len(ckas) for name in ("cka", "floor"))
    at_floor = [str(c.pair) for c in ckas if c.cka <= c.floor_high + 0.05]
    if mean - floor > 0.2 and len(at_floor) * 2 <= len(ckas):
        return None
    return (
        f"the matched pairs' mean CKA is {mean:.2f} where shuffled prompts give {floor:.2f} ({len(at_floor)} of {len(ckas)} pairs at the floor: "
        f"{', '.join(at_floor[:6])}). These models share little geometry there; the alignment term will probably hurt."
    )


def aligned_influence(head_map: HeadMap, ckas: Sequence[PairCka], student: Scores, teacher: Scores) -> tuple[CircuitAlignment, float]:
    """The influence-weighted alignment of matched heads by their CKA, and its value with the shuffled floors in place of CKA.

    `student`, `teacher`: ablation impacts. Errors: as `circuit_alignment`.
    """
    found, floor = (
        circuit_alignment(head_map, {(each.pair.student, each.pair.teacher): getattr(each, name) for each in ckas}, student, teacher)
        for name in ("cka", "floor")
    )
    return found, floor.value
