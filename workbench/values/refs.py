"""Names of places in a model: heads, receivers. Frozen, ordered, hashable and inert: no model in sight."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError

Composition = Literal["q", "k", "v"]
Position = str
"""A named position of `PromptPairs`: `last`, `query_label`, ..., or `all`."""


@dataclass(frozen=True, slots=True, order=True)
class Head:
    """An attention head (a query head, where keys and values are shared), written `L5H3`."""

    layer: int
    index: int

    def __post_init__(self) -> None:
        if self.layer < 0 or self.index < 0:
            raise InputError(f"a head has a layer and an index from 0 up, not ({self.layer}, {self.index}).")

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        """`L5H3` or `5.3` -> Head(5, 3)."""
        match = re.fullmatch(r"L?(\d+)[H.](\d+)", text.strip()) if isinstance(text, str) else None
        if match is None:
            raise InputError(f"{text!r} is not a head; write L5H3 (layer 5, head 3).")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True, order=True)
class Receiver:
    """The q, k or v input of a head. With grouped-query attention k and v are those of the head's whole key-value
    group."""

    head: Head
    composition: Composition

    def __str__(self) -> str:
        return f"{self.head}.{self.composition}"


@dataclass(frozen=True, slots=True, order=True)
class Mlp:
    """The MLP of a layer, written `M5`: as a sender its output, as a receiver its input."""

    layer: int

    def __str__(self) -> str:
        return f"M{self.layer}"


@dataclass(frozen=True, slots=True, order=True)
class Embedding:
    """The token embedding, written `embed`."""

    def __str__(self) -> str:
        return "embed"


Sender = Head | Mlp | Embedding
"""What can write to the residual stream."""
PathEnd = Receiver | Mlp
"""What can read from the residual stream on its way to the logits."""


def head_named(head: Head | str) -> Head:
    """`L5H3` -> Head(5, 3); a head stays itself. Errors: `InputError` for anything else."""
    return head if isinstance(head, Head) else Head.parse(head)


def heads_named(heads: Iterable[Head | str]) -> list[Head]:
    """`head_named` of several, in their order. Errors: `InputError` also for a text that is one name (which is no list
    of names)."""
    if isinstance(heads, str):
        raise InputError(f"{heads!r} names one head where several are meant; write [{heads!r}].")
    return [head_named(head) for head in heads]


def sender_named(sender: Sender | str) -> Sender:
    """`L5H3`, `M5` or `embed` -> the sender; a sender stays itself. Errors: `InputError` for anything else."""
    if not isinstance(sender, str):
        return sender
    if sender.strip() == "embed":
        return Embedding()
    return _mlp(sender) or Head.parse(sender)


def path_end_named(end: PathEnd | str) -> PathEnd:
    """`L5H3.q` or `M5` -> the receiver; a receiver stays itself. Errors: `InputError` for anything else."""
    if not isinstance(end, str):
        return end
    head, _, composition = end.strip().rpartition(".")
    if composition in ("q", "k", "v") and head:
        return Receiver(Head.parse(head), composition)
    mlp = _mlp(end)
    if mlp is None:
        raise InputError(f"{end!r} reads nothing; write L5H3.q (or .k, .v), or M5 for an MLP.")
    return mlp


def _mlp(text: str) -> Mlp | None:
    match = re.fullmatch(r"M(\d+)", text.strip())
    return None if match is None else Mlp(int(match[1]))
