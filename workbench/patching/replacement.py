"""What stands in for an ablated head's output (`hook_z`): zero, its mean over reference prompts (position by position,
or over all tokens), its output on a reference prompt that is drawn (resampled), or on the prompt's own corrupt
counterpart.

A position is counted over a prompt's real tokens, from its first, so padding changes nothing. Nothing is ever averaged
over no token: where no reference prompt is as long as an evaluated one, there is no mean, and it is refused (or pooled
over all tokens where that is asked for).
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.counterfactual import corrupt_activations
from workbench.tasks.base import PromptPairs, refuse_overlap

log = logging.getLogger("workbench")
BATCH = 256
"""Default number of prompts in one forward."""
Kind = Literal["mean", "resampled", "counterfactual", "zero"]
Missing = Literal["refuse", "pool"]
Where = Bool[Tensor, "batch pos"]
StandIn = Float[Tensor, "... _ _ _"]
"""[batch pos head d_head], or [pos head d_head] for all prompts; an axis along which all is equal may have size 1."""


@runtime_checkable
class Replacement(Protocol):
    """What an ablated head's output becomes."""

    @property
    def kind(self) -> Kind:
        """In a word."""
        ...

    def identity(self) -> str:
        """What it is made of, for the identity of what is computed with it (a counterfactual one is made of the
        evaluated prompts themselves)."""
        ...

    def require_fitting(self, evaluated: PromptPairs) -> None:
        """Raise `InputError` where it can't stand in on these prompts."""
        ...

    def at(self, layer: int, evaluated: PromptPairs) -> StandIn:
        """The outputs of a layer's heads that stand in on these prompts; what it says of padding has no meaning."""
        ...


@dataclass(frozen=True, slots=True)
class Zero:
    """Nothing: an ablated head writes zero."""

    kind: Kind = "zero"

    def identity(self) -> str:
        """The kind alone."""
        return "zero"

    def require_fitting(self, evaluated: PromptPairs) -> None:
        """Zero fits everywhere."""

    def at(self, layer: int, evaluated: PromptPairs) -> StandIn:
        """Zero, of whatever shape."""
        return torch.zeros(1, 1, 1, device=evaluated.clean.device)


def replacement_named(replacement: Replacement | Literal["zero"]) -> Replacement:
    """`zero` -> zeros; a replacement stays itself. Errors: `InputError` for other words."""
    if not isinstance(replacement, str):
        return replacement
    if replacement != "zero":
        raise InputError(
            f"{replacement!r} stands in for nothing by its name alone: say 'zero', or make `reference_means`, "
            "`resampled_outputs` or `counterfactual_outputs` first."
        )
    return Zero()


def require_fitting_at(replacement: Replacement, evaluated: PromptPairs, where: Where) -> None:
    """Refuse what can't stand in on these prompts at these tokens: corrupt outputs have to stand in at those alone.
    Errors: `InputError`."""
    if isinstance(replacement, CounterfactualOutputs):
        replacement.require_fitting(evaluated, where)
    else:
        replacement.require_fitting(evaluated)


def real_positions(prompts: PromptPairs) -> Int[Tensor, "batch pos"]:
    """How many real tokens of its prompt stand before each token, wherever the padding is (padding in front: 0)."""
    return (prompts.mask.long().cumsum(1) - 1).clamp(min=0)


