"""The shape of a model from its config alone: how many parameters it has, how many of them belong to some heads. No
weights are read.

Parameters are counted on the model class built on PyTorch's meta device, which allocates nothing, so tied embeddings,
biases and norms are counted as they are; the weights that a token is multiplied with in one block are read off the same
class.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from workbench import storage
from workbench.errors import InputError
from workbench.models import sources
from workbench.models.quantisation import IN_FULL, Quantisation, stored_bytes, stored_method
from workbench.storage import located
from workbench.values.refs import Head

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
"""Configs of the bundled recipes' models: the sizes that their model cards state."""

SAVABLE = (".q_proj.weight", ".attention.query_key_value.weight", ".self_attn.qkv_proj.weight")
"""What the query matrices that `workbench.models.export` can write are called (Llama and its like, GPT-NeoX, Phi-3)."""


MLP_SIZES = ("intermediate_size", "n_inner", "ffn_dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "moe_k")
PARALLEL = ("codegen", "cohere", "cohere2", "gptj", "phi")
"""Kinds of models all of whose blocks are parallel, which their configs do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder with `layers` equal blocks."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    parameters: int
    """Of the whole model, each tied one once."""
    mlp_weights: int
    """In the matrices of one MLP that a token is multiplied with: of a mixture, those of its active experts, its shared
    expert and its router."""
    attention_bias: bool
    parallel: bool = False
    """The MLP of a block reads what enters the block (NeoX), not what attention leaves."""
    dtype: str = "float32"
    """In which the weights were saved, as the config says."""
    stored: Quantisation | None = None
    """How the weights were saved, where they are quantised."""
    quantisable: int = 0
    """Weights that a quantisation holds in fewer bits, in `quantisable_rows` rows."""
    quantisable_rows: int = 0
    savable: bool = True
    """Whether a trained student of this architecture can be written back: its queries, keys and values are matrices of
    their own, or fused as GPT-2, GPT-NeoX or Phi-3 do."""

    def weight_bytes(self, width: int, quantisation: Quantisation | None = None) -> int:
        """Bytes of all weights, `width` each but for those that are quantised."""
        kind = self.stored or quantisation
        if kind is None:
            return width * self.parameters
        return width * (self.parameters - self.quantisable) + stored_bytes(
            kind, self.quantisable, self.quantisable_rows, width
        )

    @property
    def query_weights(self) -> int:
        """In W_Q of one layer, and as many in W_O: heads d_head d_model."""
        return self.heads * self.d_head * self.d_model

    @property
    def kv_weights(self) -> int:
        """In W_K and W_V of one layer: 2 kv_heads d_head d_model."""
        return 2 * self.kv_heads * self.d_head * self.d_model

    @property
    def attention_weights(self) -> int:
        """In the four matrices of one layer."""
        return 2 * self.query_weights + self.kv_weights

    @property
    def block_weights(self) -> int:
        """What each token is multiplied with in one block."""
        return self.attention_weights + self.mlp_weights

    def slice_parameters(self, heads: Iterable[Head], *, train_kv: bool = True, lora_rank: int | None = None) -> int:
        """Trained scalars of these heads: d_head rows of W_Q (with bias) and columns of W_O each, and of W_K, W_V of
        each of their groups once.

        With `lora_rank` r, the factors of each matrix slice, r (d_head + d_model), and no bias.
        """
        own = set(heads)
        groups = {(head.layer, head.index // (self.heads // self.kv_heads)) for head in own} if train_kv else set()
        return self.counted_slices(len(own), len(groups), lora_rank=lora_rank)

    def most_slice_parameters(self, heads: int, *, train_kv: bool = True, lora_rank: int | None = None) -> int:
        """`slice_parameters` of so many heads when each stands in a group of its own, as far as there are groups."""
        return self.counted_slices(
            heads, min(heads, self.layers * self.kv_heads) if train_kv else 0, lora_rank=lora_rank
        )

    def counted_slices(self, heads: int, groups: int, *, lora_rank: int | None = None) -> int:
        """2 (heads + groups) slices of d_head d_model, of which all but W_O's have a bias where the model has them."""
        slices = 2 * (heads + groups)
        if lora_rank is not None:
            return slices * lora_rank * (self.d_head + self.d_model)
        return slices * self.d_head * self.d_model + (slices - heads) * self.d_head * self.attention_bias


def shape_of(source: str, *, configs: Mapping[str, str] | None = None) -> ModelShape:
    """The shape of a model: of a directory, an adapter's base, a GGUF file or a hub id.

    `configs`: name -> directory (or file) with a config.json to take in its place. Of a hub id only the config is
    fetched; those of the bundled recipes are known without the hub. Errors: `InputError` when no config can be had.
    """
    config = _config(source, configs or {})
    with torch.device("meta"), sources.quiet():
        model: Any = AutoModelForCausalLM.from_config(config)
    heads, width = config.num_attention_heads, config.hidden_size
    kv_heads = _kv_heads(config, heads)
    d_head = getattr(config, "head_dim", None) or width // heads
    attention = 2 * (heads + kv_heads) * d_head * width
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    embeddings = {id(parameter): parameter.numel() for parameter in _embeddings(model)}
    layers = config.num_hidden_layers
    idle = _idle_experts(model, config)
    matrix_shapes = [value.shape for value in _quantisable(model)]
    return ModelShape(
        name=source,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        d_head=d_head,
        d_model=width,
        d_mlp=next((size for name in MLP_SIZES if (size := getattr(config, name, None))), 4 * width),
        d_vocab=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        mlp_weights=(matrices - sum(embeddings.values()) - idle) // layers - attention,
        attention_bias=_has_attention_bias(model, heads * d_head),
        dtype=str(getattr(config.get_text_config(), "dtype", None) or "float32").removeprefix("torch."),
        stored={"torchao": "int8", "bitsandbytes": "nf4"}.get(stored_method(config.to_dict()) or ""),  # pyright: ignore[reportArgumentType]
        quantisable=sum(shape.numel() for shape in matrix_shapes),
        quantisable_rows=sum(shape[0] for shape in matrix_shapes),
        savable=any(_is_savable(name, value) for name, value in model.named_parameters()),
        parallel=config.model_type in PARALLEL
        or bool(getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False)),
    )


