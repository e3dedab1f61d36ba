"""What is left of a model, on all batches of some prompts: measured, without each of its parts, and by attribution."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.gates import gate_scores
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.remains import Ablatable, HookedRemains, Part, Place, Remains, StandIns
from workbench.patching.execution import Execution
from workbench.patching.replacement import ReferenceMeans, Replacement, Zero, at_real_positions
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import METRICS, Metric, kl_divergence, metric_named
from workbench.values.refs import Position

BATCH = 256
"""Default number of prompts that are held at once."""
KL = "kl_divergence"
"""The criterion that asks for the whole model's own distribution."""
Somewhere = Sequence[tuple[Part, Position]]
"""Parts, each at a named position."""


class Remaining:
    """The batches of prompts with what is left of the model on each."""

    def __init__(
        self,
        model: HookedModel,
        pairs: PromptPairs,
        replacement: Replacement,
        criterion: str | Metric,
        execution: Execution,
        *,
        mlps: bool = False,
    ) -> None:
        self.model, self.execution = model, execution
        self.metric = None if criterion == KL else metric_named(criterion)
        self.pairs = list(pairs.batches(execution.batch_of(BATCH)))
        self.stand_ins = [stand_ins(model, part, replacement, mlps=mlps) for part in self.pairs]
        self.runs = 0.0
        """Forwards over one prompt so far: what is left without one part counts 1, a forward with its backward 3."""
        self._untouched = [self._whole_model(number) for number in range(len(self.pairs))]
        self.restart()
        self.whole = [each.logits for each in self.batches]

    def restart(self) -> None:
        """Nothing is removed."""
        self.batches = [batch.copy() for batch in self._untouched]

    def _whole_model(self, number: int) -> Ablatable:
        pairs, values = self.pairs[number], self.stand_ins[number]
        replay = self.execution.replay(self.model, pairs)
        if replay is None:
            return HookedRemains(self.model, pairs, values)
        return Remains(replay, values, memory=self.execution.memory_on(self.model.device))

    def _places(self, number: int, parts: Somewhere) -> list[Place]:
        return [Place(part=part, where=self.pairs[number].position(position)) for part, position in parts]

    def remove(self, parts: Somewhere) -> None:
        """Take parts away for good."""
        self.runs += sum(map(len, self.pairs))
        for number, batch in enumerate(self.batches):
            batch.remove(*self._places(number, parts))

    def empty(self, parts: Somewhere) -> dict[str, float]:
        """Mean criterion, accuracy and KL with all of these removed from the whole model."""
        return dict(zip(("criterion", "accuracy", "divergence"), self.after(parts).mean(1).tolist(), strict=True))

    def after(self, parts: Somewhere) -> Float[Tensor, "measure example"]:
        """Criterion, accuracy and KL of the whole model without all of these, whatever is removed now."""
        rows = []
        self.runs += sum(map(len, self.pairs))
        for number in range(len(self.pairs)):
            batch = self._untouched[number].copy()
            batch.remove(*self._places(number, parts))
            rows.append(self._measured(number, batch.logits))
        return torch.cat(rows, 1)

    def measured(self) -> Float[Tensor, "measure example"]:
        """Criterion, accuracy and KL of what is left, for each prompt."""
        return torch.cat([self._measured(number, batch.logits) for number, batch in enumerate(self.batches)], 1)

    def _measured(self, number: int, logits: Tensor) -> Tensor:
        pairs = self.pairs[number]
        correct = METRICS["accuracy"](logits, pairs.answers, pairs.distractors)
        rows = (self._criterion(number, logits), correct, kl_divergence(logits, self.whole[number]))
        return torch.stack(rows).double().cpu()

    def _criterion(self, number: int, logits: Tensor) -> Float[Tensor, " batch"]:
        """What a removal should cost least of; higher is better."""
        if self.metric is None:
            return -kl_divergence(logits, self.whole[number])
        return self.metric(logits, self.pairs[number].answers, self.pairs[number].distractors)

    def without_each(self, parts: Somewhere) -> Float[Tensor, "candidate example"]:
        """The criterion of what is left without each of some parts."""
        columns = []
        self.runs += len(parts) * sum(map(len, self.pairs))
        for number, batch in enumerate(self.batches):
            values = torch.zeros(len(parts), len(self.pairs[number]), dtype=torch.float64)
            for candidate, logits in batch.without_each(self._places(number, parts)):
                values[candidate] = self._criterion(number, logits).double().cpu()
            columns.append(values)
        return torch.cat(columns, 1)

    def gate_scores(self, parts: Somewhere, *, steps: int) -> Float[Tensor, "part example"]:
        """How much each of the parts that are left is worth by its gate, all others being removed."""
        columns = []
        self.runs += 3 * steps * sum(map(len, self.pairs))
        for number, pairs in enumerate(self.pairs):
            places, values = self._places(number, parts), self.stand_ins[number]
            scores = gate_scores(
                self.model, pairs, values, places, lambda logits, at=number: self._criterion(at, logits), steps=steps
            )
            columns.append(scores.double().cpu())
        return torch.cat(columns, 1)


