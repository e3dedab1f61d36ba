"""What a circuit does alone: accuracy with every other head ablated, against the whole model and random circuits of
equal size.

    faithfulness = accuracy of the circuit alone / accuracy of the full model

Ablated heads take their mean over reference prompts (Prakash et al. 2024), or their output on the prompt's own corrupt
counterpart (MIB). Scope `positions` (Prakash): every head is ablated everywhere, except circuit heads at their own
positions. Scope `everywhere`: circuit heads are kept at all positions. Each of these gives different numbers, so each
result says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.circuits.circuit import Circuit, random_circuit
from workbench.circuits.search_result import CircuitSearch, circuit_of
from workbench.errors import InputError, nearest
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablated_logits, plain_logits
from workbench.patching.reference import Reference, reading, replacement_of, require_model, require_pairs
from workbench.patching.replacement import Kind, Replacement, replacement_named
from workbench.storage import read_typed
from workbench.tasks.base import PromptPairs
from workbench.values import metrics
from workbench.values.display import Row, Shown
from workbench.values.scores import wilson_interval

EvaluationScope = Literal["positions", "everywhere"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CircuitReport(Shown):
    """A circuit's evaluation on test prompts; intervals are 95 % Wilson intervals over prompts."""

    heads: int
    total_heads: int
    prompts: int
    scope: EvaluationScope
    ablation: Kind
    """What stands in for the heads outside."""
    full_accuracy: float
    full_interval: tuple[float, float]
    circuit_accuracy: float
    circuit_interval: tuple[float, float]
    random_circuit_accuracy: float
    """Mean over `random_circuits` draws of as many heads from outside the circuit."""
    random_circuit_range: tuple[float, float]
    """Least and greatest of the draws."""
    random_circuits: int
    empty_accuracy: float
    """Every head ablated: the floor of this evaluation."""
    faithfulness: float | None
    """Circuit accuracy over full accuracy; None when the full model is never right."""
    logit_differences: Mapping[str, float]
    """Mean logit of the answer minus that of the distractor (of sets, the log of the ratio of their masses): `full`,
    `circuit`, `random` (mean over the draws), `empty`."""
    logit_difference_recovered: float | None
    """(circuit - empty) / (full - empty) logit difference; None when the two ends are equal."""
    candidate_accuracies: Mapping[str, float] = field(default_factory=dict)
    """Accuracy among the candidates, the tokens that are answer or distractor of any of these prompts, in place of the
    whole vocabulary: `full`, `circuit`, `random`, `empty`. Nothing in files from before."""

    def line(self) -> str:
        """All of it that a log needs, with its scope and ablation."""
        places = "at their own positions" if self.scope == "positions" else "at all positions"
        recovered = self.logit_difference_recovered
        parts = [
            f"{self.heads} of {self.total_heads} heads alone, kept {places}, the others ablated ({self.ablation}), on "
            f"{self.prompts} test prompts: accuracy {self.circuit_accuracy:.3f} of {self.full_accuracy:.3f} over the "
            f"vocabulary (random circuits {self.random_circuit_accuracy:.3f}, no head {self.empty_accuracy:.3f})"
        ]
        if self.candidate_accuracies:
            among = self.candidate_accuracies
            parts.append(
                f"{among['circuit']:.3f} of {among['full']:.3f} among the candidates (random {among['random']:.3f}, no "
                f"head {among['empty']:.3f})"
            )
        share = "undefined" if recovered is None else f"{recovered:.2f} recovered"
        return ", ".join([*parts, f"logit difference {share}"])

    def _title(self) -> str:
        faithful = "undefined" if self.faithfulness is None else f"{self.faithfulness:.3f}"
        return (
            f"Circuit of {self.heads} of {self.total_heads} heads on {self.prompts} prompts, the others ablated "
            f"({self.ablation}; scope: {self.scope}): faithfulness {faithful}"
        )

    def _table(self) -> tuple[Row, Sequence[Row]]:
        rows = [
            ("full model", self.full_accuracy, self.full_interval, "full"),
            ("circuit", self.circuit_accuracy, self.circuit_interval, "circuit"),
            (f"{self.random_circuits} random", self.random_circuit_accuracy, self.random_circuit_range, "random"),
            ("no head", self.empty_accuracy, None, "empty"),
        ]
        return ("", "accuracy", "interval or range", "logit difference"), [
            (
                name,
                f"{accuracy:.3f}",
                "" if spread is None else f"[{spread[0]:.3f}, {spread[1]:.3f}]",
                f"{self.logit_differences[key]:.3f}",
            )
            for name, accuracy, spread, key in rows
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "CircuitReport":
        """Read what `to_json` gave. Errors: `InputError` on anything else."""
        if isinstance(value, Mapping):
            value = {"ablation": "mean", "candidate_accuracies": {}, **value}  # files from before there was a choice
        return read_typed(value, cls, what="the evaluation of a circuit")


def circuit_logits(
    model: HookedModel,
    pairs: PromptPairs,
    circuit: Circuit,
    replacement: Replacement | Literal["zero"],
    *,
    scope: EvaluationScope = "positions",
) -> Float[Tensor, "batch d_vocab"]:
    """Final logits of the circuit alone: all other heads ablated."""
    acting = circuit.scope if scope == "positions" else circuit.everywhere
    return ablated_logits(model, pairs, acting, replacement, complement=True)


def correct(logits: Float[Tensor, "batch d_vocab"], pairs: PromptPairs) -> Bool[Tensor, " batch"]:
    """Which prompts are answered right (argmax over the whole vocabulary)."""
    return metrics.accuracy(logits, pairs.answers, pairs.distractors).bool()


Ends = tuple[Float[Tensor, "batch d_vocab"], Float[Tensor, "batch d_vocab"]]
"""Final logits of the whole model and of the empty circuit."""


def circuit_ends(
    model: HookedModel, pairs: PromptPairs, shape: tuple[int, int], replacement: Replacement | Literal["zero"]
) -> Ends:
    """The two runs that the evaluations of all circuits of one model on these prompts have in common."""
    nothing = Circuit.of([], shape=shape, method="empty")
    return plain_logits(model, pairs), circuit_logits(model, pairs, nothing, replacement)


def evaluate_circuit(
    model: HookedModel,
    pairs: PromptPairs,
    circuit: Circuit | CircuitSearch,
    reference: Reference = None,
    *,
    scope: EvaluationScope = "positions",
    random_circuits: int = 5,
    seed: int = 0,
    ends: Ends | None = None,
) -> CircuitReport:
    """Accuracy and logit difference of the full model, the circuit alone, random circuits and the empty one on test
    prompts.

    Heads outside take their mean over the pairs' corrupt prompts (never the evaluated clean ones), or what `reference`
    says, as in `ablate`. `scope="positions"` keeps each circuit head where it acts, `everywhere` at all positions.
    `random_circuits`: how many, of equal size (0: none). `ends`: from `circuit_ends`, where many are evaluated.
    Errors: `InputError` for a circuit of another model, and a reference that does not fit the prompts.
    """
    require_model(model)
    require_pairs(pairs)
    circuit = circuit_of(circuit, model)
    if scope not in get_args(EvaluationScope):
        raise InputError(f"no scope {scope!r}; {nearest(str(scope), get_args(EvaluationScope))}")
    pairs = reading(model, pairs)
    replacement, _ = replacement_of(model, pairs, reference)
    return evaluate_with_outcomes(
        model, pairs, circuit, replacement, scope=scope, random_circuits=random_circuits, seed=seed, ends=ends
    )[0]


def evaluate_with_outcomes(
    model: HookedModel,
    pairs: PromptPairs,
    circuit: Circuit,
    replacement: Replacement | Literal["zero"],
    *,
    scope: EvaluationScope = "positions",
    random_circuits: int = 5,
    seed: int = 0,
    ends: Ends | None = None,
) -> tuple[CircuitReport, dict[str, Bool[Tensor, " batch"]]]:
    """The same, and which prompts are answered right by the full model and by the circuit alone (`full`, `circuit`),
    for paired tests."""
    draws = [random_circuit(circuit, seed=seed, draw=draw) for draw in range(random_circuits)]
    full, empty = circuit_ends(model, pairs, circuit.shape, replacement) if ends is None else ends
    runs = {
        "full": [full],
        "circuit": [circuit_logits(model, pairs, circuit, replacement, scope=scope)],
        "random": [circuit_logits(model, pairs, draw, replacement, scope=scope) for draw in draws],
        "empty": [empty],
    }
    right = {name: [correct(logits, pairs) for logits in several] for name, several in runs.items()}
    whole, circuit_right = right["full"][0], right["circuit"][0]
    randoms = [float(each.float().mean()) for each in right["random"]] or [float("nan")]
    differences = {name: _mean_difference(several, pairs) for name, several in runs.items()}
    gap = differences["full"] - differences["empty"]
    full_accuracy, alone_accuracy = float(whole.float().mean()), float(circuit_right.float().mean())
    report = CircuitReport(
        heads=len(circuit.heads),
        total_heads=circuit.shape[0] * circuit.shape[1],
        prompts=len(pairs),
        scope=scope,
        ablation=replacement_named(replacement).kind,
        full_accuracy=full_accuracy,
        full_interval=wilson_interval(int(whole.sum()), len(pairs)),
        circuit_accuracy=alone_accuracy,
        circuit_interval=wilson_interval(int(circuit_right.sum()), len(pairs)),
        random_circuit_accuracy=sum(randoms) / len(randoms),
        random_circuit_range=(min(randoms), max(randoms)),
        random_circuits=random_circuits,
        empty_accuracy=float(right["empty"][0].float().mean()),
        faithfulness=alone_accuracy / full_accuracy if full_accuracy else None,
        logit_differences=differences,
        logit_difference_recovered=(differences["circuit"] - differences["empty"]) / gap if gap else None,
        candidate_accuracies={name: _among_candidates(several, pairs) for name, several in runs.items() if several},
    )
    return report, {"full": whole, "circuit": circuit_right}


def _among_candidates(runs: Sequence[Float[Tensor, "_ _"]], pairs: PromptPairs) -> float:
    """Mean accuracy where only tokens that are answer or distractor of some prompt can win."""
    known = torch.cat([pairs.answers.flatten(), pairs.distractors.flatten()]).unique()
    known = known[known >= 0]
    values = [float(metrics.among(known[logits[:, known].argmax(-1)], pairs.answers).float().mean()) for logits in runs]
    return sum(values) / len(values)


def _mean_difference(runs: Sequence[Float[Tensor, "_ _"]], pairs: PromptPairs) -> float:
    values = [float(metrics.logit_difference(logits, pairs.answers, pairs.distractors).mean()) for logits in runs]
    return sum(values) / len(values) if values else float("nan")
