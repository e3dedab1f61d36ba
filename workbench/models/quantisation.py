"""Weights in fewer bits, for a model that never trains: what `transformers` quantises on loading, or has stored so.

    int8   each row of a matrix in 8 bits with one scale (torchao; any device)
    nf4    blocks of 64 numbers in 4 bits with one scale (bitsandbytes; QLoRA, arXiv 2305.14314)

A module stores the few bits and multiplies with the weight W' = scale * bits, in the activations' own precision: the
model is an ordinary one whose weights are W' in place of W. So patching, ablation and gradients through it are exact
for W', and what reads a matrix (W_O of a head) reads W' through `full`. Embeddings, norms, the unembedding, and
matrices that TransformerLens takes apart (queries, keys and values in one, an MLP's gate and input in one) stay as they
are.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from workbench.errors import InputError, nearest
from workbench.models import projections

Quantisation = Literal["int8", "nf4"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
METHODS = frozenset(PACKAGES.values())
"""What a config.json may say of weights that are stored quantised."""
IN_FULL = ("lm_head", "embed_out", *projections.SIDE_BY_SIDE, *projections.INTERLEAVED, "gate_up_proj")
"""Modules that are never quantised, by the end of their names."""
PATTERNS = [rf"(?:.*\.)?{name}" for name in IN_FULL]
"""The same as `transformers` takes it, which matches a part's name or its weight's from the beginning."""
BLOCK = 64
"""Numbers that share a scale in `nf4`."""
TRAINS = "quantised weights do not train"
REMEDY = "leave the quantisation to the teacher, and load the student in float32 or bfloat16"


def quantisation_named(name: str) -> Quantisation:
    """The name itself. Errors: `InputError` with the nearest for an unknown one."""
    known = get_args(Quantisation)
    if name not in known:
        raise InputError(f"there is no quantisation {name!r}; {nearest(str(name), known)}")
    return name  # pyright: ignore[reportReturnType]


def settings_of(name: Quantisation, dtype: torch.dtype) -> Any:
    """The quantisation config of `transformers`; `dtype` is that of the activations."""
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=PATTERNS)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=PATTERNS,
    )


def stored_method(values: dict[str, Any]) -> str | None:
    """What a model's config says its weights are quantised by; None: they are not."""
    stated = values.get("quantization_config") or values.get("compression_config")
    if not stated:
        return None
    return str(stated.get("quant_method", "unknown")) if isinstance(stated, dict) else str(stated)


def package_of(values: dict[str, Any], where: str) -> str:
    """The package that reads a folder's quantised weights.

    Errors: `InputError` for another method than those of this file, and for 8 bits by bitsandbytes, which rounds the
    activations too, so that what heads write does not add up.
    """
    method, remedy = stored_method(values), "give the model that they were made from, or a GGUF file"
    if method not in METHODS or "quantization_config" not in values:
        raise InputError(
            f"{where} is of quantised weights (quantization_config: {method}), which can't be taken apart exactly; "
            f"{remedy}."
        )
    if values["quantization_config"].get("load_in_8bit"):
        raise InputError(
            f"{where} is of weights in 8 bits by bitsandbytes, which rounds the activations too, so that heads do not "
            f"add up; {remedy}, with quantisation int8."
        )
    return method


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in fewer bits by one of the packages."""
    return type(weight).__module__.partition(".")[0] in METHODS


def full(weight: Tensor) -> Tensor:
    """The matrix that a quantised weight multiplies with; any other weight itself."""
    if not is_quantised(weight):
        return weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        return functional.dequantize_4bit(weight.data, weight.quant_state)  # pyright: ignore[reportAttributeAccessIssue]
    return weight.detach().dequantize()


def stored_bytes(name: Quantisation, numbers: int, rows: int, width: int) -> int:
    """Bytes of quantised matrices of so many numbers and rows; `width` is that of the activations, in which `int8`
    keeps its scales."""
    return numbers + rows * width if name == "int8" else numbers // 2 + 4 * -(-numbers // BLOCK)