def covers(reference: PromptPairs, evaluated: PromptPairs) -> bool:
    """Whether some reference prompt has as many tokens as the longest evaluated one, so that per-position means are all
    there."""
    return int(reference.mask.sum(1).max()) >= int(evaluated.mask.sum(1).max())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceMeans:
    """Mean `hook_z` of every head over reference prompts: layer -> [pos head d_head] (pos = 1 when averaged over
    positions too)."""

    values: Mapping[int, Float[Tensor, "pos head d_head"]]
    prompts: PromptPairs
    per_position: bool
    counts: Int[Tensor, " pos"]
    """How many reference tokens each mean is over."""
    missing: Missing = "refuse"
    """What is done where an evaluated prompt is longer than every reference prompt."""
    pooled: Mapping[int, Float[Tensor, "1 head d_head"]] | None = None
    """With `missing="pool"`: the means over all tokens."""

    @property
    def kind(self) -> Kind:
        """`mean`."""
        return "mean"

    def identity(self) -> str:
        """The prompts, and how they were averaged."""
        return f"mean {self.prompts.fingerprint()} {self.per_position} {self.missing if self.per_position else ''}"

    def require_fitting(self, evaluated: PromptPairs) -> None:
        """Errors: `InputError` for prompts that are among the reference ones, and for prompts with tokens at positions
        that no reference prompt has."""
        refuse_overlap(self.prompts, evaluated)
        beyond = self._beyond(evaluated)
        if beyond and self.missing == "refuse":
            raise InputError(
                f"{beyond} of the {len(evaluated)} evaluated prompts have tokens where no reference prompt has any "
                f"(the longest reference prompt has {len(self.counts)} tokens, the longest evaluated one "
                f"{int(evaluated.mask.sum(1).max())}), so there is no mean; use longer reference prompts, means over "
                "all tokens (`per_position=False`), or `missing='pool'` for these positions."
            )
        if beyond:
            log.warning(
                "%d of %d evaluated prompts are longer than every reference prompt: behind its end an ablated head "
                "takes its mean over all tokens of the %d reference prompts",
                beyond,
                len(evaluated),
                len(self.prompts),
            )

    def _beyond(self, evaluated: PromptPairs) -> int:
        """How many prompts are longer than every reference prompt."""
        return int((evaluated.mask.sum(1) > len(self.counts)).sum()) if self.per_position else 0

    def at(self, layer: int, evaluated: PromptPairs) -> StandIn:
        """The means of a layer, by real position. Errors: as `require_fitting`, overlap apart."""
        means = self.values[layer]
        if not self.per_position:
            return means
        place = real_positions(evaluated)
        if self._beyond(evaluated):
            if self.pooled is None:
                self.require_fitting(evaluated)
            else:
                means = torch.cat([means, self.pooled[layer]])
        place = place.clamp(max=len(means) - 1).to(means.device)
        if bool((place == place[:1]).all()):
            return means[place[0]]
        return means[place]


def reference_means(
    model: HookedModel,
    prompts: PromptPairs,
    *,
    per_position: bool = True,
    missing: Missing = "refuse",
    batch: int = BATCH,
) -> ReferenceMeans:
    """Mean of every head's output over the clean reference prompts, position by position (or over all real tokens).

    `missing`: what an evaluated prompt longer than all of these gets at its further positions: `refuse` raises
    `InputError` when it is evaluated, `pool` takes the mean over all tokens there.
    """
    model.require_eval()
    if missing not in ("refuse", "pool"):
        raise InputError(f"`missing` is 'refuse' or 'pool', not {missing!r}.")
    names = [hooks.z(layer) for layer in range(model.n_layers)]
    length = int(prompts.mask.sum(1).max())
    sums: dict[int, Tensor] = {}
    for part in prompts.batches(batch):
        outputs = model.activations(part.clean, part.mask, names)[1]
        for layer, name in enumerate(names):
            total = _sum(outputs[name], part, length, per_position=per_position)
            sums[layer] = sums.get(layer, 0) + total
    lengths = prompts.mask.sum(1)
    counts = (lengths[:, None] > torch.arange(length, device=lengths.device)).sum(0)
    if not per_position:
        counts = counts.sum()[None]
    pooled = None
    if per_position and missing == "pool":
        pooled = {layer: total.sum(0, keepdim=True) / counts.sum() for layer, total in sums.items()}
    return ReferenceMeans(
        values={layer: total / counts[:, None, None] for layer, total in sums.items()},
        prompts=prompts,
        per_position=per_position,
        counts=counts,
        missing=missing,
        pooled=pooled,
    )


def _sum(
    outputs: Float[Tensor, "batch pos head d_head"], prompts: PromptPairs, length: int, *, per_position: bool
) -> Float[Tensor, "real head d_head"]:
    """The sum over prompts at each real position (`per_position`), or over all real tokens."""
    real = outputs * prompts.mask[:, :, None, None]
    if not per_position:
        return real.sum((0, 1))[None]
    return at_real_positions(real, prompts, length).sum(0)


