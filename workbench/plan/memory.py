"""Bytes that a stage takes at its peak, beyond the weights: estimates, in values a token, of what PyTorch's allocator
held on tiny models.

How many tensors of each width live at a time was fitted to measured peaks of a dozen shapes (eager attention,
TransformerLens 4); tests/plan/test_plan_measured.py holds the estimates to 0.8 to 1.8 times what is measured.
What grows largest in a real run is counted rather than fitted: captured activations, clean runs that patching keeps,
gradients and optimizer state.
"""

from workbench.patching.engine.chunks import MEMORY
from workbench.plan.shapes import ModelShape


def forward_bytes(shape: ModelShape, prompts: int, tokens: int, width: int, *, captured: int = 0) -> int:
    """A forward without gradients, and `captured` values a token that are kept of it."""
    heads = shape.heads * shape.d_head
    widest = max(3 * shape.d_mlp + 2 * shape.d_model, 6 * heads + 2 * shape.heads * tokens)
    return prompts * (tokens * ((shape.layers + 3) * shape.d_model + widest + captured) + shape.d_vocab) * width


def captured_z(shape: ModelShape) -> int:
    """Values a token of every head's output."""
    return shape.layers * shape.heads * shape.d_head


def means_bytes(shape: ModelShape, prompts: int, tokens: int, width: int) -> int:
    """Reference means: a forward with every head's output."""
    return forward_bytes(shape, prompts, tokens, width, captured=captured_z(shape))


def clean_run_bytes(shape: ModelShape, prompts: int, tokens: int, width: int) -> int:
    """What a replay keeps of a clean run: residual stream, attention and MLP outputs, z, q (twice), k, v of every
    layer; and its copy of W_Q, W_K, W_V."""
    each = 3 * shape.d_model + 3 * shape.heads * shape.d_head + 2 * shape.kv_heads * shape.d_head
    return shape.layers * width * (prompts * tokens * each + shape.query_weights + shape.kv_weights)


def corrupt_run_bytes(shape: ModelShape, prompts: int, tokens: int, width: int) -> int:
    """What path patching keeps of the corrupt run: the embedding, z and MLP outputs of every layer."""
    return prompts * tokens * width * (shape.d_model + captured_z(shape) + shape.layers * shape.d_model)


def patching_bytes(shape: ModelShape, prompts: int, tokens: int, width: int, *, batch: int) -> int:
    """Path patching: clean and corrupt runs of all prompts at once, one forward on top, and a chunk of variants."""
    clean_and_corrupt = clean_run_bytes(shape, prompts, tokens, width) + corrupt_run_bytes(
        shape, prompts, tokens, width
    )
    copies = (-(-prompts // batch) - 1) * shape.layers * width * (shape.query_weights + shape.kv_weights)
    return clean_and_corrupt + copies + max(forward_bytes(shape, min(batch, prompts), tokens, width), MEMORY)


def ablation_bytes(shape: ModelShape, prompts: int, tokens: int, width: int, *, batch: int) -> int:
    """Ablation of every head: the clean run of one batch, a forward or a chunk of variants on top, and the means."""
    some = min(batch, prompts)
    means = tokens * captured_z(shape) * width
    return clean_run_bytes(shape, some, tokens, width) + max(forward_bytes(shape, some, tokens, width), MEMORY) + means


def step_bytes(shape: ModelShape, prompts: int, tokens: int, width: int) -> int:
    """What a forward keeps for its backward pass, and the widest tensors of an MLP and the last tokens' logits on
    top."""
    heads = shape.heads * shape.d_head
    each = 3 * shape.d_model + 3 * shape.d_mlp + 3 * heads + 2 * shape.heads * tokens
    return prompts * (tokens * (shape.layers * each + 3 * shape.d_model + 3 * shape.d_mlp) + 3 * shape.d_vocab) * width
