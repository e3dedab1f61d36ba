"""What each method can do with a model, asked of the method itself: it is tried on random prompts, and what it refuses
it refuses in its own words.

A family may do with one method and not with another: where a norm stands between attention and the residual stream
(Gemma 2, OLMo 2) heads do not add up there, so that nothing can be attributed to them by linear algebra, while path
patching computes the norm anew and is exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.models import export, hooks
from workbench.models.hooked_model import HookedModel, Matrix
from workbench.patching.activation import activation_patch
from workbench.patching.attribution import attribute_edges
from workbench.patching.execution import Execution
from workbench.readouts.logit_attribution import direct_logit_attribution
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head

QUIET = Execution(progress=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Whether a method takes a model."""

    method: str
    possible: bool
    how: str
    """How it is done, or in the method's own words why it is not."""

    def text(self) -> str:
        """For the screen."""
        return f"{self.method}: {self.how}" if self.possible else f"{self.method}: no; {self.how}"


def abilities(model: HookedModel, pairs: PromptPairs, *, engine: str) -> tuple[Ability, ...]:
    """The methods in the order of the road, each tried on the pairs; `engine` is that of the model's path patching."""
    few = pairs.rows(slice(0, 2))
    way = "replay, exact and fast" if engine == "replay" else "hooked forwards, exact and slow"
    tried: dict[str, Callable[[], str]] = {
        "path patching": lambda: way,
        "activation patching": lambda: _activation(model, few, way),
        "ablation": lambda: way,
        "logit attribution": lambda: _logit_attribution(model, few),
        "edge attribution": lambda: _edge_attribution(model, few),
        "alignment and training": lambda: _training(model, few),
        "saving a student": lambda: _saving(model),
    }
    return tuple(_tried(model, method, run) for method, run in tried.items())


def _tried(model: HookedModel, method: str, run: Callable[[], str]) -> Ability:
    try:
        return Ability(method=method, possible=True, how=run())
    except InputError as error:
        return Ability(method=method, possible=False, how=str(error).removeprefix(f"{model.name}: ").rstrip("."))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return Ability(
            method=method, possible=False, how=f"it fails, which is a fault ({type(error).__name__}: {said})"
        )


def _activation(model: HookedModel, pairs: PromptPairs, way: str) -> str:
    try:
        activation_patch(model, pairs, "resid_mid", execution=QUIET)
    except InputError:
        return f"{way}; every site but resid_mid, which parallel blocks have not"
    return f"{way}; every site"


def _logit_attribution(model: HookedModel, pairs: PromptPairs) -> str:
    direct_logit_attribution(model, pairs)
    return "the parts sum to the logits"


def _edge_attribution(model: HookedModel, pairs: PromptPairs) -> str:
    attribute_edges(model, pairs, execution=QUIET)
    return "by gradients, through every norm"


def _saving(model: HookedModel) -> str:
    export.require_savable(model.model)
    return "as a transformers directory"


def _training(model: HookedModel, pairs: PromptPairs) -> str:
    """The gradient of a head's output reaches its own slices of W_V, and of no other group's; of W_Q it may reach
    others' where the queries of all heads are normed together."""
    head = Head(model.n_layers - 1, model.n_heads - 1)
    gradients = {matrix: _gradient(model, pairs, head, matrix) for matrix in ("q", "v")}
    for matrix, (own, others) in gradients.items():
        if own == 0:
            raise InputError(f"no gradient of {head}'s output reaches its W_{matrix.upper()}; it can't be trained.")
        if matrix == "v" and others:
            raise InputError(f"the output of {head} depends on other heads' W_V; a head's slices are not its own.")
    together = ", whose queries are normed together with the other heads'" if gradients["q"][1] else ""
    return f"gradients reach a head's own slices{together}"


def _gradient(model: HookedModel, pairs: PromptPairs, head: Head, matrix: Matrix) -> tuple[float, float]:
    """The largest gradient of a head's z at its own slices of a matrix, and elsewhere in that matrix."""
    part = model.head_slices(head, [matrix])[0]
    parameter = model.parameters()[part.parameter]
    with _differentiable(parameter):
        name = hooks.z(head.layer)
        _, captured = model.activations(pairs.clean, pairs.mask, [name], gradients=True)
        weighted = model.of_head(head, name, captured[name])
        loss = (weighted * torch.arange(weighted.shape[-1], device=weighted.device)).sum()
        (gradient,) = torch.autograd.grad(loss, parameter)
    own = float(gradient[part.index].abs().max())
    gradient[part.index] = 0
    return own, float(gradient.abs().max())


@contextmanager
def _differentiable(parameter: Tensor) -> Iterator[None]:
    if not parameter.is_floating_point():
        raise InputError("its weights are quantised, and do not train; train a student in float32 or bfloat16.")
    before = parameter.requires_grad
    try:
        parameter.requires_grad_(True)
        yield
    finally:
        parameter.requires_grad_(before)
