"""Learned gates: which heads may close is learned by gradient descent, all of them together.

Every head has a gate in [0, 1]: it writes r + g (z - r), its own output z at g = 1 and its replacement r at 0. Gates
are drawn from hard-concrete distributions (Louizos et al. 2018), whose parameters a learn to minimise

    mean over prompts of KL(whole model || gated model)  +  penalty * share of gates that are open (in expectation)

as node and edge pruning do (Cao et al. 2021; Bhaskar et al. 2024, arXiv 2406.16778). The penalty grows from 0, so that
what costs least closes first. Heads that stand in for each other compete: one of them stays open. Heads are ranked by
a, and the circuit is the shortest beginning of that ranking that keeps the target.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from workbench import seeds, storage
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.gates import gated
from workbench.circuits.methods.base import Inquiry
from workbench.circuits.methods.ranked import curve_of
from workbench.circuits.remaining import stand_ins
from workbench.circuits.search_curve import Of
from workbench.circuits.search_result import CircuitSearch
from workbench.errors import InputError
from workbench.models import hooks
from workbench.patching.ablation import plain_logits
from workbench.patching.engine.remains import Place, StandIns
from workbench.patching.progress import identity, progress_bar
from workbench.tasks.base import PromptPairs
from workbench.tasks.stages import Stage
from workbench.values.metrics import kl_divergence
from workbench.values.refs import Position
from workbench.values.scores import Scores

TEMPERATURE, LEAST, MOST = 2 / 3, -0.1, 1.1
"""Of the hard-concrete distribution, and the ends of its stretched interval (Louizos et al. 2018)."""
START = 2.0
"""a of every gate at the start: open in all but 6 % of the draws."""
KEEP_EVERY = 20
"""Steps between two writes of the file."""


def drawn(a: Float[Tensor, " part"], generator: torch.Generator) -> Float[Tensor, " part"]:
    """A gate of each part from its hard-concrete distribution; differentiable in a."""
    uniform = torch.rand(len(a), generator=generator).clamp(1e-6, 1 - 1e-6).to(a)
    soft = ((uniform.log() - (1 - uniform).log() + a) / TEMPERATURE).sigmoid()
    return (LEAST + (MOST - LEAST) * soft).clamp(0, 1)


def open_share(a: Float[Tensor, " part"]) -> Float[Tensor, ""]:
    """The expected share of gates that are not closed."""
    return (a - TEMPERATURE * math.log(-LEAST / MOST)).sigmoid().mean()


@validated(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LearnedGates:
    """Gates on all heads, learned together under a growing penalty on their number."""

    target: Annotated[float, Field(gt=0)] = 0.9
    """How much of the model the circuit must keep, as a share (with `until: kl_divergence`, nats at most)."""
    until: Of = "accuracy"
    """Share of what."""
    steps: Annotated[int, Field(ge=1)] = 150
    """Of the optimiser (Adam)."""
    batch: Annotated[int, Field(ge=1)] = 16
    """Prompts in a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    penalty: Annotated[float, Field(ge=0)] = 10.0
    """Nats that all gates being open cost, at the end. Of 0.3, 1, 3 and 10 the last ranks best on the bundled teachers
    (CPR 0.72 on theory of mind, 0.56 on entity tracking) and finds the smallest circuits; where every gate closes, or
    steps are few, take less."""
    seed: int = 0

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        """The shortest beginning of the learned ranking that keeps the target (all heads, if none does)."""
        a = _Learning(self, inquiry).learned()
        scores = Scores.of_heads(a.view(inquiry.shape).float(), unit="learned gate (log odds)")
        order = scores.ranked()
        curve = curve_of(inquiry, order, sizes=range(len(order) + 1))
        size = next(size for size in curve.sizes if curve.reaches(size, self.target, self.until) or size == len(order))
        method = f"learned gates, to keep {self.target:g} of {self.until.replace('_', ' ')}, {inquiry.words}"
        members = (Member(head, "gate", "all") for head in order[:size])
        values = a.sort(descending=True).values
        gap = float(values[size - 1] - values[size]) if 0 < size < len(values) else math.inf
        return CircuitSearch(
            circuit=Circuit.of(members, shape=inquiry.shape, method=method),
            scores=scores,
            method="learned_gates",
            reference=f"closed gates: {inquiry.words}",
            ranking=tuple(order),
            curve=curve,
            notes=(
                f"learned_gates: {int((a > 0).sum())} of {len(a)} gates are open; the weakest head taken is {gap:.2f} "
                "(log odds) above the next; other draws (seed) give other ties",
            ),
        )

    def acts_at(self, stages: Sequence[Stage]) -> tuple[Position, ...]:
        """Everywhere."""
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        """Three for each step (of a batch, which is counted as all prompts here), and one for each size."""
        return 3 * self.steps + heads + 1


