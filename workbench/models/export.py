"""A hooked transformer back to the plain `transformers` model that it wraps, so that a trained student is an ordinary
model directory.

TransformerBridge keeps the original parameters under other names and splits fused matrices (query-key-value into three,
an MLP's gate and input into two); here the names are restored and the parts are fused again (GPT-2: side by side;
GPT-NeoX: interleaved head by head; Phi-3: one below the other).
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from workbench import storage
from workbench.errors import InputError
from workbench.models.folders import quiet
from workbench.models.projections import output_name

WRAPPER = "._original_component"


def plain_model(hooked: Any) -> Any:
    """A new `transformers` model with the hooked model's current weights.

    Errors: `InputError` when the hooked transformer was not made from a `transformers` model or a parameter has no
    counterpart.
    """
    config, named = _config(hooked), _named(hooked)
    with torch.random.fork_rng(devices=[]):  # its random initial weights are all replaced
        plain = AutoModelForCausalLM.from_config(config, dtype=next(iter(named.values())).dtype)
    _restore(named, plain, config)
    known = plain.state_dict()
    plain.load_state_dict({name: value for name, value in named.items() if name in known}, strict=False)
    if (generation := getattr(hooked.original_model, "generation_config", None)) is not None:
        plain.generation_config = copy.deepcopy(generation)
    return plain.eval()


def require_savable(hooked: Any) -> None:
    """Refuse what `plain_model` would refuse, without making a model."""
    config = _config(hooked)
    named = {name: parameter.to("meta") for name, parameter in _named(hooked).items()}
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    _restore(named, plain, config)


def _config(hooked: Any) -> Any:
    original = getattr(hooked, "original_model", None)
    if original is None or not hasattr(original, "config"):
        raise InputError(
            "only a student loaded through TransformerBridge (TransformerLens 4) can be saved as a transformers "
            "directory."
        )
    return original.config


def _named(hooked: Any) -> dict[str, Tensor]:
    return {name.replace(WRAPPER, ""): parameter.detach() for name, parameter in hooked.named_parameters()}


def _restore(named: dict[str, Tensor], plain: Any, config: Any) -> None:
    """Give the weights the plain model's names and shapes."""
    _fuse(named, config)
    missing = sorted(set(plain.state_dict()) - set(named) - _tied(plain))
    if missing:
        raise InputError(
            f"this student can't be saved as a transformers model: no weights for {', '.join(missing[:3])}."
        )


def save_plain(plain: Any, tokenizer: Any, directory: Path) -> None:
    """Write a `transformers` model and its tokenizer; a generation config as it was, though `transformers` itself would
    not write some that it reads (a temperature where nothing is sampled)."""
    generation = plain.generation_config
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of generation settings that contradict each other, which are the user's own
        plain.generation_config = GenerationConfig()
        try:
            plain.save_pretrained(directory)
        finally:
            plain.generation_config = generation
        tokenizer.save_pretrained(directory)
    if generation is not None:
        storage.write_text(directory / "generation_config.json", generation.to_json_string(use_diff=True))


def _tied(plain: Any) -> set[str]:
    """Names whose tensor also has another name that parameters are listed under."""
    listed = {name for name, _ in plain.named_parameters()}
    return set(plain.state_dict()) - listed


KINDS = ("weight", "bias")


def _fuse(named: dict[str, Tensor], config: Any) -> None:
    """Replace the split parameters by the fused ones that the architecture stores."""
    for stem in sorted({name.rsplit(".qkv.", 1)[0] for name in named if ".qkv." in name}):
        for kind in KINDS:
            if f"{stem}.o.{kind}" in named:
                output = output_name(stem.rsplit(".", 1)[-1], "o")
                named[f"{stem}.{output}.{kind}"] = named.pop(f"{stem}.o.{kind}")
            stale = named.pop(f"{stem}.qkv.{kind}", None)
            if stale is not None:
                parts = [named.pop(f"{stem}.{matrix}.{kind}") for matrix in "qkv"]
                fused, name = _fused(parts, stem, kind, config.num_attention_heads)
                named[name] = _fitting(fused, stale, stem)
    for name in sorted(name for name in named if ".gate_up_proj." in name):
        stem, kind = name.rsplit(".gate_up_proj.", 1)
        parts = [named.pop(f"{stem}.{matrix}.{kind}", None) for matrix in ("gate", "in")]
        if None not in parts:
            named[name] = _fitting(torch.cat([part for part in parts if part is not None]), named[name], stem)


def _fitting(fused: Tensor, stale: Tensor, stem: str) -> Tensor:
    if fused.shape != stale.shape:
        raise InputError(
            f"the fused matrix of {stem} has shape {tuple(stale.shape)}, not {tuple(fused.shape)}; this architecture "
            "can't be saved."
        )
    return fused


def _fused(parts: list[Tensor], stem: str, kind: str, heads: int) -> tuple[Float[Tensor, "..."], str]:
    if stem.endswith(".attn"):  # GPT-2: Conv1D [in, q|k|v]
        return torch.cat([part.T if kind == "weight" else part for part in parts], -1), f"{stem}.c_attn.{kind}"
    if stem.endswith(".attention"):  # GPT-NeoX: Linear [(head q|k|v d_head), in]
        stacked = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1)
        return stacked.flatten(0, 2), f"{stem}.query_key_value.{kind}"
    if stem.endswith(".self_attn"):  # Phi-3: Linear [q|k|v, in], of fewer rows for grouped keys and values
        return torch.cat(parts), f"{stem}.qkv_proj.{kind}"
    raise InputError(f"don't know how {stem} stores its fused matrix; this architecture can't be saved.")
