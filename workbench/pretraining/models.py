"""Small Llama-style models: freshly initialised, pruned by whole layers, and written as Hugging Face directories with
what made them."""

import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from workbench import seeds, storage
from workbench.errors import InputError
from workbench.models import sources
from workbench.models.export import save_plain
from workbench.pretraining.config import SizeConfig

EAGER: dict[str, Any] = {"attn_implementation": "eager"}
"""Attention whose pattern can be read, which lessons on where a head looks need."""


def new_model(size: SizeConfig, vocabulary: int, *, seed: int, attention: str = "eager") -> LlamaForCausalLM:
    """A freshly initialised model; the global random state is left as it was. With `attention="sdpa"` it trains in half
    the time, and no pattern can be read."""
    how: dict[str, Any] = {"attn_implementation": attention}
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
        **how,
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


def with_layers(model: Any, layers: Sequence[int]) -> Any:
    """A copy of the model, of any architecture, with those of its layers.

    Errors: `InputError` where the copy would not compute what the model does without the other layers: a layer of a
    kind that depends on its place.
    """
    prefix, total = _blocks(model), model.config.get_text_config().num_hidden_layers
    config = copy.deepcopy(model.config)
    inner = config.get_text_config()
    for name, value in list(vars(inner).items()):
        if isinstance(value, list | tuple) and len(value) == total:  # what each layer is of: layer_types
            setattr(inner, name, [value[layer] for layer in layers])
    inner.num_hidden_layers = len(layers)
    with seeds.local(0):  # the initial values are drawn and thrown away
        smaller = AutoModelForCausalLM.from_config(config, **EAGER, dtype=model.dtype)
    renamed = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(layers)}
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith(f"{prefix}."):
            state[name] = value
            continue
        stem = f"{prefix}.{name.removeprefix(f'{prefix}.').split('.')[0]}."
        if stem in renamed:
            state[name.replace(stem, renamed[stem], 1)] = value
    smaller.load_state_dict(state)
    _require_same(model, smaller, prefix, layers)
    return smaller


def _blocks(model: Any) -> str:
    """The name of the list of a model's layers. Errors: `InputError` where there is none."""
    total = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name
    raise InputError(f"a {type(model).__name__} has no list of {total} layers, so none can be left out.")


@torch.no_grad()
def _require_same(model: Any, smaller: Any, prefix: str, layers: Sequence[int]) -> None:
    tokens = torch.arange(8)[None] % model.get_input_embeddings().weight.shape[0]
    parent, _, name = prefix.rpartition(".")
    place, training = model.get_submodule(parent), (model.training, smaller.training)
    every = getattr(place, name)
    try:
        setattr(place, name, nn.ModuleList([every[layer] for layer in layers]))
        expected = model.eval()(tokens.to(model.device), use_cache=False).logits
    finally:
        setattr(place, name, every)
        model.train(training[0])
    logits = smaller.eval()(tokens.to(smaller.device), use_cache=False).logits
    smaller.train(training[1])
    if not float((logits.to(expected.device) - expected).abs().max()) <= 1e-3 * max(1.0, float(expected.abs().max())):
        raise InputError(
            f"the layers {list(layers)} of a {type(model).__name__} do not compute the same in a model of their own; "
            "leave `keep_layers` out, or give a model without the other layers."
        )


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
