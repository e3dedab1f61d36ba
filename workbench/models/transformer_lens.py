"""The only file that knows TransformerLens: what the workbench uses of a hooked transformer, and how one is made of a
`transformers` model.

Two hooked transformers come through here: `TransformerBridge` (TransformerLens 4) and `HookedTransformer` (3.9), with
raw, unfolded weights.
"""

import contextlib
import copy
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from workbench import storage
from workbench.errors import InputError
from workbench.models import folders, hooks


@runtime_checkable
class HookedTransformerLike(hooks.Hooked, Protocol):
    """What TransformerBridge (4.x) and HookedTransformer (3.9) both offer, and all that the workbench uses of them."""

    cfg: Any
    blocks: Any
    unembed: Any
    tokenizer: Any
    training: bool

    def __call__(self, input: Tensor, *, attention_mask: Tensor | None = ...) -> Tensor: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = ...) -> Any: ...

    def eval(self) -> Any: ...


def refuse_unfit(model: HookedTransformerLike) -> None:
    """Refuse processed weights (a bridge marks them privately, a HookedTransformer in its config) and ungrouped keys
    and values."""
    if str(getattr(model.cfg, "normalization_type", "")).endswith("Pre") or getattr(model, "_weights_processed", False):
        raise InputError(
            "this hooked transformer has processed (folded, centered) weights; load it raw: "
            "TransformerBridge.boot_transformers(...) with "
            "enable_compatibility_mode(no_processing=True), or HookedTransformer.from_pretrained_no_processing(...)."
        )
    if getattr(model.cfg, "ungroup_grouped_query_attention", False):
        raise InputError(
            "this hooked transformer repeats its grouped keys and values for every query head; "
            "call set_ungroup_grouped_query_attention(False) before wrapping it."
        )


def refuse_architecture(config: Any, name: str) -> None:
    """Refuse by its config alone, before any weight is read, what can't be supported exactly.

    Errors: `InputError` for an architecture that TransformerLens does not know, and one without attention heads in its
    blocks.
    """
    remedy = "choose a model of a family that `workbench check-model` passes, such as Llama, Qwen, Mistral or GPT-2"
    if importlib.util.find_spec("transformer_lens.HookedTransformer") is not None:
        return  # 3.9 knows three architectures, and says so when it converts them
    try:
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    except ImportError:  # a later version keeps them elsewhere: the self-check refuses the same, after loading
        return
    kind = _architecture(config)
    try:
        known = build_bridge_config_from_hf(copy.deepcopy(config), kind, name, torch.float32)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(known)
        blocks = (adapter.component_mapping or {})["blocks"].submodules
    except Exception as error:
        raise InputError(
            f"{name} is a {kind}, which the installed TransformerLens does not take ({type(error).__name__}: {error}); "
            f"{remedy}."
        ) from None
    if "attn" not in blocks:
        raise InputError(
            f"{name} is a {kind}, which is not supported: its blocks have no attention with heads; {remedy}."
        )


def _architecture(config: Any) -> str:
    from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config

    try:
        return str(determine_architecture_from_hf_config(config))
    except Exception:  # whatever it says: the model's type says as much
        return str(getattr(config, "model_type", "model of no known type"))


def hooked_model(opened: folders.Source, device: str) -> HookedTransformerLike:
    """The hooked transformer of the installed TransformerLens around a loaded `transformers` model.

    Errors: `InputError` for a config that TransformerLens does not read, or does not fit the weights.
    """
    what = f"{opened.directory} could not be hooked by TransformerLens"
    with folders.refusing(what, "compare its config.json with that of the model that it was made from"):
        return _hooked_model(opened, opened.dtype, device)


def _hooked_model(opened: folders.Source, dtype: torch.dtype, device: str) -> HookedTransformerLike:
    # 3.9 prints where it puts the model; both draw random initial weights that are then replaced
    with (
        folders.quiet(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        if importlib.util.find_spec("transformer_lens.HookedTransformer") is not None:
            return _hooked_transformer(opened, dtype, device)
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            str(opened.directory),
            # the bridge records the device of a given model (or of its parts, by its device map), but does not move it
            hf_model=opened.model if opened.placed else opened.model.to(device),
            tokenizer=copy.deepcopy(opened.tokenizer),
            device=device,
            dtype=dtype,
        )
        bridge.enable_compatibility_mode(no_processing=True)
        return cast(HookedTransformerLike, bridge)


def _hooked_transformer(opened: folders.Source, dtype: torch.dtype, device: str) -> HookedTransformerLike:
    """TransformerLens 3.9's HookedTransformer, which knows hub names only: its config is read from a neutrally named
    copy of ours."""
    lens, loading = import_module("transformer_lens"), import_module("transformer_lens.loading_from_pretrained")
    conversions = import_module("transformer_lens.pretrained.weight_conversions")
    converters = {
        "LlamaForCausalLM": "convert_llama_weights",
        "GPT2LMHeadModel": "convert_gpt2_weights",
        "GPTNeoXForCausalLM": "convert_neox_weights",
    }
    architecture = type(opened.model).__name__
    if opened.placed:
        raise InputError(
            "quantised weights and device maps need TransformerLens 4 (TransformerBridge); load the model in full, on "
            "one device."
        )
    if architecture not in converters:
        raise InputError(
            f"{architecture} directories load on TransformerLens 4 (TransformerBridge); on 3.9 pass a "
            "HookedTransformer to `HookedModel(...)`."
        )
    with tempfile.TemporaryDirectory() as folder:
        config = opened.model.config.to_dict()
        storage.write_json(
            Path(folder) / "model" / "config.json",
            {**config, "n_ctx": config.get("n_positions", config.get("max_position_embeddings"))},
        )
        cfg = loading.get_pretrained_model_config(str(Path(folder) / "model"), device=device, dtype=dtype)
    state = getattr(conversions, converters[architecture])(opened.model.to(device), cfg)
    hooked = lens.HookedTransformer(cfg, copy.deepcopy(opened.tokenizer), move_to_device=False)
    try:
        hooked.load_and_process_state_dict(
            state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    except RuntimeError as error:
        raise InputError(
            f"TransformerLens 3.9 does not read this {architecture} config ({str(error).splitlines()[-1].strip()}); "
            "use TransformerLens 4."
        ) from None
    _fix_added_biases(hooked, opened.model)
    return hooked.to(device)


def _fix_added_biases(hooked: nn.Module, plain: nn.Module) -> None:
    """Make constants of the zero biases that HookedTransformer adds to a model without them, so that no head owns them
    and nothing trains them."""
    biased = any(name.endswith(".bias") for name, _ in plain.named_parameters())
    for module in hooked.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name == "b_U" or (name.lstrip("_").startswith("b_") and not biased):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
