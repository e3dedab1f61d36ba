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


MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OWN_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
NAMED_LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WINDOW: dict[str, Any] = {"sliding_window": 4}
MULTIPLIERS: dict[str, Any] = {
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **SUPPORTED,
    "Gemma2": {**WIDE_HEADS, "sliding_window": 256},  # norms after attention and MLP, soft caps
    "Gemma3Text": {  # rotary angles of two kinds
        **WIDE_HEADS,
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "Olmo2": {},  # norms after attention and MLP alone, queries of all heads normed together
    "Olmo3": WINDOW,
    "Exaone4": WINDOW,
    "Glm4": WIDE_HEADS,
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**MIXTURE, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**WIDE_HEADS, **MIXTURE},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, **MULTIPLIERS},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "GptOss": {**WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},  # attention sinks
    "Llama4Text": {"num_local_experts": 4},
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},  # ALiBi
    "Mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2},  # ALiBi
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "XGLM": {"d_model": 32, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4},
    "Falcon": {**NAMED_LAYERS, "multi_query": True},
    "GPTJ": {**OWN_SIZES, "rotary_dim": 4},  # rotary by pairs of neighbours
    "CodeGen": {**OWN_SIZES, "rotary_dim": 4},
    "GPTNeo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 4,
        "max_position_embeddings": 256,
    },
    "GPTBigCode": OWN_SIZES,  # one key-value head
    "Cohere": {"logit_scale": 0.25},  # each block parallel, rotary by pairs of neighbours
    "Cohere2": WINDOW,
    "StableLm": {},
    "Starcoder2": {},
    "Granite": MULTIPLIERS,  # a share of each output is added
    "Glm": WIDE_HEADS,
    "Nemotron": {},
    "SmolLM3": {},
    "SeedOss": WIDE_HEADS,
    "Ernie4_5": {},
    "Arcee": {},
    "HunYuanDenseV1": WIDE_HEADS,
    "BitNet": {},  # a norm in front of the output projection
    "Ministral3": WIDE_HEADS,
    "Jais2": {},
}
"""Every family whose miniature is tried, with its settings. A window of 4 is shorter than the prompts."""
STRUCTURES = ("n_embd", "d_model", "hidden_size")
"""Settings of a family that names its sizes its own way."""


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
    chosen = settings if any(name in settings for name in STRUCTURES) else {**sizes, **settings}
    tokenizer = word_tokenizer()
    special: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        **({"init_std": 0.2} if family in ("OPT", "XGLM") else {}),
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
