"""What a circuit does alone: accuracy with every other head mean-ablated, against the whole model and random circuits of equal size.

    faithfulness = accuracy of the circuit alone / accuracy of the full model

Scope `positions` (Prakash et al. 2024): every head is mean-ablated everywhere, except circuit heads at their own positions. Scope
`everywhere`: circuit heads are kept at all positions. The two give different numbers, so each result says which.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from workbench import metrics
from workbench.circuits.circuit import Circuit, random_circuit
from workbench.models import HookedModel
from workbench.patching.ablation import ReferenceMeans, ablated_logits, plain_logits
from workbench.scores import wilson_interval
from workbench.tasks.base import PromptPairs

EvaluationScope = Literal["positions", "everywhere"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitReport:
    """A circuit's evaluation on test prompts; intervals are 95 % Wilson intervals over prompts."""

    heads: int
    total_heads: int
    prompts: int
    scope: EvaluationScope
    full_accuracy: float
    full_interval: tuple[float, float]
    circuit_accuracy: float
    circuit_interval: tuple[float, float]
    random_circuit_accuracy: float
    """Mean over `random_circuits` draws of as many heads from outside the circuit."""
    random_circuits: int
    empty_accuracy: float
    """Every head ablated: the floor of this evaluation."""
    faithfulness: float | None
    """None when the full model is never right."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CircuitReport":
        """Read what `to_json` gave."""
        return cls(**{**value, "full_interval": tuple(value["full_interval"]), "circuit_interval": tuple(value["circuit_interval"])})


def circuit_logits(
    model: HookedModel, pairs: PromptPairs, circuit: Circuit, means: ReferenceMeans, *, scope: EvaluationScope = "positions"
) -> Float[Tensor, "batch d_vocab"]:
    """Final logits of the circuit alone: all else mean-ablated."""
    kept = circuit.scope if scope == "positions" else circuit.everywhere
    return ablated_logits(model, pairs, kept, means, complement=True)


def correct(logits: Float[Tensor, "batch d_vocab"], pairs: PromptPairs) -> Bool[Tensor, " batch"]:
    """Which prompts are answered right (argmax over the whole vocabulary)."""
    return metrics.accuracy(logits, pairs.answers, pairs.distractors).bool()


def evaluate_circuit(
    model: HookedModel,
    pairs: PromptPairs,
    circuit: Circuit,
    means: ReferenceMeans,
    *,
    scope: EvaluationScope = "positions",
    random_circuits: int = 5,
    seed: int = 0,
) -> CircuitReport:
    """Full, circuit-only, random-circuit and empty accuracy on test prompts. Errors: `InputError` when they overlap the reference."""
    full = correct(plain_logits(model, pairs), pairs)
    alone = correct(circuit_logits(model, pairs, circuit, means, scope=scope), pairs)
    draws = [random_circuit(circuit, seed=seed, draw=draw) for draw in range(random_circuits)]
    randoms = [float(correct(circuit_logits(model, pairs, draw, means, scope=scope), pairs).float().mean()) for draw in draws]
    empty = correct(circuit_logits(model, pairs, circuit.where(lambda member: False), means, scope=scope), pairs)
    full_accuracy, alone_accuracy = float(full.float().mean()), float(alone.float().mean())
    return CircuitReport(
        heads=len(circuit.heads),
        total_heads=circuit.shape[0] * circuit.shape[1],
        prompts=len(pairs),
        scope=scope,
        full_accuracy=full_accuracy,
        full_interval=wilson_interval(int(full.sum()), len(pairs)),
        circuit_accuracy=alone_accuracy,
        circuit_interval=wilson_interval(int(alone.sum()), len(pairs)),
        random_circuit_accuracy=sum(randoms) / len(randoms) if randoms else float("nan"),
        random_circuits=random_circuits,
        empty_accuracy=float(empty.float().mean()),
        faithfulness=alone_accuracy / full_accuracy if full_accuracy else None,
    )
