"""Small Llama-style models: freshly initialised, pruned by whole layers, and written as Hugging Face directories with
what made them."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbench import seeds, storage
from workbench.models import sources
from workbench.models.export import save_plain
from workbench.pretraining.config import SizeConfig

EAGER: dict[str, Any] = {"attn_implementation": "eager"}
"""Attention whose pattern can be read, which lessons on where a head looks need."""


def new_model(size: SizeConfig, vocabulary: int, *, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.d_head,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=size.init_std,
        **EAGER,
        bos_token_id=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    with seeds.seeded(seed):
        model = LlamaForCausalLM(config)
    if size.embedding_std is not None:
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(size.embedding_std / size.init_std)
    return model


def pruned(
    model: LlamaForCausalLM, layers: int, cost: Callable[[LlamaForCausalLM], float]
) -> tuple[LlamaForCausalLM, list[int]]:
    """The model with so many whole layers kept that cost least: every choice of layers to drop is tried; returns which
    were kept.

    The first layer stays: temporary probes have made it the one that gathers neighbouring words.
    """
    total = model.config.num_hidden_layers
    candidates = [(0, *rest) for rest in itertools.combinations(range(1, total), layers - 1)]
    with torch.no_grad():
        costs = {choice: cost(with_layers(model, choice)) for choice in candidates}
    cheapest = min(costs, key=lambda choice: (costs[choice], choice))
    return with_layers(model, cheapest), list(cheapest)


def with_layers(model: LlamaForCausalLM, layers: Sequence[int]) -> LlamaForCausalLM:
    """A copy of the model with those of its layers."""
    config = model.config.to_dict()
    config.pop("layer_types", None)
    with seeds.local(0):  # the initial values are drawn and thrown away
        smaller = LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": len(layers), **EAGER}))
    renamed = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    state = {}
    for name, value in model.state_dict().items():
        stem = ".".join(name.split(".")[:3]) + "."
        if not name.startswith("model.layers."):
            state[name] = value
        elif stem in renamed:
            state[name.replace(stem, renamed[stem], 1)] = value
    smaller.load_state_dict(state)
    return smaller


def finished(target: Path, train: Callable[[], None]) -> LlamaForCausalLM:
    """The model of a directory, trained first where there is none."""
    if not (storage.recovered(target) / "config.json").exists():
        storage.require_replaceable(target)
        train()
    return sources.plain_model(target, dtype=torch.float32, attention="sdpa")


def save_model(
    model: LlamaForCausalLM, tokenizer: Any, target: Path, origin: Mapping[str, Any], log: Sequence[Mapping[str, float]]
) -> None:
    """Write a Hugging Face directory with `training.json` (what made it) and `training_log.jsonl`."""

    def fill(temporary: Path) -> None:
        save_plain(model, tokenizer, temporary)
        storage.write_json(temporary / "training.json", {**origin, "steps": len(log)})
        storage.write_text(temporary / "training_log.jsonl", "".join(json.dumps(line) + "\n" for line in log))

    storage.replace_directory(target, fill)
