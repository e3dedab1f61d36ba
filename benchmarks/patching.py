"""Path patching and ablation against loops of hooked forwards, in the same process, on the same prompts, with equal
numbers.

What the questions cost at least, in plain forwards F over the same prompts (L layers, H heads, T tokens, a the share of
attention in a block):

- `patch-to-logits`: clean and corrupt run, 2 F; each head then needs the MLPs above it at one of T tokens: H L (L + 1)
  / 2 of the L T
  MLP rows of a forward, (1 - a) H (L + 1) / (2 T) F. With L = H = 12, T = 40, a = 1/4: 1.5 F. The loop takes
  2 L H = 288 F: about 85 times.
- `patch-to-heads` (one early sender, all later q's one by one, all positions): the layers above each receiver, half of
  F on average; the
  function of TransformerLens costs 1.3 F a pair, for its fork of the q input: about 2.8 times.
- `patch-to-heads-last`: the same at the last token only, half of F / T a pair; the loop about 1.3 F: about 90 times,
  less the two runs.
- `discover-groups`: the sum of the searches: into the logits and q's one token, into v's at the query label four, at
  the earlier label half of them.
- `ablation-profile` (all positions): the layers above each head, half of F, less the last layer's other tokens: about
  2.2 times.
- `ablation-profile-last`: half of F / T a head: about 50 times with the clean run, for 12 heads a layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import subjects
from benchmarks.timing import Product, compared
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablate, ablated_logits, reference_means
from workbench.patching.engine.passage import Route
from workbench.patching.execution import Engine, Execution
from workbench.patching.path import PathPatcher, path_patch, prepared, sweep_heads
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import MetricFunction, log_probability, logit_difference
from workbench.values.refs import Head, Receiver

LAYERS = HEADS = 12
GROUPS = {
    "A": ((6, 1), (6, 5), (7, 2), (7, 3)),
    "B": ((4, 0), (4, 7), (5, 2), (5, 3)),
    "C": ((2, 4), (2, 6), (3, 1), (3, 5)),
}
"""Heads of the groups that receive in `discover-groups`."""


def patch_to_logits() -> dict[str, Any]:
    """All heads straight to the logits, MLPs recomputed."""
    model, pairs = (
        subjects.llama(layers=LAYERS, heads=HEADS, kv_heads=HEADS, d_model=256, d_head=22),
        subjects.random_pairs(16, 40),
    )

    def ours() -> Tensor:
        return path_patch(model, pairs, metric="logit_difference", position="all").values

    def reference() -> Tensor:
        names = [hooks.z(layer) for layer in range(LAYERS)]
        logits, clean = model.activations(pairs.clean, pairs.mask, names)
        _, corrupt = model.activations(pairs.corrupt, pairs.mask, names)
        final, values = hooks.residual_post(LAYERS - 1), torch.empty(LAYERS, HEADS, len(pairs))
        for head in model.heads:
            edits: dict[str, hooks.Edit] = {name: _constant(clean[name]) for name in names}
            edits[names[head.layer]] = _constant(
                _swapped(clean[names[head.layer]], corrupt[names[head.layer]], head.index)
            )
            with hooks.edit(model.model, edits):
                _, found = model.activations(pairs.clean, pairs.mask, [final])
            with torch.no_grad(), hooks.edit(model.model, {final: _constant(found[final])}):
                values[head.layer, head.index] = _effect(
                    logit_difference, model.final_logits(pairs.clean, pairs.mask), logits, pairs
                )
        return values

    rows, last = pairs.clean.numel(), len(pairs)
    products = 2 * LAYERS * _block(model, rows) + [
        p for layer in range(LAYERS) for p in _mlp(model, (layer + 1) * HEADS * last)
    ]
    products += [(LAYERS * HEADS * last, 256, subjects.VOCABULARY)]
    return compared("patch-to-logits", ours, reference, _forward(model, pairs), products, repeats=2)


def patch_to_heads() -> dict[str, Any]:
    """One early head into the q of every later head, all positions: against TransformerLens' own function."""
    from transformer_lens.patching import get_act_patch_direct_path

    model, pairs = subjects.gpt2(layers=LAYERS, heads=HEADS, d_model=384), subjects.random_pairs(8, 40)
    sender = Head(0, 3)

    def ours() -> Tensor:
        return _into_each_query(model, pairs, sender, "all").mean(-1)

    bridge: Any = model.model

    def reference() -> Tensor:  # TransformerLens puts clean into corrupt: its corrupted tokens are our clean ones
        _, other = bridge.run_with_cache(pairs.corrupt, names_filter=hooks.z(0))
        base, cache = bridge.run_with_cache(pairs.clean, names_filter=hooks.z(0))
        clean = logit_difference(base[:, -1], pairs.answers, pairs.distractors).mean()

        def metric(logits: Tensor) -> Tensor:
            return clean - logit_difference(logits[:, -1], pairs.answers, pairs.distractors).mean()

        with torch.no_grad():
            return get_act_patch_direct_path(
                bridge, pairs.clean, other, cache, metric, sender.layer, sender.index, "q", verbose=False
            )

    rows, last = pairs.clean.numel(), len(pairs)
    products = 2 * LAYERS * _block(model, rows)
    for layer in range(1, LAYERS):
        full = LAYERS - 1 - layer - 1  # layers between the receiver's and the last
        products += _mlp(model, HEADS * (rows if layer < LAYERS - 1 else last)) + max(full, 0) * _block(
            model, HEADS * rows
        )
        products += _last_block(model, HEADS * rows, HEADS * last) if full >= 0 else []
    return compared("patch-to-heads", ours, reference, _forward(model, pairs), products, repeats=2)


