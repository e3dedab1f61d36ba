"""Functional matching of student heads to teacher heads, and its controls.

Eq 5 of the paper sends each student head to the teacher head of the nearest ablation impact. One number per head makes
ties and collapse common, so every map says how many teacher heads it uses, each match's margin, in how many resamples
of the prompts the match comes out again, and whether it rests on impacts within noise. Other distances, and matching
inside the groups of the backward search, stand beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from workbench import seeds
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.matching.config import MatchingConfig, replace_rule
from workbench.matching.distances import Distances, Evidence, Similarities, combined_distance
from workbench.matching.head_map import HeadMap, Match, Side
from workbench.matching.noise import heads_within_noise, stability
from workbench.values.refs import Head
from workbench.values.scores import Scores

Allowed = Bool[Tensor, "student teacher"]
Choice = list[int | None]
"""The teacher head of each student head, by place; None where there is none."""


def match_heads(
    student: Scores,
    teacher: Scores,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    config: MatchingConfig,
    *,
    seed: int = 0,
    similarity: Scores | None = None,
    similarities: Similarities | None = None,
) -> HeadMap:
    """Match every head of the student's circuit to a head of the teacher's.

    `student`, `teacher`: impacts [layer head example] of the circuits' heads. `similarity` (and `similarities`, for
    stability) of the heads' outputs where the rule asks for it. One to one with fewer teacher than student heads leaves
    those unmatched that fit worst. Errors: `InputError` for an empty circuit, for rule `profile` on profiles over
    different prompts, for circuits without a role in common, and with `noise: refuse` for a match that rests on noise.
    """
    _refuse_empty(student_circuit, teacher_circuit)
    if config.rule == "random":
        return random_map(student_circuit, teacher_circuit, seed=seed, one_to_one=config.one_to_one)
    if config.rule == "shuffled":
        plain = replace(replace_rule(config, "paper"), resamples=0, noise="flag")
        return shuffled_map(
            match_heads(student, teacher, student_circuit, teacher_circuit, plain, seed=seed), seed=seed
        )
    evidence = Evidence(
        student=student,
        teacher=teacher,
        ours=student_circuit.heads,
        theirs=teacher_circuit.heads,
        similarity=similarity,
        similarities=similarities,
    )
    noisy: dict[Side, set[Head]] = {
        "student": heads_within_noise(student, config.confidence),
        "teacher": heads_within_noise(teacher, config.confidence),
    }
    head_map = _matched(evidence, _allowed(student_circuit, teacher_circuit, noisy, config), noisy, config, seed)
    if config.noise == "refuse" and head_map.within_noise:
        raise InputError(_noise_refusal(head_map))
    return head_map


def _refuse_empty(student: Circuit, teacher: Circuit) -> None:
    if not student.heads or not teacher.heads:
        name = "teacher" if student.heads else "student"
        raise InputError(
            f"the {name}'s circuit is empty: lower `least_effect` of discovery, use more prompts, or another method."
        )


def _allowed(student: Circuit, teacher: Circuit, noisy: Mapping[Side, set[Head]], config: MatchingConfig) -> Allowed:
    """Which pairs may be matched: those of a common role for rule `role`, and none within noise where such heads are
    dropped."""
    ours, theirs = student.heads, teacher.heads
    allowed = torch.ones(len(ours), len(theirs), dtype=torch.bool)
    if config.rule == "role":
        allowed = torch.tensor(
            [[bool(_roles(student, head) & _roles(teacher, other)) for other in theirs] for head in ours]
        )
        if not allowed.any():
            raise InputError(
                f"the circuits have no role in common ({', '.join(student.roles)} and {', '.join(teacher.roles)}): "
                "search both by the same stages."
            )
    if config.noise == "drop":
        allowed &= torch.tensor([[head not in noisy["student"]] for head in ours]) & torch.tensor(
            [head not in noisy["teacher"] for head in theirs]
        )
        if not allowed.any():
            raise InputError(
                "no head's impact stands out of the noise, so `noise: drop` leaves nothing to match; use more prompts "
                "or `noise: flag`."
            )
    return allowed


def _roles(circuit: Circuit, head: Head) -> set[str]:
    return {member.role for member in circuit.members if member.head == head}


def _refuse_too_few(ours: int, theirs: int) -> None:
    if ours > theirs:
        raise InputError(
            f"one-to-one matching needs at least as many teacher heads ({theirs}) as student heads ({ours}); allow "
            "many-to-one."
        )


def _matched(
    evidence: Evidence, allowed: Allowed, noisy: Mapping[Side, set[Head]], config: MatchingConfig, seed: int
) -> HeadMap:
    def measured(each: Evidence) -> Distances:
        return combined_distance(each, config.distances, config.scale)

    distances = measured(evidence)
    choice = assigned(distances, allowed, one_to_one=config.one_to_one)
    stable = [None] * len(choice)
    if config.resamples and ("similarity" not in config.distances or evidence.similarities is not None):
        stable = stability(
            choice,
            lambda draw: assigned(measured(evidence.resampled(seed, draw)), allowed, one_to_one=config.one_to_one),
            resamples=config.resamples,
        )
    matches = tuple(
        _match(distances[row], allowed[row], evidence, (row, column), stable[row], noisy)
        for row, column in enumerate(choice)
        if column is not None
    )
    left = tuple(head for head, column in zip(evidence.ours, choice, strict=True) if column is None)
    return HeadMap(matches=matches, rule=config.rule, one_to_one=config.one_to_one, unmatched=left)


def assigned(distances: Distances, allowed: Allowed, *, one_to_one: bool) -> Choice:
    """The nearest allowed teacher head of each student head; one to one, the assignment that matches most heads at the
    least sum."""
    if not one_to_one:
        nearest = torch.where(allowed, distances, torch.inf).argmin(1).tolist()
        return [column if some else None for column, some in zip(nearest, allowed.any(1).tolist(), strict=True)]
    costs = distances
    if not allowed.all():  # a forbidden pair costs more than any allowed assignment could save
        span = float(distances.max() - distances.min()) + 1
        costs = torch.where(allowed, distances - distances.min(), span * (len(distances) + 1))
    choice: Choice = [None] * len(distances)
    for row, column in zip(*linear_sum_assignment(costs.numpy()), strict=True):
        if allowed[row, column]:
            choice[row] = int(column)
    return choice


def _match(
    distances: Float[Tensor, " teacher"],
    allowed: Bool[Tensor, " teacher"],
    evidence: Evidence,
    place: tuple[int, int],
    stable: float | None,
    noisy: Mapping[Side, set[Head]],
) -> Match:
    row, column = place
    head, other = evidence.ours[row], evidence.theirs[column]
    rest = torch.cat([distances[:column], distances[column + 1 :]])[
        torch.cat([allowed[:column], allowed[column + 1 :]])
    ]
    sides: Sequence[tuple[Side, Head]] = (("student", head), ("teacher", other))
    return Match(
        student=head,
        teacher=other,
        distance=float(distances[column]),
        margin=float(rest.min() - distances[column]) if len(rest) else None,
        stability=stable,
        noise=tuple(side for side, each in sides if each in noisy[side]),
    )


def _noise_refusal(head_map: HeadMap) -> str:
    named = [f"{m.student} ~ {m.teacher} ({' and '.join(m.noise)})" for m in head_map.matches if m.noise]
    return (
        f"{len(named)} of {len(head_map.matches)} matches rest on impacts within noise: {', '.join(named[:6])}; use "
        "more discovery prompts, a continuous "
        "metric, or `noise: drop`."
    )


def random_map(student_circuit: Circuit, teacher_circuit: Circuit, *, seed: int, one_to_one: bool = False) -> HeadMap:
    """Control: each circuit head of the student to any head of the teacher, drawn with replacement (one to one:
    without)."""
    draw = seeds.chooser(seed, "random map")
    everyone = [
        Head(layer, index) for layer in range(teacher_circuit.shape[0]) for index in range(teacher_circuit.shape[1])
    ]
    ours = student_circuit.heads
    if one_to_one:
        _refuse_too_few(len(ours), len(everyone))
    drawn = draw.sample(everyone, len(ours)) if one_to_one else [draw.choice(everyone) for _ in ours]
    matches = tuple(
        Match(student=head, teacher=other, distance=None, margin=None) for head, other in zip(ours, drawn, strict=True)
    )
    return HeadMap(matches=matches, rule="random", one_to_one=one_to_one)


def shuffled_map(head_map: HeadMap, *, seed: int) -> HeadMap:
    """Control: the same teacher heads, handed to other student heads (as many changed as can be)."""
    teachers = [match.teacher for match in head_map.matches]
    draw = seeds.chooser(seed, "shuffled map")
    candidates = [draw.sample(teachers, len(teachers)) for _ in range(200)]
    best = max(candidates, key=lambda order: sum(a != b for a, b in zip(order, teachers, strict=True)))
    matches = tuple(
        Match(student=m.student, teacher=teacher, distance=None, margin=None)
        for m, teacher in zip(head_map.matches, best, strict=True)
    )
    return replace(head_map, matches=matches, rule="shuffled")
