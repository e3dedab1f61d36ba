"""What distillation costs: the teacher's outputs on disk, an optimizer step, the optimizer's memory."""

from dataclasses import dataclass

from workbench.plan.arithmetic import backward, cka, early_forward, forward
from workbench.plan.shapes import ModelShape

LABEL, TOKEN, MASS = 8, 4, 4
"""Bytes in a shard of a label, of a kept logit's token, of the others' mass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What of a student trains."""

    parameters: int
    """Scalars that the optimizer holds."""
    touched: int | None
    """Scalars in the parameters that take gradients: whole attention matrices; None: every parameter."""
    matrices: int | None
    """Weights of those matrices in all layers (no biases), for the arithmetic."""

    @classmethod
    def everything(cls, shape: ModelShape) -> "Trained":
        """Every parameter, whole."""
        return cls(parameters=shape.parameters, touched=None, matrices=None)

    @classmethod
    def heads(cls, shape: ModelShape, heads: int, *, train_kv: bool, lora_rank: int | None) -> "Trained":
        """At most what so many heads of the student own, in as many layers as there are or as they can stand in."""
        layers = min(heads, shape.layers)
        touched = shape.attention_weights if train_kv else 2 * shape.query_weights
        parameters = shape.most_slice_parameters(heads, train_kv=train_kv, lora_rank=lora_rank)
        return cls(parameters=parameters, touched=layers * touched, matrices=layers * touched)

    def gradient_and_optimizer_bytes(self, shape: ModelShape, width: int) -> int:
        """Gradients of the touched parameters; leaf, gradient and AdamW's two moments of what trains."""
        return width * ((shape.parameters if self.touched is None else self.touched) + 4 * self.parameters)


def cache_bytes(
    shape: ModelShape,
    prompts: int,
    tokens: int,
    layers: int,
    *,
    width: int,
    shards: bool,
    activation: str = "z",
    top: int | None = None,
) -> int:
    """The teacher's outputs on disk: logits, and `hook_z` (or patterns) of whole layers at all tokens; of shards also
    labels and W_O.

    prompts (tokens layers heads d_head + d_vocab) values; patterns: tokens^2 layers heads in place of the former. With
    `top`, so many logits with their tokens, and the mass of the others, in place of d_vocab. Without the files'
    headers.
    """
    each = tokens * shape.heads * (tokens if activation == "pattern" else shape.d_head)
    logits = shape.d_vocab * width
    if top is not None:
        logits = min(top, shape.d_vocab) * (width + TOKEN) + MASS
    values = prompts * (layers * each * width + logits)
    patterns = 0 if activation == "pattern" else layers * shape.query_weights * width
    return values + (prompts * LABEL + patterns if shards else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An optimizer step on `batch` prompts of `tokens` tokens."""

    student: ModelShape
    teacher: ModelShape
    batch: int
    tokens: int
    trained: Trained
    pairs: int
    """Aligned pairs; 0 without alignment."""
    rows: int
    """m: rows of each pair."""
    accumulate: int = 1
    whole: bool = True
    """The alignment sees the whole batch, which a split batch pays with a second forward."""
    live: bool = False
    """The teacher runs on each batch."""
    runs: int = 1
    """The student's forwards with a backward: those on the corrupt prompts and with heads interchanged too."""

    def operations(self, *, lowest: int = 0) -> int:
        """Student forward and backward, alignment, and what a split batch or a live teacher adds."""
        once = forward(self.student, self.batch, self.tokens)
        again = (
            early_forward(self.student, self.batch, self.tokens)
            if self.pairs and self.whole and self.accumulate > 1
            else 0
        )
        taught = forward(self.teacher, self.batch, self.tokens) if self.live else 0
        back = backward(self.student, self.batch, self.tokens, touched=self.trained.matrices, lowest=lowest)
        return (
            self.runs * (once + back)
            + again
            + taught
            + self.pairs * cka(self.rows, self.student.d_head, self.teacher.d_head)
        )