@torch.no_grad()
def stand_ins(model: HookedModel, pairs: PromptPairs, replacement: Replacement, *, mlps: bool = False) -> StandIns:
    """What removed heads (and MLPs) write on these prompts. Errors: `InputError` for MLPs by other replacements than
    zero, means and the corrupt prompts."""
    shape = (1, pairs.clean.shape[1], model.n_heads, model.d_head)
    z = {}
    for layer in range(model.n_layers):
        value = replacement.at(layer, pairs)
        value = value if value.ndim == 4 else value[None]
        z[layer] = value.expand(len(value), *shape[1:]).to(pairs.clean.device)
    return StandIns(z=z, mlp=dict(_mlp_stand_ins(model, pairs, replacement)) if mlps else {})


def _mlp_stand_ins(model: HookedModel, pairs: PromptPairs, replacement: Replacement) -> Iterator[tuple[int, Tensor]]:
    names = [hooks.mlp_output(layer) for layer in range(model.n_layers)]
    shape = (pairs.clean.shape[1], model.output_weights(0).shape[-1])
    if isinstance(replacement, Zero):
        yield from ((layer, torch.zeros(1, *shape, device=pairs.clean.device)) for layer in range(len(names)))
    elif replacement.kind == "counterfactual":
        values = model.early_activations(pairs.corrupt, pairs.mask, names)
        yield from ((layer, values[name]) for layer, name in enumerate(names))
    elif isinstance(replacement, ReferenceMeans):
        means = _mlp_means(model, replacement, names)
        for layer in range(len(names)):
            value = means.at(layer, pairs)[..., 0, :]
            value = value if value.ndim == 3 else value[None]
            yield layer, value.expand(len(value), *shape)
    else:
        raise InputError("MLPs have no resampled outputs; eliminate heads alone, or by means or the corrupt prompts.")


def _mlp_means(model: HookedModel, means: ReferenceMeans, names: Sequence[str]) -> ReferenceMeans:
    """The means of MLPs' outputs over the same prompts in the same way; an MLP is one head as wide as the model."""
    prompts, length = means.prompts, int(means.prompts.mask.sum(1).max())
    outputs = model.early_activations(prompts.clean, prompts.mask, names)
    sums = {
        layer: at_real_positions(outputs[name][:, :, None], prompts, length).sum(0) for layer, name in enumerate(names)
    }
    every, tokens = {layer: total.sum(0, keepdim=True) for layer, total in sums.items()}, prompts.mask.sum()
    pooled = {layer: total / tokens for layer, total in every.items()}
    by_position = (
        {layer: total / means.counts[:, None, None] for layer, total in sums.items()} if means.per_position else {}
    )
    return replace(means, values=by_position or pooled, pooled=pooled)
