"""Prompts that begin alike, as the queries of one scene do, run as one prefix and its continuations.

    tokens  p1 ... pk | a1 ... am | b1 ... bm | ...       a continuation sees the prefix and itself, no other one;
    places   1 ...  k  k+1 .. k+m  k+1 .. k+m             its tokens stand where they stand in their own prompt

One forward of such a row gives what a forward of each prompt gives, to the rounding of sums of another length: n
prompts of k + m tokens cost k + n m tokens in place of n (k + m). What is ablated or replaced must be equal on the
prefix; where it is not, the prefix ends there. A model whose attention asks for more than who sees whom (windows,
ALiBi, TransformerLens 3.9) runs prompt by prompt: a row of a model is compared with its prompts first (and again where
longer ones come), and rows are taken only where they agree.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench import seeds
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs

log = logging.getLogger("workbench")
WORTH = 0.7
"""Rows are taken where they hold at most this share of the prompts' tokens."""
MOST = 16
"""Prompts in a row at most: attention costs the square of its tokens."""
ROUNDINGS = 1e3
"""By how many roundings of the largest logit a row may differ from its prompts."""
_SHARED: ContextVar[bool] = ContextVar("shared prefixes", default=False)
_AGREED: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()
"""Hooked transformer -> the longest prompts on which rows agreed with them; 0: they did not."""
StandIns = Mapping[int, tuple[Bool[Tensor, "batch pos head"], Tensor]]
"""Layer -> where heads are replaced, and what stands in there: [batch pos head d_head] or an axis that is 1 or left
out."""


@contextmanager
def shared_prefixes(on: bool = True) -> Iterator[None]:
    """Inside: accuracies and ablations of whole prompt sets (`plain_logits`, `ablated_logits`) run each common prefix
    once. Answers are the same; logits to rounding."""
    token = _SHARED.set(on)
    try:
        yield
    finally:
        _SHARED.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Prompts as rows of a prefix and its continuations."""

    prompt: Int[Tensor, "row slot"]
    """The prompt that a slot's token is of; of a prefix the first prompt of its row."""
    place: Int[Tensor, "row slot"]
    """Where the token stands in that prompt."""
    real: Bool[Tensor, "row slot"]
    """Whether there is a token: rows are as long as the longest."""
    branch: Int[Tensor, "row slot"]
    """0 in the prefix, from 1 on in the continuations."""
    ends: Int[Tensor, "prompt 2"]
    """Row and slot of each prompt's last token."""
    slots: Int[Tensor, "prompt pos"]
    """The slot of each token of a prompt, in the prompt's row."""

    @property
    def visible(self) -> Bool[Tensor, "row 1 slot slot"]:
        """Who sees whom; what is no token sees itself."""
        query, key = self.branch[:, :, None], self.branch[:, None]
        earlier = self.place[:, None] <= self.place[:, :, None]
        seen = ((key == 0) | (key == query)) & earlier & self.real[:, None]
        return (seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device))[:, None]

    def of(self, value: Tensor) -> Tensor:
        """[batch pos ...] at the rows' slots: [row slot ...]; an axis that is 1 stands for all."""
        prompt = self.prompt if value.shape[0] > 1 else torch.zeros_like(self.prompt)
        return value[prompt, self.place if value.shape[1] > 1 else torch.zeros_like(self.place)]

    def back(self, value: Tensor) -> Tensor:
        """[row slot ...] at the prompts' tokens: [prompt pos ...]."""
        return value[self.ends[:, :1], self.slots]