def _quantisable(model: nn.Module) -> Iterator[torch.Tensor]:
    """The matrices that `workbench.models.quantisation` holds in fewer bits."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(IN_FULL):
            yield module.weight


def _kv_heads(config: Any, heads: int) -> int:
    """Key-value heads: one with multi-query attention (GPT-BigCode, the first Falcons)."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads


def _idle_experts(model: nn.Module, config: Any) -> int:
    """Weights of a mixture's routed experts that a token is not multiplied with."""
    routed = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name and value.ndim > 1)
    if not routed:
        return 0
    there = next((count for name in EXPERTS if (count := getattr(config, name, None))), 1)
    active = next((count for name in ACTIVE if (count := getattr(config, name, None))), there)
    return routed - routed * active // there


def _embeddings(model: nn.Module) -> Iterable[torch.Tensor]:
    """Of tokens, of positions, and the unembedding."""
    yield from (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    unembedding: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    yield unembedding.weight


def _is_savable(name: str, weight: torch.Tensor) -> bool:
    """Whether a parameter is a query matrix that can be written; GPT-2's has its inputs first, which others of that
    name have not."""
    first, last = weight.shape[0], weight.shape[-1]
    return name.endswith(SAVABLE) or (name.endswith(".attn.c_attn.weight") and last == 3 * first)


def _has_attention_bias(model: nn.Module, width: int) -> bool:
    """Whether the projections into the heads have biases, under whatever name: q_proj, c_attn or query_key_value."""
    names = ("q_proj.bias", "c_attn.bias", "query_key_value.bias")
    return any(name.endswith(names) and len(parameter) >= width for name, parameter in model.named_parameters())


def _config(source: str, configs: Mapping[str, str]) -> Any:
    given = configs.get(source)
    if given is not None:
        return _read(Path(given))
    known = CONFIGS / f"{source.split('/')[-1].lower().removesuffix('-instruct')}.json"
    if known.exists() and not Path(source).exists():
        return _read(known)
    if Path(source).suffix == ".gguf":
        return _read(sources.local_directory(source))
    if Path(source).is_dir():
        base = _base_of(Path(source))
        return _read(Path(source)) if base is None else _config(located(base), configs)
    try:
        return AutoConfig.from_pretrained(
            source, local_files_only=bool(constants.HF_HUB_OFFLINE), trust_remote_code=False
        )
    except Exception as error:  # whatever the HTTP client raises: not reachable is all that matters here
        raise InputError(
            f"the config of {source!r} can't be had ({type(error).__name__}); give a directory with its config.json: "
            f"--config {source}=DIRECTORY."
        ) from None


def _base_of(directory: Path) -> str | None:
    """The model that an adapter changes (a merged adapter has its base's shape); None for a model's own directory."""
    adapter = directory / "adapter_config.json"
    if not adapter.exists():
        return None
    return str(storage.read_json(adapter).get("base_model_name_or_path"))


def _read(path: Path) -> Any:
    """Of a directory with config.json, or of a JSON file."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{file} does not exist; give a directory that holds a model's config.json.")
    value = storage.read_json(file)
    try:
        return AutoConfig.for_model(**value)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{file} is no config that transformers knows ({error}).") from None