def at_real_positions(
    outputs: Float[Tensor, "batch pos head d_head"], prompts: PromptPairs, length: int
) -> Float[Tensor, "batch real head d_head"]:
    """Without the padding: the real tokens of each prompt from its first on, and zero behind its last."""
    order = (~prompts.mask).int().argsort(dim=1, stable=True)[:, :length]
    rows = torch.arange(len(prompts), device=order.device)[:, None]
    return torch.where(prompts.mask[rows, order][..., None, None], outputs[rows, order], 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResampledOutputs:
    """`hook_z` of every head on reference prompts, one of which (drawn with the seed) stands in for each evaluated
    prompt."""

    values: Mapping[int, Float[Tensor, "prompt pos head d_head"]]
    """Without padding: by real position."""
    prompts: PromptPairs
    seed: int

    @property
    def kind(self) -> Kind:
        """`resampled`."""
        return "resampled"

    def identity(self) -> str:
        """The prompts and the seed."""
        return f"resampled {self.prompts.fingerprint()} {self.seed}"

    def require_fitting(self, evaluated: PromptPairs) -> None:
        """Errors: `InputError` for prompts that are among the reference ones, or longer than all of them."""
        refuse_overlap(self.prompts, evaluated)
        self._drawn(evaluated)

    def _drawn(self, evaluated: PromptPairs) -> list[int]:
        """The reference prompt of each evaluated one: drawn by its tokens from those that are long enough."""
        lengths = self.prompts.mask.sum(1)
        drawn = []
        for row, real in zip(evaluated.clean, evaluated.mask, strict=True):
            tokens = row[real].tolist()
            enough = (lengths >= len(tokens)).nonzero()[:, 0].tolist()
            if not enough:
                raise InputError(
                    f"an evaluated prompt has {len(tokens)} tokens, the longest reference prompt {int(lengths.max())}; "
                    "use longer reference prompts, or another replacement."
                )
            drawn.append(enough[seeds.derive(self.seed, "resample", repr(tokens)) % len(enough)])
        return drawn

    def at(self, layer: int, evaluated: PromptPairs) -> StandIn:
        """The stand-ins of a layer for these prompts, the same for a prompt in whatever batch and padding it comes.
        Errors: as `require_fitting`, overlap apart."""
        values = self.values[layer]
        rows = torch.tensor(self._drawn(evaluated), device=values.device)[:, None]
        return values[rows, real_positions(evaluated).to(values.device)]


def resampled_outputs(model: HookedModel, prompts: PromptPairs, *, seed: int, batch: int = BATCH) -> ResampledOutputs:
    """Every head's output on the clean reference prompts, to draw from (resample ablation, Chan et al. 2022)."""
    model.require_eval()
    names, length = [hooks.z(layer) for layer in range(model.n_layers)], int(prompts.mask.sum(1).max())
    parts = [(model.activations(part.clean, part.mask, names)[1], part) for part in prompts.batches(batch)]
    return ResampledOutputs(
        values={
            layer: torch.cat([at_real_positions(outputs[name], part, length) for outputs, part in parts])
            for layer, name in enumerate(names)
        },
        prompts=prompts,
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CounterfactualOutputs:
    """`hook_z` of every head on each prompt's own corrupt counterpart: what an ablated head says when the prompt says
    something else.

    The only ablation that leaves everything in place that clean and corrupt have in common, as MIB evaluates circuits
    (Mueller et al. 2025).
    """

    values: Mapping[int, Float[Tensor, "prompt pos head d_head"]]
    row_of: Mapping[tuple[bytes, ...], int]
    """Tokens of a clean prompt and its corrupt one, and which belong together -> their row in `values`."""

    @property
    def kind(self) -> Kind:
        """`counterfactual`."""
        return "counterfactual"

    def identity(self) -> str:
        """The kind alone: it is made of the evaluated prompts."""
        return "counterfactual"

    def require_fitting(self, evaluated: PromptPairs, where: Where | None = None) -> None:
        """Errors: `InputError` for pairs that were not run, and where prompts differ in length and a token has no
        counterpart. `where`: the tokens at which a head is ablated; None: it may be any."""
        self._rows(evaluated)
        evaluated.require_counterparts(evaluated.mask if where is None else where)

    def _rows(self, evaluated: PromptPairs) -> list[int]:
        rows = [self.row_of.get(tokens, -1) for tokens in _tokens(evaluated)]
        if -1 in rows:
            raise InputError(
                "the counterfactual outputs are of other pairs; make them with `counterfactual_outputs` on the prompts "
                "to be evaluated."
            )
        return rows

    def at(self, layer: int, evaluated: PromptPairs) -> StandIn:
        """The corrupt outputs of a layer for these prompts. Errors: `InputError` for pairs that were not run."""
        values = self.values[layer]
        return values[torch.tensor(self._rows(evaluated), device=values.device)]


def counterfactual_outputs(model: HookedModel, pairs: PromptPairs, *, batch: int = BATCH) -> CounterfactualOutputs:
    """Every head's output on the corrupt prompts of these pairs, at each clean token's counterpart."""
    model.require_eval()
    names = [hooks.z(layer) for layer in range(model.n_layers)]
    parts = [corrupt_activations(model, part, names)[1] for part in pairs.batches(batch)]
    values = {layer: torch.cat([part[name] for part in parts]) for layer, name in enumerate(names)}
    return CounterfactualOutputs(values=values, row_of={tokens: row for row, tokens in enumerate(_tokens(pairs))})


def _tokens(pairs: PromptPairs) -> Iterator[tuple[bytes, ...]]:
    """Padding is part of them: a prompt of another width was not run as it stands."""
    other = pairs.counterparts
    parts = [pairs.clean, pairs.corrupt, *([] if other is None else [other.index])]
    return (tuple(part.cpu().numpy().tobytes() for part in row) for row in zip(*parts, strict=True))
