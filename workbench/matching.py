"""Functional matching of student heads to teacher heads by ablation impact (eq 3 to 5 of the paper), with its controls.

    dP_s(h) = P_s - P_s without h        dP_t(h) = P_s - P_t without h        h_s -> argmin over h_t of |dP_s(h_s) - dP_t(h_t)|

The teacher's impact is taken against the *student's* baseline P_s, as the paper has it: P_s cancels, so rule `paper` pairs heads of equal
ablated performance. One number per head makes ties and collapse common, so every map says how many teacher heads it uses and each
match's margin. Impacts come as profiles from `ablation_profile`: [layer head example], whole minus ablated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from workbench import seeds
from workbench.circuits.circuit import Circuit
from workbench.errors import InputError
from workbench.refs import Head
from workbench.scores import Scores

Rule = Literal["paper", "own_baseline", "normalised", "profile", "similarity", "random", "shuffled"]
Distances = Float[Tensor, "student teacher"]


@validated(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MatchingConfig:
    """How student heads are matched."""

    rule: Rule = "paper"
    """`paper` (eq 5), `own_baseline` (each model against its own), `normalised` (impact / largest impact), `profile` (correlation of
    impacts over examples), `similarity` (CKA of the heads' outputs, not their impact), and the controls `random` (to any head
    of the teacher) and `shuffled` (the paper's matches permuted)."""
    metric: Literal["accuracy", "log_probability", "probability", "logit_difference"] = "accuracy"
    """What an impact is measured in; the paper uses accuracy, continuous metrics have fewer ties."""
    one_to_one: bool = False
    """Assign each teacher head at most once (optimal assignment); the paper allows many-to-one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A student head and its teacher head, the distance of their impacts, and how much farther the runner-up is."""

    student: Head
    teacher: Head
    distance: float | None
    """None for the controls, which measure nothing."""
    margin: float | None
    """Distance of the second-best teacher head minus this one's; 0 is a tie, None where there is no second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMap:
    """Student heads -> teacher heads."""

    matches: tuple[Match, ...]
    rule: Rule
    one_to_one: bool

    def __post_init__(self) -> None:
        if len({match.student for match in self.matches}) != len(self.matches):
            raise InputError("a student head is matched twice; a head map has one match for each student head.")

    @property
    def pairs(self) -> tuple[tuple[Head, Head], ...]:
        """(student head, teacher head) of each match."""
        return tuple((match.student, match.teacher) for match in self.matches)

    @property
    def teacher_heads(self) -> tuple[Head, ...]:
        """The distinct teacher heads in use: few of them is the collapse of scalar matching."""
        return tuple(sorted({match.teacher for match in self.matches}))

    @property
    def ties(self) -> int:
        """Matches whose runner-up is equally near: chosen by order, not by impact."""
        return sum(match.margin == 0 for match in self.matches)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        matches = [{"student": str(m.student), "teacher": str(m.teacher), "distance": m.distance, "margin": m.margin} for m in self.matches]
        return {
            "matches": matches,
            "rule": self.rule,
            "one_to_one": self.one_to_one,
            "teacher_heads_used": len(self.teacher_heads),
            "ties": self.ties,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "HeadMap":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        try:
            matches = tuple(
                Match(student=Head.parse(m["student"]), teacher=Head.parse(m["teacher"]), distance=m["distance"], margin=m["margin"])
                for m in value["matches"]
            )
            return cls(matches=matches, rule=value["rule"], one_to_one=value["one_to_one"])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"this is not a head map ({error!r}); it needs matches (student, teacher, distance, margin), rule and one_to_one."
            ) from None


def match_heads(
    student: Scores,
    teacher: Scores,
    student_circuit: Circuit,
    teacher_circuit: Circuit,
    config: MatchingConfig,
    *,
    seed: int = 0,
    similarity: Scores | None = None,
) -> HeadMap:
    """Match every head of the student's circuit to a head of the teacher's.

    `student`, `teacher`: impacts [layer head example] of the circuits' heads. Errors: `InputError` for an empty circuit, for rule `profile`
    on profiles over different prompts, for one-to-one with fewer teacher than student heads.
    """
    ours, theirs = student_circuit.heads, teacher_circuit.heads
    if not ours or not theirs:
        raise InputError(
            f"the {'student' if not ours else 'teacher'}'s circuit is empty: lower `least_effect` of discovery, use more prompts, or another method."
        )
    if config.rule == "random":
        return random_map(student_circuit, teacher_circuit, seed=seed)
    if config.rule == "shuffled":
        return shuffled_map(match_heads(student, teacher, student_circuit, teacher_circuit, replace_rule(config, "paper"), seed=seed), seed=seed)
    if config.one_to_one and len(ours) > len(theirs):
        raise InputError(
            f"one-to-one matching needs at least as many teacher heads ({len(theirs)}) as student heads ({len(ours)}); allow many-to-one."
        )
    if config.rule == "similarity":
        distances = similarity_distance(similarity, ours, theirs)
    else:
        distances = DISTANCES[config.rule](student, teacher, ours, theirs)
    columns = linear_sum_assignment(distances.numpy())[1].tolist() if config.one_to_one else distances.argmin(1).tolist()
    matches = tuple(_match(distances[row], head, theirs, column) for row, (head, column) in enumerate(zip(ours, columns, strict=True)))
    return HeadMap(matches=matches, rule=config.rule, one_to_one=config.one_to_one)


def _match(distances: Float[Tensor, " teacher"], head: Head, theirs: tuple[Head, ...], column: int) -> Match:
    rest = torch.cat([distances[:column], distances[column + 1 :]])
    margin = float(rest.min() - distances[column]) if len(rest) else None
    return Match(student=head, teacher=theirs[column], distance=float(distances[column]), margin=margin)


def _impacts(profile: Scores, heads: tuple[Head, ...]) -> Float[Tensor, "head example"]:
    impacts = torch.stack([profile.at(head) for head in heads]).double()
    if impacts.isnan().any():
        missing = [str(head) for head, row in zip(heads, impacts, strict=True) if row.isnan().any()]
        raise InputError(f"no ablation impact was measured for {', '.join(missing)}; profile every head of the circuit.")
    return impacts


def _baseline(profile: Scores) -> float:
    if profile.baseline is None:
        raise InputError("an ablation profile needs its baseline (the whole model's metric); make it with `ablation_profile`.")
    return profile.baseline


def paper_distance(student: Scores, teacher: Scores, ours: tuple[Head, ...], theirs: tuple[Head, ...]) -> Distances:
    """Eq 5: |dP_s(h_s) - dP_t(h_t)| with both impacts against the student's baseline (eq 3, 4)."""
    p_s = _baseline(student)
    without = _baseline(teacher) - _impacts(teacher, theirs).mean(-1)
    return (_impacts(student, ours).mean(-1)[:, None] - (p_s - without)[None]).abs()


def own_baseline_distance(student: Scores, teacher: Scores, ours: tuple[Head, ...], theirs: tuple[Head, ...]) -> Distances:
    """|impact - impact|, each model against its own baseline."""
    return (_impacts(student, ours).mean(-1)[:, None] - _impacts(teacher, theirs).mean(-1)[None]).abs()


def normalised_distance(student: Scores, teacher: Scores, ours: tuple[Head, ...], theirs: tuple[Head, ...]) -> Distances:
    """|impact / largest |impact| - the same of the teacher|."""
    a, b = (_impacts(profile, heads).mean(-1) for profile, heads in ((student, ours), (teacher, theirs)))
    a, b = (value / value.abs().max().clamp(min=torch.finfo(value.dtype).tiny) for value in (a, b))
    return (a[:, None] - b[None]).abs()


def profile_distance(student: Scores, teacher: Scores, ours: tuple[Head, ...], theirs: tuple[Head, ...]) -> Distances:
    """1 - correlation of the impacts over the same examples; a constant profile correlates 0 with everything."""
    a, b = _impacts(student, ours), _impacts(teacher, theirs)
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"rule `profile` compares impacts prompt by prompt; got {a.shape[1]} and {b.shape[1]} prompts. Profile both models on the same pairs."
        )
    a, b = (value - value.mean(-1, keepdim=True) for value in (a, b))
    a, b = (value / value.norm(dim=-1, keepdim=True).clamp(min=1e-12) for value in (a, b))
    return 1 - a @ b.T


