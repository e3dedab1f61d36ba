"""Miniatures: three layers of a family's own config class, with random weights and the word-level tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from workbench.models.sources import quiet
from workbench.pretraining import word_tokenizer

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WIDE_HEADS: dict[str, Any] = {"head_dim": 16}
SUPPORTED: dict[str, dict[str, Any]] = {
    "Llama": {"rope_scaling": LLAMA_3, "rope_theta": 5e5},
    "Mistral": {},
    "Qwen2": {},  # biases on q, k and v
    "Qwen3": WIDE_HEADS,  # a norm on every query and key
    "Gemma": WIDE_HEADS,
    "Phi": {"num_key_value_heads": 4},  # parallel blocks, rotary on a part of the head
    "Phi3": {},  # q, k and v in one matrix
    "Olmo": {},  # norms without weights
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "GPTNeoX": {"num_key_value_heads": 4},  # parallel blocks
}


def miniature(family: str, settings: dict[str, Any], folder: Path, **overrides: Any) -> Path:
    """A saved directory; grouped-query attention where the family has any. `overrides` go over everything."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": None,
    }
    chosen = {**({} if family == "GPT2" else sizes), **settings}
    tokenizer = word_tokenizer()
    special: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**{**chosen, **special, **overrides})
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
