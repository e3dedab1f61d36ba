"""Attention by `torch.nn.functional.scaled_dot_product_attention`, where nobody asks for scores or patterns.

A bridge computes attention step by step, so that every step has a hook. Inside `attention(model, "sdpa")` each layer's
own `transformers` module does it in one kernel; queries, keys, values and heads' outputs keep their hooks, for they are
those of the projections around it. Scores and patterns have none then. The numbers are those of the step-by-step form
to float32 rounding (measured: 4e-6 of logits up to 13.7 in the bundled student); each model is compared once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from workbench import seeds
from workbench.errors import InputError, nearest
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.models.names import Attention

ROUNDINGS = 1e2
"""By how many roundings of the largest value the two may differ."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_SAME: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


@contextmanager
def attention(model: HookedModel, kind: Attention) -> Iterator[None]:
    """Inside, the model's attention is computed so: `eager` is as it was loaded. Errors: `InputError` where `sdpa`
    would not give the model's numbers, or not its heads' hooks."""
    if kind == "eager":
        yield
        return
    if kind != "sdpa":
        raise InputError(f"no attention {kind!r}; {nearest(str(kind), ('eager', 'sdpa'))}")
    with hooks.locked(model.model):
        if not _can_be_fused(model):
            raise InputError(
                f"the attention of {model.name} can't be computed by sdpa to the same numbers (projections in one "
                "matrix, soft caps, or TransformerLens 3.9); leave `attention: eager`."
            )
        with _fused(model):
            yield


def _can_be_fused(model: HookedModel) -> bool:
    if model.model not in _SAME:
        _SAME[model.model] = _has_parts(model) and _same(model)
    return _SAME[model.model]


def _has_parts(model: HookedModel) -> bool:
    parts = [getattr(block.attn, "original_component", None) for block in model.model.blocks]
    return hasattr(model.model, "original_model") and all(hasattr(part, name) for part in parts for name in PROJECTIONS)


@torch.no_grad()
def _same(model: HookedModel) -> bool:
    """Whether logits and every head's queries, keys, values and outputs are the same on two prompts, one padded."""
    length = min(12, model.context or 12)
    tokens = torch.randint(0, model.embeddings, (2, length), generator=seeds.generator(0, "fused attention"))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length // 3] = False
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    names = [name(layer) for layer in range(model.n_layers) for name in (hooks.q, hooks.k, hooks.v, hooks.z)]
    expected = _values(model, tokens, mask, names)
    try:
        with _fused(model):
            actual = _values(model, tokens, mask, names)
    except (InputError, TypeError, ValueError, RuntimeError, AttributeError):  # a hook was silent, or it takes no sdpa
        return False
    return all(_near(one, other) for one, other in zip(actual, expected, strict=True))


def _values(model: HookedModel, tokens: Tensor, mask: Tensor, names: list[str]) -> list[Tensor]:
    logits, captured = model.activations(tokens, mask, names)
    return [logits, *(captured[name][mask] for name in names)]


def _near(actual: Tensor, expected: Tensor) -> bool:
    allowed = ROUNDINGS * torch.finfo(expected.dtype).eps * max(1.0, float(expected.abs().max()))
    return actual.shape == expected.shape and float((actual - expected).abs().max()) <= allowed


@contextmanager
def _fused(model: HookedModel) -> Iterator[None]:
    """Each attention's forward is its `transformers` module's own. It stands in the module's dictionary alone: a bridge
    would hand an attribute on to what it wraps."""
    plain: Any = model.model
    config, parts = plain.original_model.config, [block.attn for block in plain.blocks]
    before = config._attn_implementation
    try:
        config._attn_implementation = "sdpa"
        for part in parts:
            part.__dict__["forward"] = part.original_component.forward
        yield
    finally:
        config._attn_implementation = before
        for part in parts:
            part.__dict__.pop("forward", None)