class _Learning:
    """The gates at work: parameters, Adam's state, and the file that holds both."""

    def __init__(self, options: LearnedGates, inquiry: Inquiry) -> None:
        self.options, self.inquiry = options, inquiry
        model, pairs = inquiry.model, inquiry.pairs
        model.require_eval()
        inquiry.replacement.require_fitting(pairs)
        self.values = stand_ins(model, pairs, inquiry.replacement)
        self.whole = plain_logits(model, pairs)
        count = len(model.heads)
        self.a = torch.full((count,), START, dtype=torch.float64)
        self.first, self.second = torch.zeros_like(self.a), torch.zeros_like(self.a)
        self.step = 0
        self.file = inquiry.executed("learned-gates").path
        if self.file is not None:
            self.file = self.file.with_suffix(".gates")
            settings = {"options": options, "metric": "KL"}
            self.identity = identity(
                "gates", model, [pairs], metrics=[], replacement=inquiry.replacement.identity(), settings=settings
            )
            self._read()

    def learned(self) -> Float[Tensor, " part"]:
        """The parameters after all steps."""
        title = f"learning gates of {self.inquiry.model.name}"
        with progress_bar(
            total=self.options.steps, initial=self.step, desc=title, unit="step", shown=self.inquiry.execution.progress
        ) as bar:
            while self.step < self.options.steps:
                self._update(self._gradient())
                bar.update()
                if self.file is not None and (self.step % KEEP_EVERY == 0 or self.step == self.options.steps):
                    self._write()
        return self.a

    def _gradient(self) -> Float[Tensor, " part"]:
        options, pairs = self.options, self.inquiry.pairs
        generator = seeds.generator(options.seed, "gates", str(self.step))
        rows = torch.randperm(len(pairs), generator=generator)[: options.batch]
        a = self.a.clone().requires_grad_(True)
        with torch.enable_grad():
            gates = drawn(a, generator).to(self.whole.dtype)
            divergence = kl_divergence(self._logits(pairs.rows(rows), rows, gates), self.whole[rows]).mean()
            grown = options.penalty * min(1.0, 2 * (self.step + 1) / options.steps)
            return torch.autograd.grad(divergence.double() + grown * open_share(a), a)[0]

    def _logits(self, pairs: PromptPairs, rows: Tensor, gates: Tensor) -> Tensor:
        model = self.inquiry.model
        z = {layer: value if len(value) == 1 else value[rows] for layer, value in self.values.z.items()}
        everywhere = pairs.position("all")
        places = [Place(part=head, where=everywhere) for head in model.heads]
        edits = gated(model, pairs, StandIns(z=z, mlp={}), places, gates[:, None].expand(-1, len(pairs)))
        with hooks.edit(model.model, edits):
            return model.final_logits(pairs.clean, pairs.mask)

    def _update(self, gradient: Tensor) -> None:
        """A step of Adam."""
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.99 * self.second + 0.01 * gradient**2
        mean, square = self.first / (1 - 0.9**self.step), self.second / (1 - 0.99**self.step)
        self.a = self.a - self.options.learning_rate * mean / (square.sqrt() + 1e-8)

    def _read(self) -> None:
        assert self.file is not None
        if not self.file.exists():
            return
        tensors, metadata = storage.read_tensors(self.file)
        if metadata.get("identity") != self.identity:
            raise InputError(
                f"{self.file} holds gates of another model, other prompts or settings; delete it, or keep this one "
                "elsewhere."
            )
        self.a, self.first, self.second = (tensors[name] for name in ("a", "first", "second"))
        self.step = int(tensors["step"])

    def _write(self) -> None:
        assert self.file is not None
        state = {"a": self.a, "first": self.first, "second": self.second, "step": torch.tensor(self.step)}
        storage.write_tensors(self.file, state, metadata={"identity": self.identity})
