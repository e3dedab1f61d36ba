"""Which edges a circuit of a given size holds, chosen from scores of edges.

- by signed score (`highest`: MIB's choice for CPR) or by its size (`magnitude`: for CMD);
- `greedy`: from the logits upward, the best edge into what is in the circuit, each time (EAP-IG's library);
- bootstrap: edges whose mean score keeps its sign when the prompts are resampled come before all others;
- positive-negative ratio: a share of the edges by signed score, the rest by size.

The last two are those of Nikankin et al. 2025 (arXiv 2510.25786), as their abstract states them; `positive=1` is the
choice by signed score, `positive=0` the one by size. Sizes count edges as MIB does, with a k and a v for every query
head: with grouped-query attention an edge into a group's k counts once for each of its heads, each with its part of the
score.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench import seeds
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.edge import Edge
from workbench.errors import InputError
from workbench.patching.attribution import Edges
from workbench.values.refs import Head, Mlp
from workbench.values.scores import Scores

EDGES_AT_ONCE = 2**16
"""How many edges are resampled at a time."""
Mask = Bool[Tensor, "sender receiver"]
"""Which edges are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSelection:
    """How edges are chosen."""

    by: Literal["highest", "magnitude"] = "magnitude"
    """What comes first: what helps most, or what does most."""
    greedy: bool = False
    """From the logits upward, so that every edge leads to them."""
    positive: float | None = None
    """Share of the edges that are chosen by signed score, the rest by size; None: all by `by`."""
    resamples: int = 0
    """How often the prompts are resampled; 0: no edge is set back."""
    level: float = 0.95
    """Of the bootstrap interval that must not hold 0."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positive is not None and (self.greedy or not 0 <= self.positive <= 1):
            raise InputError("`positive` is a share from 0 to 1, of edges that are not chosen greedily.")
        if self.resamples < 0 or not 0 < self.level < 1:
            raise InputError("`resamples` is at least 0, and `level` lies between 0 and 1.")

    def __str__(self) -> str:
        ways = ["greedy, " * self.greedy + self.by if self.positive is None else f"{self.positive:.0%} by signed score"]
        return ", ".join([*ways, *([f"stable over {self.resamples} resamples first"] if self.resamples else [])])

    def ranking(self, scores: Scores) -> "Ranking":
        """Scores made ready to choose from. Errors: `InputError` for scores that are not of all edges of a model."""
        return Ranking(scores, self)


class Ranking:
    """Edges in the order in which they are chosen, for circuits of any size."""

    def __init__(self, scores: Scores, selection: EdgeSelection) -> None:
        self.edges, self.selection, self.means = edges_of(scores), selection, scores.mean()
        self.there, self.counts = ~self.means.isnan(), self.edges.counts()
        back = torch.zeros_like(self.means)
        if selection.resamples:
            back[~stable(scores, resamples=selection.resamples, level=selection.level, seed=selection.seed)] = 1.0
        span = 2 * float(self.means[self.there].abs().max()) + 1.0
        each = self.means / self.counts  # of one edge, as MIB counts them
        self.signed, self.size = each - span * back, each.abs() - span * back
        self.key = self.signed if selection.by == "highest" else self.size

    @property
    def total(self) -> int:
        """All edges, as MIB counts them."""
        return int((self.there * self.counts).sum())

    def choose(self, count: int) -> Mask:
        """The edges of a circuit of this many (or as many fewer as the next edge would be too many)."""
        nothing = torch.zeros_like(self.there)
        if self.selection.greedy:
            return self._greedily(count)
        if self.selection.positive is None:
            return self._filled(nothing, self.key, float(count))
        return self._filled(
            self._filled(nothing, self.signed, self.selection.positive * float(count)), self.size, float(count)
        )

    def _filled(self, chosen: Mask, key: Float[Tensor, "sender receiver"], count: float) -> Mask:
        open_ = self.there & ~chosen
        order = torch.where(open_, key, -torch.inf).flatten().argsort(descending=True, stable=True)[: int(open_.sum())]
        weights = self.counts.repeat(len(self.there))[order].double().cumsum(0) + float((chosen * self.counts).sum())
        filled = chosen.flatten().clone()
        filled[order[weights <= count]] = True
        return filled.view_as(chosen)

    def _greedily(self, count: int) -> Mask:
        feeds, chosen, left = self.edges.feeds(), torch.zeros_like(self.there), float(count)
        columns: dict[int, list[int]] = {
            sender: feeds[:, sender].nonzero().flatten().tolist() for sender in range(len(self.there))
        }
        seen, entered = set[int](), set[int]()
        heap: list[tuple[float, int, int]] = []

        def enter(receivers: list[int]) -> None:
            for receiver in receivers:
                if receiver not in entered:
                    entered.add(receiver)
                    for sender in self.there[:, receiver].nonzero().flatten().tolist():
                        heapq.heappush(heap, (-float(self.key[sender, receiver]), sender, receiver))

        enter([len(self.counts) - 1])
        while heap:
            _, sender, receiver = heapq.heappop(heap)
            left -= float(self.counts[receiver])
            if left < 0:
                break
            chosen[sender, receiver] = True
            if sender not in seen:
                seen.add(sender)
                enter(columns[sender])
        return chosen

    def circuit(self, count: int, *, method: str) -> Circuit:
        """The circuit of this many edges, without those that lead nowhere."""
        return edge_circuit(self.edges, self.edges.pruned(self.choose(count)), scores=self.means, method=method)


def stable(scores: Scores, *, resamples: int, level: float = 0.95, seed: int = 0) -> Mask:
    """Edges whose mean keeps its sign over resampled prompts: the bootstrap interval does not hold 0.

    Errors: `InputError` without scores per prompt, or with those of one prompt.
    """
    if not scores.per_example or scores.values.shape[-1] < 2:
        raise InputError("a bootstrap needs scores of at least two prompts; keep the values per example.")
    flat, examples = scores.values.flatten(0, 1), scores.values.shape[-1]
    draws = torch.randint(0, examples, (resamples, examples), generator=seeds.generator(seed, "bootstrap of edges"))
    weights = torch.zeros(resamples, examples).scatter_add_(1, draws, torch.ones(draws.shape)) / examples
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2])
    selected = []
    for part in flat.float().split(EDGES_AT_ONCE):
        low, high = (part @ weights.T).quantile(tails, dim=1)
        selected.append((low > 0) | (high < 0))
    return torch.cat(selected).view(scores.values.shape[:2])


def edges_of(scores: Scores) -> Edges:
    """The graph that scores of edges are of. Errors: `InputError` where their labels are not those of a whole model."""
    names: Mapping[str, tuple[str, ...]] = scores.labels
    senders, receivers = names.get("sender", ()), names.get("receiver", ())
    layers = sum(name.startswith("M") for name in senders)
    kinds = [sum(name.startswith("L0H") and name.endswith(kind) for name in receivers) for kind in (".q", ".k")]
    if scores.axes[:2] == ("sender", "receiver") and layers and all(kinds):
        edges = Edges.of_shape(layers, *kinds)
        if edges.labels == {"sender": senders, "receiver": receivers}:
            return edges
    raise InputError("these are not scores of all edges of a model; make them with `attribute_edges`.")


def edge_circuit(edges: Edges, present: Mask, *, scores: Float[Tensor, "sender receiver"], method: str) -> Circuit:
    """The circuit of some edges: its nodes are those that an edge leads out of."""
    senders = [sender for sender, any_ in zip(edges.senders, present.any(1).tolist(), strict=True) if any_]
    layers = sum(isinstance(sender, Mlp) for sender in edges.senders)
    return Circuit.of(
        [Member(sender, "edges", "all") for sender in senders if isinstance(sender, Head)],
        shape=(layers, (len(edges.senders) - 1) // layers - 1),
        method=method,
        mlps=[sender for sender in senders if isinstance(sender, Mlp)],
        edges=[
            Edge(sender=edges.senders[i], receiver=edges.receivers[j], score=float(scores[i, j]))
            for i, j in present.nonzero().tolist()
        ],
    )


def edge_mask(edges: Edges, circuit: Circuit) -> Mask:
    """The edges of a circuit as a mask. Errors: `InputError` for a circuit without edges, or of another model."""
    if circuit.edges is None:
        raise InputError("this circuit has no edges; find one with `edge_selection`, or evaluate its heads.")
    rows = {str(sender): place for place, sender in enumerate(edges.senders)}
    columns = {str(receiver): place for place, receiver in enumerate(edges.receivers)}
    present = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for edge in circuit.edges:
        if str(edge.sender) not in rows or str(edge.receiver) not in columns:
            raise InputError(f"the model has no edge {edge}; evaluate the circuit on the model that it was found in.")
        present[rows[str(edge.sender)], columns[str(edge.receiver)]] = True
    return present
