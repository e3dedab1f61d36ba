"""A PEFT/LoRA adapter's folder merged into its base, or refused: every tensor of the file is used, every one that the
adapter needs is in the file, and the merged model computes what the adapter's own forward does."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from workbench import seeds
from workbench.errors import InputError
from workbench.models.folders import quiet, read_mapping, refusing, require_package, tensors_in

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_name(adapter: Path) -> str:
    """What an adapter's config names as its base. Errors: `InputError` for a folder that is no adapter to load."""
    require_package("peft", "adapters")
    if not (adapter / WEIGHTS).exists():
        raise InputError(
            f"{adapter} has no {WEIGHTS}. Pickled weights are never loaded, because loading them can run code: where "
            "they come from, save the adapter with save_pretrained(..., safe_serialization=True)."
        )
    tensors_in(adapter, WEIGHTS)
    config = read_mapping(adapter / CONFIG, "copy the adapter's own config there")
    if config.get("megatron_config"):
        raise InputError(
            f"{adapter / CONFIG} names a module to import (megatron_config), and no code of a source is ever run; set "
            "it "
            "to null."
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{adapter / CONFIG} does not name its base model; set base_model_name_or_path in it.")
    return base


def merged(model: Any, adapter: Path) -> Any:
    """The base with the adapter's changes in its own weights; a tied embedding that the adapter changes on one side is
    untied first.

    Errors: `InputError` for tensors that do not fit, an adapter that changes no weights, and one that merging changes.
    """
    held = _held(adapter)
    _untie(model, held)
    remedy = "save it anew with the peft that made it, or merge it there and give the merged model"
    with quiet(), refusing(f"the adapter {adapter} could not be loaded by peft", remedy):
        from peft import PeftModel

        with torch.random.fork_rng(devices=[]):  # it draws initial weights, which are then replaced
            adapted = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    if not hasattr(adapted, "merge_and_unload"):
        raise InputError(
            f"the adapter {adapter} changes no weights (it is of type {adapted.peft_type}); give one that can be "
            "merged, such as LoRA."
        )
    adapted.eval()
    _require_used(adapter, adapted, held)
    with quiet(), refusing(f"the adapter {adapter} could not be merged by peft", remedy):
        before = _logits(adapted)
        whole = adapted.merge_and_unload()
        after = _logits(whole)
    allowed = min(1e3 * torch.finfo(after.dtype).eps, 0.1) * max(1.0, float(before.abs().max()))
    difference = float((after - before).abs().max())
    if not difference <= allowed:
        raise InputError(
            f"the adapter {adapter} computes something else when it is merged into its base (largest difference "
            f"{difference:.2e}, allowed {allowed:.2e}); merge it where it was trained and give the merged model."
        )
    return whole


def _held(adapter: Path) -> dict[str, Tensor]:
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping


def _untie(model: Any, held: dict[str, Tensor]) -> None:
    """Give the unembedding its own copy where the adapter changes it or the embedding: merged into a tied matrix, the
    change of one would be the other's too."""
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    if unembedding is None or unembedding.weight is not embedding.weight:
        return
    names = [name for name, module in model.named_modules() if module is embedding or module is unembedding]
    if not any(f".{name}." in f".{key}" for key in held for name in names):
        return
    unembedding.weight = nn.Parameter(unembedding.weight.detach().clone())
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def _require_used(adapter: Path, adapted: Any, held: dict[str, Tensor]) -> None:
    """Every tensor of the file is in the adapted model with its value, and every one of the adapter's comes from the
    file."""
    from peft import get_peft_model_state_dict

    with quiet(), refusing(f"the adapter {adapter} could not be read back from peft", "save it anew with peft"):
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    state = adapted.state_dict()
    missing = sorted(set(own) - set(held))
    unused = sorted(name for name, value in held.items() if not _is(value, own.get(name, state.get(name))))
    if missing or unused:
        faults = [f"missing: {', '.join(missing[:4])}"] if missing else []
        faults += [f"not applied: {', '.join(unused[:4])}"] if unused else []
        raise InputError(
            f"the weights of the adapter {adapter} do not fit its base: {'; '.join(faults)} ({len(missing)} missing, "
            f"{len(unused)} not applied); mend base_model_name_or_path and target_modules in its config, or save it "
            "anew."
        )


def _is(value: Tensor, loaded: Tensor | None) -> bool:
    return loaded is not None and loaded.shape == value.shape and torch.equal(value.to(loaded.dtype), loaded.detach())


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Of two random prompts."""
    rows = model.get_input_embeddings().weight.shape[0]
    return model(torch.randint(0, rows, (2, 8), generator=seeds.generator(0, "merging"))).logits