def patch_to_heads_last() -> dict[str, Any]:
    """One early head into the q of every later head at the last token."""
    model, pairs = subjects.gpt2(layers=LAYERS, heads=HEADS, d_model=384), subjects.random_pairs(8, 40)
    sender = Head(0, 3)

    def ours() -> Tensor:
        return _into_each_query(model, pairs, sender, "last")

    bridge: Any = model.model

    def reference() -> Tensor:
        name = hooks.z(0)
        logits, clean = model.activations(pairs.clean, pairs.mask, [name])
        _, corrupt = model.activations(pairs.corrupt, pairs.mask, [name])
        change = ((corrupt[name] - clean[name])[:, -1, sender.index] @ model.output_weights(0)[sender.index]).detach()
        values = torch.zeros(LAYERS, HEADS, len(pairs))
        bridge.set_use_split_qkv_input(True)
        try:
            for head in [head for head in model.heads if head.layer > 0]:

                def add(value: Tensor, head: Head = head) -> Tensor:
                    value = value.clone()
                    value[:, -1, head.index] += change
                    return value

                with torch.no_grad(), hooks.edit(model.model, {hooks.q_input(head.layer): add}):
                    values[head.layer, head.index] = _effect(
                        logit_difference, model.final_logits(pairs.clean, pairs.mask), logits, pairs
                    )
        finally:
            bridge.set_use_split_qkv_input(False)
        return values

    last = len(pairs)
    products = 2 * LAYERS * _block(model, pairs.clean.numel())
    for layer in range(1, LAYERS):
        products += _mlp(model, HEADS * last) + (LAYERS - 1 - layer) * _block(model, HEADS * last)
    return compared("patch-to-heads-last", ours, reference, _forward(model, pairs), products, repeats=2)


def discover_groups() -> dict[str, Any]:
    """The sweeps of the four-group search on grouped-query attention, 7 boxes: value fetchers in the top layers, their
    transmitters below, ..."""
    model, pairs = (
        subjects.llama(layers=8, heads=8, kv_heads=4, d_model=256, d_head=32, vocabulary=200),
        subjects.entity_pairs(14),
    )
    groups = {name: [Head(layer, index) for layer, index in heads] for name, heads in GROUPS.items()}
    above = {"A": None, "B": ("A", "q"), "C": ("B", "v"), "D": ("C", "v")}
    places = {
        "A": ("last", "all"),
        "B": ("last", "last"),
        "C": ("query_label", "query_label"),
        "D": ("earlier_label", "earlier_label"),
    }
    routes = []
    for name, into in above.items():
        receivers = () if into is None else tuple(Receiver(head, into[1]) for head in groups[into[0]])  # type: ignore[arg-type]
        routes.append(Route(position=places[name][0], receivers=receivers, receiver_position=places[name][1]))

    def search(engine: Engine | None) -> Tensor:
        patchers = prepared(model, pairs, execution=Execution(engine=engine))
        return torch.stack(
            [sweep_heads(patchers, route, metric="logit_difference").values for route in routes]
        ).nan_to_num(0.0)

    products = 2 * 8 * _block(model, pairs.clean.numel())
    for route in routes:
        products += _route_products(model, pairs, route)
    return compared(
        "discover-groups", lambda: search(None), lambda: search("hooks"), _forward(model, pairs), products, repeats=2
    )