def rows_of(pairs: PromptPairs, alike: Bool[Tensor, "batch pos"] | None = None) -> Rows | None:
    """Consecutive prompts with a common beginning as rows, or None where that saves too little. `alike`: where what is
    done to a prompt equals what is done to the one before it."""
    device, pairs = pairs.clean.device, pairs.to("cpu")  # it asks prompt by prompt, and an accelerator answers slowly
    groups = _groups(pairs, None if alike is None else alike.cpu())
    length = pairs.clean.shape[1]
    rows, ends = [], torch.zeros(len(pairs), 2, dtype=torch.long)
    slots = torch.arange(length).repeat(len(pairs), 1)
    if sum(prefix + len(members) * (length - prefix) for members, prefix in groups) > WORTH * pairs.clean.numel():
        return None
    for number, (members, prefix) in enumerate(groups):
        places = [torch.arange(prefix), *[torch.arange(prefix, length)] * len(members)]
        branch = torch.cat([torch.full_like(part, each) for each, part in enumerate(places)])
        prompt = torch.tensor([members[0], *members])[branch]
        rows.append((prompt, torch.cat(places), branch))
        for earlier, member in enumerate(members):
            slots[member, prefix:] += earlier * (length - prefix)
            ends[member] = torch.tensor([number, int(slots[member, int(pairs.mask[member].nonzero().max())])])
    prompt, place, branch = (
        torch.nn.utils.rnn.pad_sequence([row[part] for row in rows], batch_first=True) for part in range(3)
    )
    there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row[0]) for row in rows], batch_first=True).bool()
    real = there & pairs.mask[prompt, place]
    return Rows(
        prompt=prompt.to(device),
        place=place.to(device),
        real=real.to(device),
        branch=branch.to(device),
        ends=ends.to(device),
        slots=slots.to(device),
    )


def _groups(pairs: PromptPairs, alike: Tensor | None) -> list[tuple[list[int], int]]:
    """The prompts of each row, and how many places of them are its prefix: at most all but the last real one."""
    same = (pairs.clean[1:] == pairs.clean[:-1]) & (pairs.mask[1:] == pairs.mask[:-1])
    if alike is not None:
        same &= alike[1:]
    common = same.long().cumprod(1).sum(1).tolist()
    padded = (pairs.mask[1:] != pairs.mask[:-1]).any(1).tolist()
    last = pairs.mask.shape[1] - 1 - pairs.mask.flip(1).int().argmax(1)
    groups: list[tuple[list[int], int]] = [([0], 0)] if len(pairs) else []
    for prompt, shared in enumerate(common, 1):
        members, prefix = groups[-1]
        shared = min(shared, int(last[prompt]), prefix if len(members) > 1 else shared)
        if len(members) < MOST and not padded[prompt - 1] and 2 * shared >= pairs.clean.shape[1]:
            groups[-1] = ([*members, prompt], shared)
        else:
            groups.append(([prompt], 0))
    return groups


def shared_logits(
    model: HookedModel, pairs: PromptPairs, stand_ins: StandIns | None = None
) -> Float[Tensor, "batch d_vocab"] | None:
    """Final logits on the clean prompts, with heads replaced, by rows; None where these prompts or this model are to be
    run prompt by prompt."""
    if not _SHARED.get() or len(pairs) < 2:
        return None
    stand_ins = {layer: (mask, _full(value)) for layer, (mask, value) in (stand_ins or {}).items()}
    rows = rows_of(pairs, _alike(pairs, stand_ins))
    if rows is None or not _agrees(model, pairs, stand_ins, rows):
        return None
    return _by_rows(model, pairs, stand_ins, rows)


@torch.no_grad()
def rows_agree(model: HookedModel, pairs: PromptPairs) -> bool:
    """Whether prompts share enough, and the model in the mode that it is in (with dropout it does not) gives for a row
    of them what it gives prompt by prompt."""
    ordered = pairs.rows(_order(pairs))
    rows = rows_of(ordered)
    with seeds.local(0, "rows agree", device=model.device):
        return rows is not None and _compared(model, ordered, {}, rows)


