"""Hook names and the two contexts that use them: `capture` records activations, `edit` replaces them.

The only file that spells hook names. Names follow TransformerLens: a name is built from what it means and never parsed.
An unknown name raises at once and names the nearest known ones; a hook that never fired raises when its context ends;
hooks are removed in any case. One thread at a time holds a model's hooks (`alone`), so that a sweep in the background
never edits the forwards of another thread. Order: an edit sees what earlier edits of the same forward left; a capture
sees the edited value, if it was opened after the edit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import Tensor

from workbench.errors import InputError, nearest

Edit = Callable[[Tensor], Tensor]
"""Takes an activation, returns a new tensor of the same shape; never writes in place."""


@runtime_checkable
class Hooked(Protocol):
    """What a hooked transformer offers to this file (TransformerBridge and HookedTransformer both do)."""

    @property
    def hook_dict(self) -> Any: ...

    def hooks(
        self,
        fwd_hooks: list[Any] = ...,
        bwd_hooks: list[Any] = ...,
        reset_hooks_end: bool = ...,
        clear_contexts: bool = ...,
    ) -> Any: ...


def embedding() -> str:
    """The token embedding: [batch pos d_model]."""
    return "hook_embed"


def z(layer: int) -> str:
    """Heads' outputs before W_O: [batch pos head d_head]."""
    return f"blocks.{layer}.attn.hook_z"


def q(layer: int) -> str:
    """Queries before rotary: [batch pos head d_head]."""
    return f"blocks.{layer}.attn.hook_q"


def q_input(layer: int) -> str:
    """What each head's queries are computed from, before the normalisation: [batch pos head d_model]; only with a split
    q, k, v input."""
    return f"blocks.{layer}.hook_q_input"


def k(layer: int) -> str:
    """Keys before rotary: [batch pos kv_head d_head]."""
    return f"blocks.{layer}.attn.hook_k"


def v(layer: int) -> str:
    """Values: [batch pos kv_head d_head]."""
    return f"blocks.{layer}.attn.hook_v"


def pattern(layer: int) -> str:
    """Attention probabilities: [batch head query_pos key_pos]."""
    return f"blocks.{layer}.attn.hook_pattern"


def rotary_cos(layer: int) -> str:
    """Cosines of the rotary angles of every position: [1 or batch, pos, rotary width]; only in models with rotary
    positions."""
    return f"blocks.{layer}.attn.hook_cos"


def rotary_sin(layer: int) -> str:
    """Sines of the rotary angles, as `rotary_cos`."""
    return f"blocks.{layer}.attn.hook_sin"


def attention_output(layer: int) -> str:
    """What attention adds to the residual stream: [batch pos d_model]. The sum of the heads' outputs and the output
    bias, normed or scaled where the block does so (post-norm families, Granite)."""
    return f"blocks.{layer}.hook_attn_out"


def attention_sum(layer: int) -> str:
    """Sum of the heads' outputs and the output bias, before any norm or factor: [batch pos d_model]
    (TransformerBridge)."""
    return f"blocks.{layer}.attn.hook_out"


def norm_ends(which: Literal["attention", "mlp", "final"], layer: int) -> tuple[str, str]:
    """What a normalisation reads and what it gives: [batch pos d_model] (TransformerBridge; parallel blocks may have
    one alone, and the last one has no layer)."""
    place = {"attention": f"blocks.{layer}.ln1", "mlp": f"blocks.{layer}.ln2", "final": "ln_final"}[which]
    return f"{place}.hook_in", f"{place}.hook_out"


def mlp_input(layer: int) -> str:
    """What the MLP reads, normalised: [batch pos d_model] (TransformerBridge)."""
    return f"blocks.{layer}.mlp.hook_in"


def mlp_output(layer: int) -> str:
    """[batch pos d_model]."""
    return f"blocks.{layer}.hook_mlp_out"


def residual_pre(layer: int) -> str:
    """The residual stream that enters a block: [batch pos d_model]."""
    return f"blocks.{layer}.hook_resid_pre"


def residual_post(layer: int) -> str:
    """The residual stream that leaves a block: [batch pos d_model]."""
    return f"blocks.{layer}.hook_resid_post"


def checked(model: Hooked, names: Sequence[str]) -> list[str]:
    """The names, or `InputError` for the first that this model does not have."""
    known = model.hook_dict
    for name in names:
        if name not in known:
            raise InputError(f"this model has no hook {name!r}; {nearest(name, known)}")
    return list(names)


_LOCKS: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()


def locked(model: Hooked) -> Any:
    """The lock of a model (re-entrant): whoever holds it is the only thread that runs the model through the
    workbench."""
    return _LOCKS.setdefault(model, RLock())


@contextmanager
def capture(model: Hooked, names: Sequence[str], *, detach: bool = True) -> Iterator[dict[str, Tensor]]:
    """Record activations by hook name during the forwards inside the context (the last forward wins).

    With `detach=False` the tensors stay in the autograd graph, so that a loss on them trains the model.
    """
    wanted = checked(model, names)
    captured: dict[str, Tensor] = {}
    with locked(model), model.hooks(fwd_hooks=[(name, partial(_record, captured, name, detach)) for name in wanted]):
        yield captured
    _refuse_silent([name for name in wanted if name not in captured])


class _AllRecorded(Exception):
    """Everything that was asked for has been seen: the rest of the forward is not needed."""


@contextmanager
def capture_and_stop(model: Hooked, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record activations by hook name, and end the forward inside the context as soon as the last of them is there (it
    returns nothing)."""
    wanted = checked(model, names)
    captured: dict[str, Tensor] = {}

    def record(name: str, activation: Tensor, *, hook: Any) -> None:
        captured[name] = activation.detach()
        if len(captured) == len(wanted):
            raise _AllRecorded

    try:
        with locked(model), model.hooks(fwd_hooks=[(name, partial(record, name)) for name in wanted]):
            yield captured
    except _AllRecorded:
        pass
    _refuse_silent([name for name in wanted if name not in captured])


@contextmanager
def edit(model: Hooked, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace activations by hook name during the forwards inside the context."""
    checked(model, list(edits))
    fired: set[str] = set()
    with (
        locked(model),
        model.hooks(fwd_hooks=[(name, partial(_replace, fired, name, change)) for name, change in edits.items()]),
    ):
        yield
    _refuse_silent([name for name in edits if name not in fired])


def _record(captured: dict[str, Tensor], name: str, detach: bool, activation: Tensor, *, hook: Any) -> None:
    captured[name] = activation.detach() if detach else activation


def _replace(fired: set[str], name: str, change: Edit, activation: Tensor, *, hook: Any) -> Tensor:
    fired.add(name)
    changed = change(activation)
    if changed.shape != activation.shape:
        raise InputError(
            f"the edit of {name} turned shape {tuple(activation.shape)} into {tuple(changed.shape)}; return the same "
            "shape."
        )
    return changed


def _refuse_silent(silent: Sequence[str]) -> None:
    if silent:
        raise RuntimeError(
            f"hooks that never fired: {', '.join(silent)}; was the model run inside the context, with this part of it "
            "switched on?"
        )
