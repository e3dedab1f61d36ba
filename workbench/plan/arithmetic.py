"""Operations of a decoder: what a forward, a backward pass and a replay multiply. Counted as PyTorch counts them: 2 a
multiplication and addition.

Only matrix products count (norms, rotations and softmax are a few per cent of a small model and less of a large one).
Tests compare every function here with PyTorch's own counter on real runs (tests/plan/test_plan_measured.py).
"""

from workbench.plan.shapes import ModelShape


def linear(rows: int, weights: int) -> int:
    """So many rows through matrices of so many weights."""
    return 2 * rows * weights


def attention(shape: ModelShape, rows: int, queries: int, keys: int) -> int:
    """Scores and weighted values of every head: 2 x 2 heads d_head queries keys, in each of `rows` prompts."""
    return 4 * rows * queries * keys * shape.heads * shape.d_head


def unembedding(shape: ModelShape, rows: int) -> int:
    """Logits of so many tokens."""
    return linear(rows, shape.d_model * shape.d_vocab)


def block(shape: ModelShape, rows: int, slots: int, keys: int) -> int:
    """One block on `slots` tokens of each of `rows` prompts, which attend to `keys`."""
    return linear(rows * slots, shape.block_weights) + attention(shape, rows, slots, keys)


def last_block(shape: ModelShape, rows: int, slots: int, keys: int) -> int:
    """The last block of a replay: keys and values of all slots, the rest at the last token."""
    return (
        linear(rows * slots, shape.kv_weights)
        + linear(rows, shape.block_weights - shape.kv_weights)
        + attention(shape, rows, 1, keys)
    )


def forward(shape: ModelShape, prompts: int, tokens: int) -> int:
    """A plain forward, with the logits of each prompt's last token."""
    return shape.layers * block(shape, prompts, tokens, tokens) + unembedding(shape, prompts)


def early_forward(shape: ModelShape, prompts: int, tokens: int) -> int:
    """A forward that ends at the heads' outputs in the last layer: neither W_O and MLP there nor logits."""
    rows = prompts * tokens
    return (
        forward(shape, prompts, tokens)
        - unembedding(shape, prompts)
        - linear(rows, shape.query_weights + shape.mlp_weights)
    )


def backward(shape: ModelShape, prompts: int, tokens: int, *, touched: int | None, lowest: int = 0) -> int:
    """A backward pass from the logits down to the lowest trained layer.

    `touched`: weights of the matrices that take gradients, each multiplied once more (attention only); None: every
    parameter of the model. In the lowest layer nothing is propagated through W_Q, W_K, W_V when what enters it takes no
    gradient.
    """
    rows = prompts * tokens
    layers = shape.layers - lowest
    through = (
        layers * linear(rows, shape.block_weights)
        + unembedding(shape, prompts)
        + 2 * layers * attention(shape, prompts, tokens, tokens)
    )
    if touched is None:
        return through + layers * linear(rows, shape.block_weights) + unembedding(shape, prompts)
    ends = shape.query_weights + shape.kv_weights + (shape.mlp_weights if shape.parallel else 0)
    return through - linear(rows, ends) + linear(rows, touched)


def upward(shape: ModelShape, layer: int, rows: int, slots: int, keys: int) -> int:
    """A replay from what enters `layer` to the last token's logits."""
    through = max(0, shape.layers - 1 - layer) * block(shape, rows, slots, keys)
    return through + (last_block(shape, rows, slots, keys) if layer < shape.layers else 0) + unembedding(shape, rows)


def joined(shape: ModelShape, layer: int, rows: int, slots: int) -> int:
    """The MLP of a layer whose attention output has changed (none where it stands beside attention); in the last layer
    at the last token alone."""
    return 0 if shape.parallel else linear(rows * (slots if layer < shape.layers - 1 else 1), shape.mlp_weights)


def clean_run(shape: ModelShape, prompts: int, tokens: int) -> int:
    """The forward that a replay starts from, and its check: the last token recomputed through every layer."""
    return forward(shape, prompts, tokens) + upward(shape, 0, prompts, 1, tokens)


def cka(rows: int, ours: int, theirs: int, *, gradient: bool = True) -> int:
    """Linear CKA of [rows ours] with [rows theirs], by features or Gram matrices, whichever is smaller, and its
    gradient for ours."""
    products = [_product(rows, ours, theirs), _product(rows, ours, ours), _product(rows, theirs, theirs)]
    return sum(products) + (products[0] + 2 * products[1] if gradient else 0)


def _product(rows: int, ours: int, theirs: int) -> int:
    return 2 * rows * ours * theirs if ours * theirs <= rows * rows else 2 * rows * rows * (ours + theirs)