def _route_products(model: Teacher, pairs: PromptPairs, route: Route) -> list[Product]:
    """The MLPs of the frozen runs at the senders' position; then from the lowest receiver up, the tokens from the
    receivers' position on."""
    layers, prompts = model.n_layers, len(pairs)
    reads = sorted({receiver.head.layer for receiver in route.receivers if isinstance(receiver, Receiver)}) or [layers]
    products = [p for layer in range(reads[-1]) for p in _mlp(model, (layer + 1) * model.n_heads * prompts)]
    stretch = (
        int((pairs.clean.shape[1] - pairs.position(route.position).int().argmax(1)).sum()) if route.receivers else 0
    )
    for sender_layer in range(reads[-1] if route.receivers else 0):
        start, rows = next(layer for layer in reads if layer > sender_layer), model.n_heads * stretch
        products += _mlp(model, rows if start < layers - 1 else model.n_heads * prompts) + max(
            layers - 2 - start, 0
        ) * _block(model, rows)
        products += _last_block(model, rows, model.n_heads * prompts) if start < layers - 1 else []
    return products


def ablation_profile() -> dict[str, Any]:
    """Every head mean-ablated on its own, all positions."""
    return _ablation("ablation-profile", "all")


def ablation_profile_last() -> dict[str, Any]:
    """Every head mean-ablated on its own, at the last token."""
    return _ablation("ablation-profile-last", "last")


def _ablation(name: str, position: str) -> dict[str, Any]:
    model, pairs = (
        subjects.llama(layers=LAYERS, heads=HEADS, kv_heads=HEADS, d_model=256, d_head=22),
        subjects.random_pairs(16, 40),
    )
    means = reference_means(model, pairs.swapped())

    def ours() -> Tensor:
        return ablate(model, pairs, means, metric="log_probability", position=position).values

    def reference() -> Tensor:
        values, logits = torch.empty(LAYERS, HEADS, len(pairs)), model.final_logits(pairs.clean, pairs.mask)
        for head in model.heads:
            values[head.layer, head.index] = _effect(
                log_probability, ablated_logits(model, pairs, {head: (position,)}, means), logits, pairs
            )
        return values

    slots = pairs.clean.shape[1] if position == "all" else 1
    rows, last = HEADS * len(pairs) * slots, HEADS * len(pairs)
    products = 2 * LAYERS * _block(model, pairs.clean.numel())
    for layer in range(LAYERS):
        products += _mlp(model, rows if layer < LAYERS - 1 else last) + max(LAYERS - 2 - layer, 0) * _block(model, rows)
        products += _last_block(model, rows, last) if layer < LAYERS - 1 else []
    return compared(name, ours, reference, _forward(model, pairs), products, repeats=2 if position == "all" else 3)


def _into_each_query(model: Teacher, pairs: PromptPairs, sender: Head, position: str) -> Tensor:
    patcher, values = PathPatcher(model, pairs), torch.zeros(LAYERS, HEADS, len(pairs))
    clean = logit_difference(patcher.clean_logits, pairs.answers, pairs.distractors)
    route = Route(position="all", receiver_position=position, freeze_mlps=True)
    patched = patcher.effects_on_each([frozenset([sender])], range(1, LAYERS), "q", route, logit_difference)[0]
    values[1:] = clean - patched
    return values


def _effect(metric: MetricFunction, patched: Tensor, clean: Tensor, pairs: PromptPairs) -> Tensor:
    return metric(clean, pairs.answers, pairs.distractors) - metric(patched, pairs.answers, pairs.distractors)


def _constant(value: Tensor) -> hooks.Edit:
    return lambda activation: value


def _swapped(clean: Tensor, corrupt: Tensor, head: int) -> Tensor:
    mixed = clean.clone()
    mixed[:, :, head] = corrupt[:, :, head]
    return mixed


def _forward(model: Teacher, pairs: PromptPairs) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model.model(pairs.clean, attention_mask=pairs.mask.long())

    return run


def _block(model: Teacher, rows: int) -> list[Product]:
    width, attention, keys = model.model.cfg.d_model, model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    return [(rows, width, attention + 2 * keys), (rows, attention, width), *_mlp(model, rows)]


def _last_block(model: Teacher, rows: int, last: int) -> list[Product]:
    """The last block: keys and values everywhere, the rest at the last token."""
    width, attention, keys = model.model.cfg.d_model, model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    return [(rows, width, 2 * keys), (last, width, attention), (last, attention, width), *_mlp(model, last)]


def _mlp(model: Teacher, rows: int) -> list[Product]:
    width, hidden = model.model.cfg.d_model, model.model.cfg.d_mlp
    return [(rows, width, (2 if model.model.cfg.gated_mlp else 1) * hidden), (rows, hidden, width)]


RUNS = {
    "patch-to-logits": patch_to_logits,
    "patch-to-heads": patch_to_heads,
    "patch-to-heads-last": patch_to_heads_last,
    "discover-groups": discover_groups,
    "ablation-profile": ablation_profile,
    "ablation-profile-last": ablation_profile_last,
}
