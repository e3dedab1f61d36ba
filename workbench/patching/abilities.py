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
from workbench.models import export, hooks, quantisation
from workbench.models.hooked_model import HookedModel, Matrix
from workbench.patching.ablation import ablated_logits, ablation_profiles, counterfactual_outputs, plain_logits
from workbench.patching.activation import activation_patch
from workbench.patching.attribution import attribute_edges
from workbench.patching.edge_circuit import EdgePatcher
from workbench.patching.execution import Execution
from workbench.readouts.logit_attribution import direct_logit_attribution
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import metric_named
from workbench.values.refs import Head

QUIET = Execution(progress=False)
METRIC = "log_probability"
ROUNDING = 1e-3
"""How far two ways to one number may lie apart, as a share of the largest (of 1 at least); a fault is many times
larger."""


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
    """The methods in the order of the road, each tried on the first and the last pair; `engine` is that of the model's
    path patching."""
    few = pairs.rows(torch.tensor([0, len(pairs) - 1]))
    way = "replay, exact and fast" if engine == "replay" else "hooked forwards, exact and slow"
    tried: dict[str, Callable[[], str]] = {
        "path patching": lambda: way,
        "activation patching": lambda: _activation(model, few, way),
        "ablation": lambda: _ablation(model, few, way),
        "logit attribution": lambda: _logit_attribution(model, few),
        "edge attribution": lambda: _edge_attribution(model, few),
        "circuits of edges": lambda: _edge_circuits(model, few),
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
    parallel = model.has_parallel_blocks
    for site in ("z", "attn_out" if parallel else "resid_mid"):
        activation_patch(model, pairs, site, execution=QUIET)
    return f"{way}; every site" + (" but resid_mid, which parallel blocks have not" if parallel else "")


def _ablation(model: HookedModel, pairs: PromptPairs, way: str) -> str:
    """A head's impact by the sweep (which may replay) is that by one hooked forward."""
    head, stand_in = Head(0, model.n_heads - 1), counterfactual_outputs(model, pairs)
    swept = ablation_profiles(model, pairs, stand_in, metrics=METRIC, heads=[head], execution=QUIET)[METRIC].at(head)
    whole, without = (
        metric_named(METRIC)(logits, pairs.answers, pairs.distractors).float().cpu()
        for logits in (plain_logits(model, pairs), ablated_logits(model, pairs, {head: ["all"]}, stand_in))
    )
    _require_equal(swept, whole - without, whole, "ablating a head by the sweep differs from hooked forwards")
    return way


def _logit_attribution(model: HookedModel, pairs: PromptPairs) -> str:
    direct_logit_attribution(model, pairs)
    return "the parts sum to the logits"


def _edge_attribution(model: HookedModel, pairs: PromptPairs) -> str:
    """Everything that the embeddings do, they do along their edges: the edges' scores sum to the change in the
    embeddings times the metric's gradient there."""
    scores = attribute_edges(model, pairs, metric=METRIC, execution=QUIET).values[0].nansum(0)
    name = hooks.residual_pre(0)
    clean, corrupt = (model.activations(tokens, pairs.mask, [name])[1][name] for tokens in (pairs.clean, pairs.corrupt))
    with torch.enable_grad():
        leaf = clean.clone().requires_grad_()
        with hooks.edit(model.model, {name: lambda _: leaf}):
            values = metric_named(METRIC)(model.final_logits(pairs.clean, pairs.mask), pairs.answers, pairs.distractors)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    whole = ((clean - corrupt) * gradient * pairs.mask[..., None]).sum((1, 2)).float().cpu()
    _require_equal(scores, whole, whole, "the scores of its edges do not sum to the whole gradient")
    return "by gradients, through every norm"


def _edge_circuits(model: HookedModel, pairs: PromptPairs) -> str:
    EdgePatcher(model, pairs, execution=QUIET)
    return "the graph of all edges gives the clean run"


def _require_equal(actual: Tensor, expected: Tensor, scale: Tensor, fault: str) -> None:
    difference = float((actual - expected).abs().max())
    if not difference <= ROUNDING * max(1.0, float(scale.abs().max())):
        raise InputError(f"{fault} (difference {difference:.1e}).")


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
    if quantisation.is_quantised(parameter) or not parameter.is_floating_point():
        raise InputError("its weights are quantised, and do not train; train a student in float32 or bfloat16.")
    before = parameter.requires_grad
    try:
        parameter.requires_grad_(True)
        yield
    finally:
        parameter.requires_grad_(before)