def similarity_distance(similarity: Scores | None, ours: tuple[Head, ...], theirs: tuple[Head, ...]) -> Distances:
    """1 - similarity of the heads' outputs on the same prompts ([student teacher], from `alignment.head_similarity`)."""
    if similarity is None or similarity.labels != {"student": tuple(map(str, ours)), "teacher": tuple(map(str, theirs))}:
        raise InputError(
            "rule `similarity` needs the similarity of these very heads; compute it with `alignment.head_similarity` on the two circuits."
        )
    return 1 - similarity.values.double()


DISTANCES = {"paper": paper_distance, "own_baseline": own_baseline_distance, "normalised": normalised_distance, "profile": profile_distance}


def replace_rule(config: MatchingConfig, rule: Rule) -> MatchingConfig:
    """The same configuration with another rule."""
    return replace(config, rule=rule)


def random_map(student_circuit: Circuit, teacher_circuit: Circuit, *, seed: int) -> HeadMap:
    """Control: each circuit head of the student to any head of the teacher, drawn with replacement."""
    draw = seeds.chooser(seed, "random map")
    everyone = [Head(layer, index) for layer in range(teacher_circuit.shape[0]) for index in range(teacher_circuit.shape[1])]
    matches = tuple(Match(student=head, teacher=draw.choice(everyone), distance=None, margin=None) for head in student_circuit.heads)
    return HeadMap(matches=matches, rule="random", one_to_one=False)


def shuffled_map(head_map: HeadMap, *, seed: int) -> HeadMap:
    """Control: the same teacher heads, handed to other student heads (as many changed as can be)."""
    teachers = [match.teacher for match in head_map.matches]
    draw = seeds.chooser(seed, "shuffled map")
    candidates = [draw.sample(teachers, len(teachers)) for _ in range(200)]
    best = max(candidates, key=lambda order: sum(a != b for a, b in zip(order, teachers, strict=True)))
    matches = tuple(replace(match, teacher=teacher, distance=None, margin=None) for match, teacher in zip(head_map.matches, best, strict=True))
    return replace(head_map, matches=matches, rule="shuffled")
