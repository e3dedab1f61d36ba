"""Distances between student heads and teacher heads: by ablation impact (eq 3 to 5 of the paper), by similarity of
outputs, combined.

    dP_s(h) = P_s - P_s without h        dP_t(h) = P_s - P_t without h        paper: |dP_s(h_s) - dP_t(h_t)|

The teacher's impact is taken against the *student's* baseline P_s, as the paper has it: P_s cancels, so distance
`paper` is small for heads of equal ablated performance. Impacts come as profiles from `ablation_profiles`: [layer head
example], whole minus ablated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError
from workbench.matching.config import Distance
from workbench.values.refs import Head
from workbench.values.scores import Scores

Distances = Float[Tensor, "student teacher"]
Heads = tuple[Head, ...]
Similarities = Callable[[Int[Tensor, " rows"]], Scores]
"""Prompts -> the similarity [student teacher] of the heads on these prompts alone."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What is known of two circuits' heads: their impacts, and the similarity of their outputs where it was
    measured."""

    student: Scores
    teacher: Scores
    ours: Heads
    theirs: Heads
    similarity: Scores | None = None
    similarities: Similarities | None = None

    def impacts(self, side: Literal["student", "teacher"]) -> Float[Tensor, "head example"]:
        """The impacts of a side's heads. Errors: `InputError` where one was not measured."""
        profile, heads = (self.student, self.ours) if side == "student" else (self.teacher, self.theirs)
        impacts = torch.stack([profile.at(head) for head in heads]).double()
        if impacts.isnan().any():
            missing = [str(head) for head, row in zip(heads, impacts, strict=True) if row.isnan().any()]
            raise InputError(
                f"no ablation impact was measured for {', '.join(missing)}; profile every head of the circuit."
            )
        return impacts

    def mean_impacts(self) -> tuple[Float[Tensor, " student"], Float[Tensor, " teacher"]]:
        """The mean impact of each head of both sides."""
        return self.impacts("student").mean(-1), self.impacts("teacher").mean(-1)

    def resampled(self, seed: int, draw: int) -> "Evidence":
        """The same on resampled prompts: impacts on a bootstrap draw (both sides on the same prompts), similarity on a
        random 63 % of the prompts, as many as a bootstrap draws at least once; a prompt that came twice would be a pair
        of equal rows, likeness to CKA.

        The baselines stay those of all prompts, for they are not kept prompt by prompt.
        """
        sides = {
            name: _bootstrap(profile, seed, draw)
            for name, profile in (("student", self.student), ("teacher", self.teacher))
        }
        if self.similarities is None:
            return replace(self, similarity=None, **sides)
        count = self.student.values.shape[-1]
        some = torch.randperm(count, generator=seeds.generator(seed, "prompts", draw))[: max(4, round(0.632 * count))]
        return replace(self, similarity=self.similarities(some.sort().values), **sides)


def _bootstrap(profile: Scores, seed: int, draw: int) -> Scores:
    count = profile.values.shape[-1]
    rows = torch.randint(0, count, (count,), generator=seeds.generator(seed, "bootstrap", draw))
    return replace(profile, values=profile.values[..., rows])


def _baseline(profile: Scores) -> float:
    if profile.baseline is None:
        raise InputError(
            "an ablation profile needs its baseline (the whole model's metric); make it with `ablation_profiles`."
        )
    return profile.baseline


def paper_distance(evidence: Evidence) -> Distances:
    """Eq 5: |dP_s(h_s) - dP_t(h_t)| with both impacts against the student's baseline (eq 3, 4)."""
    p_s = _baseline(evidence.student)
    ours, theirs = evidence.mean_impacts()
    without = _baseline(evidence.teacher) - theirs
    return (ours[:, None] - (p_s - without)[None]).abs()


def own_baseline_distance(evidence: Evidence) -> Distances:
    """|impact - impact|, each model against its own baseline."""
    ours, theirs = evidence.mean_impacts()
    return (ours[:, None] - theirs[None]).abs()


def normalised_distance(evidence: Evidence) -> Distances:
    """|impact / largest |impact| - the same of the teacher|."""
    ours, theirs = (normalised_impacts(impacts) for impacts in evidence.mean_impacts())
    return (ours[:, None] - theirs[None]).abs()


def normalised_impacts(impacts: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """Impacts over the largest |impact| of the circuit: from -1 to 1."""
    return impacts / impacts.abs().max().clamp(min=torch.finfo(impacts.dtype).tiny)


def profile_distance(evidence: Evidence) -> Distances:
    """1 - correlation of the impacts over the same examples; a constant profile correlates 0 with everything."""
    a, b = evidence.impacts("student"), evidence.impacts("teacher")
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"rule `profile` compares impacts prompt by prompt; got {a.shape[1]} and {b.shape[1]} prompts. Profile "
            "both models on the same pairs."
        )
    a, b = (value - value.mean(-1, keepdim=True) for value in (a, b))
    a, b = (value / value.norm(dim=-1, keepdim=True).clamp(min=1e-12) for value in (a, b))
    return 1 - a @ b.T


def similarity_distance(evidence: Evidence) -> Distances:
    """1 - similarity of the heads' outputs on the same prompts ([student teacher], from
    `alignment.head_similarity`)."""
    labels = {"student": tuple(map(str, evidence.ours)), "teacher": tuple(map(str, evidence.theirs))}
    if evidence.similarity is None or evidence.similarity.labels != labels:
        raise InputError(
            "rule `similarity` needs the similarity of these very heads; compute it with `alignment.head_similarity` "
            "on the two circuits."
        )
    return 1 - evidence.similarity.values.double()


DISTANCES: Mapping[Distance, Callable[[Evidence], Distances]] = {
    "paper": paper_distance,
    "own_baseline": own_baseline_distance,
    "normalised": normalised_distance,
    "profile": profile_distance,
    "similarity": similarity_distance,
}


def combined_distance(
    evidence: Evidence, weights: Mapping[Distance, float], scale: Literal["rank", "minmax"]
) -> Distances:
    """The one distance as it is, or the weighted mean of several, each scaled over all candidate pairs to [0, 1]."""
    if len(weights) == 1:
        return DISTANCES[next(iter(weights))](evidence)
    scaled = [weight * _scaled(DISTANCES[name](evidence), scale) for name, weight in weights.items()]
    return torch.stack(scaled).sum(0) / sum(weights.values())


def _scaled(distances: Distances, scale: Literal["rank", "minmax"]) -> Distances:
    if scale == "rank":
        ranks = torch.from_numpy(stats.rankdata(distances.numpy(), axis=None)).view_as(
            distances
        )  # ties share their mean rank
        return (ranks - 1) / max(distances.numel() - 1, 1)
    low, high = distances.min(), distances.max()
    return (distances - low) / (high - low) if high > low else torch.zeros_like(distances)
