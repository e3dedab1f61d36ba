"""`Edge`: one way from a sender to a receiver in the graph of a model, and the order of its nodes."""

from dataclasses import dataclass
from typing import Literal

from workbench.values.refs import (
    Embedding,
    Head,
    Mlp,
    PathEnd,
    Receiver,
    Sender,
    path_end_named,
    sender_named,
)

LOGITS: Literal["logits"] = "logits"
TOP = 1 << 30
"""Above every layer."""
Reader = PathEnd | Literal["logits"]
"""What an edge leads into."""
Node = Sender | Literal["logits"]
"""What writes or is written: embedding, heads, MLPs, logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """From what a sender writes to what one receiver reads, with the score by which it was chosen."""

    sender: Sender
    receiver: Reader
    score: float | None = None

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}"

    def to_json(self) -> dict[str, str | float | None]:
        """Plain JSON values."""
        return {"sender": str(self.sender), "receiver": str(self.receiver), "score": self.score}

    @classmethod
    def read(cls, written: "WrittenEdge") -> "Edge":
        """An edge as a file has it. Errors: `InputError` for what is no sender or receiver."""
        receiver: Reader = LOGITS if written.receiver == LOGITS else path_end_named(written.receiver)
        return cls(sender=sender_named(written.sender), receiver=receiver, score=written.score)

    @property
    def into(self) -> Node:
        """The node that reads it (with grouped-query attention the group's first head, for k and v)."""
        return self.receiver.head if isinstance(self.receiver, Receiver) else self.receiver

    @property
    def order(self) -> tuple[object, ...]:
        """Its place among others: by sender, then receiver, from the embedding up."""
        reader = self.receiver
        if reader == LOGITS:
            return (height(self.sender), (TOP, 0, 0, ""))
        kind = reader.composition if isinstance(reader, Receiver) else ""
        return (height(self.sender), (*height(self.into), kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenEdge:
    """An edge as it is written."""

    sender: str
    receiver: str
    score: float | None = None


def height(node: Node) -> tuple[int, int, int]:
    """Where a node stands on the way up: layer, then heads before the MLP."""
    if isinstance(node, Head):
        return (node.layer, 0, node.index)
    return (
        (node.layer, 1, 0) if isinstance(node, Mlp) else (-1, 0, 0) if isinstance(node, Embedding) else (1 << 30, 0, 0)
    )