def shared_activations(
    model: HookedModel, pairs: PromptPairs, names: Sequence[str], *, gradients: bool = False
) -> tuple[Float[Tensor, "batch d_vocab"], dict[str, Tensor]] | None:
    """Final logits on the clean prompts and activations [batch pos ...] by hook name, as `HookedModel.activations`
    gives them, from rows of the prompts in whatever order they stand; None where they share too little. Ask
    `rows_agree` first."""
    order = _order(pairs)
    ordered = pairs.rows(order)
    rows = rows_of(ordered)
    if rows is None:
        return None
    with torch.set_grad_enabled(gradients), hooks.capture(model.model, names, detach=not gradients) as captured:
        logits = _by_rows(model, ordered, {}, rows)
    back = order.argsort()
    return logits[back], {name: rows.back(value)[back] for name, value in captured.items()}


def _order(pairs: PromptPairs) -> Int[Tensor, " batch"]:
    """Prompts by their tokens, first to last: those with a common beginning stand together."""
    return torch.from_numpy(np.lexsort(pairs.clean.cpu().numpy().T[::-1])).to(pairs.clean.device)


def _full(value: Tensor) -> Tensor:
    return value if value.ndim == 4 else value[None]


def _alike(pairs: PromptPairs, stand_ins: StandIns) -> Bool[Tensor, "batch pos"] | None:
    if not stand_ins:
        return None
    alike = torch.ones_like(pairs.mask)
    for mask, value in stand_ins.values():
        alike[1:] &= (mask[1:] == mask[:-1]).all(-1)
        if value.shape[0] > 1:
            alike[1:] &= ((value[1:] == value[:-1]).all(-1) | ~mask[1:]).all(-1)
    return alike


def _agrees(model: HookedModel, pairs: PromptPairs, stand_ins: StandIns, rows: Rows) -> bool:
    """Whether a row gives what its prompts give one by one, as far as this model has not been asked before."""
    length, known = pairs.clean.shape[1], _AGREED.get(model.model)
    if known is None or 0 < known < length:
        _AGREED[model.model] = known = length if _compared(model, pairs, stand_ins, rows) else 0
    return known >= length


def _compared(model: HookedModel, pairs: PromptPairs, stand_ins: StandIns, rows: Rows) -> bool:
    fullest = (rows.ends[:, 0] == rows.ends[:, 0].mode().values).nonzero()
    few = slice(int(fullest.min()), int(fullest.max()) + 1)
    part = pairs.rows(few)
    cut = {
        layer: (mask[few], value[few] if value.shape[0] > 1 else value) for layer, (mask, value) in stand_ins.items()
    }
    short = rows_of(part, _alike(part, cut))
    if short is None:
        return False
    edits = {hooks.z(layer): _edit(mask[..., None], value) for layer, (mask, value) in cut.items()}
    with hooks.edit(model.model, edits):
        expected = model.final_logits(part.clean, part.mask)
    try:
        actual = _by_rows(model, part, cut, short)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # it takes no such mask
        log.debug("%s runs prompt by prompt: %s", model.name, error)
        return False
    allowed = ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.abs().max().clamp(min=1.0))
    return float((actual - expected).abs().max()) <= allowed


def _by_rows(model: HookedModel, pairs: PromptPairs, stand_ins: StandIns, rows: Rows) -> Float[Tensor, "batch d_vocab"]:
    tokens, places = pairs.clean[rows.prompt, rows.place], (pairs.mask.long().cumsum(-1) - 1).clamp(min=0)
    edits = {
        hooks.z(layer): _edit(rows.of(mask)[..., None], rows.of(value)) for layer, (mask, value) in stand_ins.items()
    }
    unembed = model.model.unembed
    with hooks.locked(model.model), hooks.edit(model.model, edits):
        handle = unembed.register_forward_pre_hook(
            lambda _, given: (given[0][rows.ends[:, 0], rows.ends[:, 1]][:, None], *given[1:])
        )
        try:
            logits = model.model(
                tokens,
                attention_mask=rows.visible,
                position_ids=places[rows.prompt, rows.place],  # pyright: ignore[reportCallIssue]
            )
        finally:
            handle.remove()
    return logits[:, 0]


def _edit(mask: Tensor, value: Tensor) -> hooks.Edit:
    def change(activation: Tensor) -> Tensor:
        return torch.where(mask, value.to(dtype=activation.dtype, device=activation.device), activation)

    return change
