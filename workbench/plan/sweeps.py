"""Operations of the sweeps over heads: ablation of every head, path patching of every head into the logits or into
receivers.

The geometry (which tokens a replay recomputes) is taken from the prompts by the engine's own functions; the arithmetic
is that of `patching/replay.py`, `frozen.py` and `passage.py`. Receivers are not known before a search: a plan takes one
in every layer, which is the most that a stage can cost.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.patching.engine.passage import group_by_stretch
from workbench.patching.engine.window import Spots, Window
from workbench.plan.arithmetic import attention, clean_run, forward, joined, linear, unembedding, upward
from workbench.plan.shapes import ModelShape
from workbench.tasks.base import PromptPairs


@dataclass(frozen=True, slots=True)
class Stretch:
    """What is recomputed of some prompts: `slots` tokens from the first change on, which see `keys`; `spots` tokens
    change."""

    prompts: int
    slots: int
    keys: int
    spots: int


def stretches(pairs: PromptPairs, sending: str, receiving: str, *, batch: int) -> Iterator[Stretch]:
    """The groups of prompts that a sweep replays together."""
    for part in pairs.batches(batch):
        changed = part.position(sending) & part.position(receiving)
        for rows in group_by_stretch(part.mask, changed):
            window = Window.of(part.mask[rows], changed[rows].int().argmax(1))
            spots = Spots.of(changed[rows]).index.shape[1]
            yield Stretch(
                prompts=len(rows), slots=window.width, keys=window.prefix.shape[1] + window.width, spots=spots
            )


def ablation(shape: ModelShape, pairs: PromptPairs, *, batch: int, position: str = "all") -> int:
    """Every head ablated on its own: what it writes instead, the MLP beside it, the layers above. One clean run for
    all."""
    operations = sum(clean_run(shape, len(part), part.clean.shape[1]) for part in pairs.batches(batch))
    for stretch in stretches(pairs, position, "all", batch=batch):
        rows = shape.heads * stretch.prompts
        for layer in range(shape.layers):
            operations += linear(stretch.prompts * stretch.slots, shape.query_weights) + joined(
                shape, layer, rows, stretch.slots
            )
            operations += upward(shape, layer + 1, rows, stretch.slots, stretch.keys)
    return operations


def clean_and_corrupt(shape: ModelShape, pairs: PromptPairs, *, batch: int) -> int:
    """The two runs that all stages of a search share."""
    parts = [(len(part), part.clean.shape[1]) for part in pairs.batches(batch)]
    return sum(clean_run(shape, *part) + forward(shape, *part) for part in parts)


def to_logits(shape: ModelShape, pairs: PromptPairs, *, batch: int) -> int:
    """Direct effects of all heads: every attention frozen, the MLPs above each head at the last token, and its
    logits."""
    operations = 0
    for part in pairs.batches(batch):
        operations += _frozen(shape, range(shape.layers), shape.layers, len(part), 1) + unembedding(
            shape, shape.layers * shape.heads * len(part)
        )
    return operations


@dataclass(frozen=True, slots=True)
class Receiving:
    """What receives in one layer: how many query heads' q, or key-value groups' k or v."""

    count: int
    composition: Literal["q", "k", "v"]

    def heads(self, shape: ModelShape) -> int:
        """Query heads that are computed anew: with a replaced k or v all of its group."""
        return self.count if self.composition == "q" else self.count * (shape.heads // shape.kv_heads)


def into_heads(
    shape: ModelShape,
    pairs: PromptPairs,
    receivers: Mapping[int, Receiving],
    sending: str,
    receiving: str,
    *,
    batch: int,
) -> int:
    """Every head below the highest receiver, into the receivers (layer -> what receives there) at a position.

    A sender's change reaches the receivers through MLPs alone (the frozen run); from its lowest receiver on the layers
    are replayed.
    """
    layers, operations = sorted(receivers), 0
    for stretch in stretches(pairs, sending, receiving, batch=batch):
        for below, first in zip([0, *layers], layers, strict=False):
            if first > below:
                operations += _through(
                    shape,
                    range(below, first),
                    [layer for layer in layers if layer >= first],
                    receivers,
                    stretch,
                    pairs.clean.shape[1],
                )
    return operations


def _through(
    shape: ModelShape,
    senders: range,
    layers: Sequence[int],
    receivers: Mapping[int, Receiving],
    stretch: Stretch,
    tokens: int,
) -> int:
    """The senders of some layers, whose lowest receivers stand in `layers[0]`."""
    first, variants = layers[0], len(senders) * shape.heads
    rows, heads = variants * stretch.prompts, receivers[first].heads(shape)
    operations = _frozen(shape, senders, layers[-1], stretch.prompts, stretch.spots)
    operations += sum(
        linear(rows * stretch.spots, shape.d_model * receivers[layer].count * shape.d_head) for layer in layers
    )
    keys = tokens if receivers[first].composition == "q" else stretch.keys
    operations += attention(shape, rows, stretch.slots, keys) * heads // shape.heads
    operations += linear(rows * stretch.slots, heads * shape.d_head * shape.d_model) + joined(
        shape, first, rows, stretch.slots
    )
    return operations + upward(shape, first + 1, rows, stretch.slots, stretch.keys)


def _frozen(shape: ModelShape, senders: range, top: int, prompts: int, spots: int) -> int:
    """The frozen run up to `top`: senders join in their layers; each goes on through the MLPs at its spots."""
    operations, variants = 0, 0
    for layer in range(top):
        if layer in senders:
            variants += shape.heads
            operations += linear(prompts * spots, shape.query_weights) + linear(
                prompts * spots, shape.heads * shape.heads * shape.d_model
            )
        operations += linear(variants * prompts * spots, shape.mlp_weights)
    return operations


def receivers_everywhere(shape: ModelShape, heads: int, composition: Literal["q", "k", "v"]) -> dict[int, Receiving]:
    """`heads` receivers spread over all layers, at least one in each: from above, what a stage can cost."""
    count = -(-heads // shape.layers)
    return {
        layer: Receiving(min(count, shape.heads if composition == "q" else shape.kv_heads), composition)
        for layer in range(1, shape.layers)
    }
