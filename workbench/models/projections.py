"""What `transformers` calls the matrices of an attention, by architecture: the one list of these names.

An attention is found by the end of its own name and by the projection that it holds under that name.
"""

from collections.abc import Mapping

OUTPUT: Mapping[str, tuple[str, ...]] = {
    "self_attn": ("o_proj", "dense", "out_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, Phi-3; Phi; OPT
    "attn": ("c_proj", "out_proj"),  # GPT-2; GPT-J, MPT
    "attention": ("dense", "out_proj"),  # GPT-NeoX; GPT-Neo
    "self_attention": ("dense",),  # Bloom, Falcon
}
"""End of an attention's name -> what its output projection may be called, the commonest first."""
SEPARATE = ("q_proj", "k_proj", "v_proj")
"""Queries, keys and values in a matrix each."""
SIDE_BY_SIDE = ("c_attn", "qkv_proj")
"""In one matrix, all queries first, then all keys, then all values: GPT-2 (a Conv1D), Phi-3."""
INTERLEAVED = ("query_key_value",)
"""In one matrix, head by head: GPT-NeoX."""


def output_name(attention: str, default: str) -> str:
    """What an architecture whose attention is called so calls its output projection, where it stores queries, keys and
    values in one matrix."""
    return OUTPUT.get(attention, (default,))[0]
