"""A model's folder -> a `transformers` model and its tokenizer: exactly the weights that lie in it, or a refusal.

Only safetensors files inside the folder are read, and no code. What `transformers` warns of (a weight that is missing
and drawn at random, one that is left over) is refused here with the list; whatever it raises becomes one `InputError`
that names the file and the remedy.
"""

import contextlib
import importlib.util
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from workbench import storage
from workbench.errors import InputError
from workbench.models import quantisation
from workbench.models.devices import DeviceMap, require_placed
from workbench.models.quantisation import Quantisation

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
LOADERS = {"auto_map", "transformers_weights", "fusion_config", "kernel_config", "use_kernels", "name_or_path"}
"""Keys of a config that choose code or files to load. They never reach `transformers`; nor does any `*_implementation`,
which may name a kernel on the hub."""
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "n_embd", "n_inner", "head_dim")
SIZES += ("num_attention_heads", "num_key_value_heads", "n_head", "num_local_experts", "num_experts")
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|\.attention\.rotary_emb\.")
"""Left over from older versions of `transformers`: rotary frequencies and causal masks, which follow from the
config."""
WHOLE_NUMBERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}
RANKS = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors$")
"""What `transformers` would read before anything else."""
HALF_AND_WIDER = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes of safetensors that a model computes in."""
LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A `transformers` model in eager attention, its tokenizer, and the local directory of its config."""

    directory: Path
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    """Of the activations, and of every weight that is not quantised."""
    placed: bool = False
    """Whether the model is where it stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """In how many bits a model's weights are held, and on which devices."""

    quantisation: Quantisation | None = None
    """Of weights that a folder holds in full."""
    stored: bool = False
    """Whether a folder of quantised weights is taken, as it is."""
    device: str = "cpu"
    """Of quantised weights, which are made where they stay."""
    device_map: DeviceMap | None = None
    """As `accelerate` takes it; None: full weights in the CPU's memory."""


IN_MEMORY = Placing()


def plain_model(directory: Path, *, dtype: torch.dtype, attention: str = "eager", placing: Placing = IN_MEMORY) -> Any:
    """The `transformers` model of a folder, in eval mode, with no weight but the folder's own.

    Errors: `InputError` for a config that is none, weights that are missing, left over, misshapen, pickled, quantised
    (unless `placing` takes them) or outside the folder, and whatever `transformers` raises.
    """
    values = read_config(directory, quantised=placing.stored)
    stored = quantisation.stored_method(values) is not None
    if stored and placing.quantisation is not None:
        raise InputError(
            f"{directory} holds quantised weights already; leave the quantisation out, or give the model that they "
            "were made from."
        )
    weights = weight_files(directory, quantised=stored)
    _require_plausible(directory, values, weights)
    config = config_of(directory, quantised=placing.stored)
    _require_generation(directory)
    more: dict[str, Any] = {}
    if package := quantisation.PACKAGES.get(placing.quantisation or ""):
        require_package(package, "quantised")
    if stored:
        _require_quantised(directory, values, weights)
    if placing.device_map is not None:
        more["device_map"] = placing.device_map
    elif stored or placing.quantisation is not None:
        more["device_map"] = {"": placing.device}
    remedy = "compare config.json with the weights, or save the model anew with save_pretrained"
    loading = refusing(f"{directory} could not be loaded by transformers", remedy)
    with quiet(), loading, torch.random.fork_rng(devices=[]):  # it draws what is missing, which is then refused
        if placing.quantisation is not None:
            more["quantization_config"] = quantisation.settings_of(placing.quantisation, dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **more,
        )
        model, report = loaded
    require_placed(getattr(model, "hf_device_map", None) or {})
    require_complete(directory, model, report)
    _require_tied(directory, model, weights)
    return model.eval()


def _require_quantised(directory: Path, values: dict[str, Any], weights: dict[Path, list[str]]) -> None:
    """Refuse weights that are not quantised as the config says: they would be rounded in silence."""
    file, held = directory / "config.json", set[str]()
    for place in weights:
        with safe_open(place, framework="pt") as opened:
            held |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  no mapping
    if not held & WHOLE_NUMBERS:
        raise InputError(
            f"{file} says that the weights are quantised (quantization_config), and they are not; delete that entry, "
            "and ask for a quantisation on loading."
        )
    try:
        require_package(quantisation.package_of(values, str(file)), "quantised")
    except InputError as error:
        raise InputError(f"{file} is of quantised weights: {error}") from None


# --- the config ---


def read_config(directory: Path, *, quantised: bool = False) -> dict[str, Any]:
    """`config.json` without what would choose code or files to load. Errors: `InputError` when it is no model's, or
    (unless `quantised`) a quantised one's."""
    file = directory / "config.json"
    if not file.exists() and not file.is_symlink():
        raise InputError(
            f"{directory} has no config.json; give a Hugging Face model directory, an adapter directory or a .gguf "
            "file."
        )
    values = read_mapping(file, "copy the model's own config.json there")
    kind = values.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InputError(f"{file} says no model_type; copy the model's own config.json there.")
    for part in _mappings(values):
        if quantisation.stored_method(part) is None:
            continue
        package = quantisation.package_of(part, str(file))
        if part is not values:
            raise InputError(f"{file} quantises a part of the model ({package}); give the model that it was made from.")
        if not quantised:
            raise InputError(
                f"{file} is of quantised weights (quantization_config: {package}), and {quantisation.TRAINS}; load it "
                "as a teacher, or give the model that they were made from."
            )
    return _without_loaders(values)


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """A mapping and every mapping in it."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _mappings(inner)


def _without_loaders(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _without_loaders(inner)
        for key, inner in value.items()
        if key not in LOADERS and not key.endswith(("_implementation", "_implementation_internal"))
    }


def config_of(directory: Path, *, quantised: bool = False) -> Any:
    """A folder's config as `transformers` reads it, from a copy that holds nothing else. Errors: `InputError`."""
    values = read_config(directory, quantised=quantised)
    what, remedy = f"{directory / 'config.json'} could not be loaded by transformers", "mend the value that it names"
    with tempfile.TemporaryDirectory() as place, quiet(), refusing(what, remedy):
        storage.write_text(Path(place) / "config.json", json.dumps(values))
        config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        config.name_or_path = str(directory)
    inner = config.get_text_config()
    pad, rows = getattr(inner, "pad_token_id", None), getattr(inner, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise InputError(
            f"{directory / 'config.json'} says pad_token_id {pad}, beyond the embedding's {rows} rows; set it to a "
            "token "
            "that the model has, such as its eos_token_id."
        )
    return config


def _require_plausible(directory: Path, values: dict[str, Any], weights: dict[Path, list[str]]) -> None:
    """Refuse sizes that the weights can't have before anything so large is built."""
    tensors = sum(map(len, weights.values()))
    numbers = sum(file.stat().st_size for file in weights)  # at least a byte each
    for part in _mappings(values):
        for keys, most, what in ((LAYERS, tensors, "tensors"), (SIZES, numbers, "numbers")):
            for key in keys:
                value = part.get(key)
                if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value <= most:
                    raise InputError(
                        f"{directory / 'config.json'} says {key} = {value}, but the weights have {most} {what}; copy "
                        "the "
                        "model's own config.json there."
                    )


def _require_generation(directory: Path) -> None:
    file = directory / "generation_config.json"
    if file.exists() or file.is_symlink():
        read_mapping(file, "delete it, or copy the model's own there")


def read_mapping(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON mapping. Errors: `InputError` with the file, the place in it and the remedy."""
    require_file(file, remedy)
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error}); {remedy}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__} where a mapping is needed; {remedy}.")
    return value


def require_file(file: Path, remedy: str) -> None:
    """Refuse what is no readable file with content of its own. Errors: `InputError`."""
    if file.is_dir():
        raise InputError(f"{file} is a directory, not a file; {remedy}.")
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(LFS))
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}); {remedy}.") from None
    if not begin:
        raise InputError(f"{file} is empty; {remedy}.")
    if begin == LFS:
        raise InputError(f"{file} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`.")


# --- the weights ---


def weight_files(directory: Path, *, quantised: bool = False) -> dict[Path, list[str]]:
    """The safetensors files of a folder and the tensors that each holds.

    Errors: `InputError` when there are none (pickled weights are never loaded), one of them lies outside the folder or
    is damaged, or the index does not say what they hold.
    """
    single, index = directory / SINGLE, directory / INDEX
    ranks = sorted(path.name for path in directory.iterdir() if RANKS.match(path.name))
    if ranks:
        raise InputError(
            f"{directory / ranks[0]} is a part of one process of a distributed training; gather the parts and save the "
            "model with save_pretrained."
        )
    if _present(index) and not _present(single):
        return _sharded(directory, index, quantised=quantised)
    if not _present(single):
        raise InputError(
            f"{directory} has no .safetensors weights ({SINGLE}, or {INDEX} with its shards). Pickled weights are "
            "never "
            "loaded, because loading them can run code: where they come from, save them with "
            "save_pretrained(..., safe_serialization=True)."
        )
    others = sorted(set(_weight_map(index).values()) - {SINGLE}) if _present(index) else []
    if any((directory / name).exists() for name in others):
        raise InputError(
            f"{directory} holds {SINGLE} and the shards of {INDEX}: two sets of weights; delete the one that is not "
            "meant."
        )
    return {single: tensors_in(directory, SINGLE, quantised=quantised)}


def tensors_in(directory: Path, name: str, *, quantised: bool = False) -> list[str]:
    """Names of the tensors in a folder's safetensors file. Errors: `InputError` when it is none, damaged, outside, or
    (unless `quantised`) of whole numbers."""
    file, remedy = directory / name, "copy or download it again"
    if Path(name).is_absolute() or ".." in Path(name).parts or not _inside(directory, file):
        raise InputError(f"{file} lies outside {directory}; put the weights themselves into the folder.")
    require_file(file, remedy)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            whole = [name for name in names if opened.get_slice(name).get_dtype() in WHOLE_NUMBERS]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is no whole safetensors file ({error}); {remedy}.") from None
    weights = [name for name in whole if name.endswith(".weight")]
    if weights and not quantised:
        raise InputError(
            f"{file} holds whole numbers for {_some(weights)}: quantised weights; give the model that they were made "
            "from, or a GGUF file."
        )
    return names


def _present(file: Path) -> bool:
    return file.exists() or file.is_symlink()


def _inside(directory: Path, file: Path) -> bool:
    """Whether a file lies in the folder, or (through the links of a snapshot) in the hub cache that the folder is
    of."""
    home, real = directory.resolve(), file.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parents[1])
        if home.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
            roots.append(Path(constants.HF_HUB_CACHE).resolve())
    return any(real.is_relative_to(root) for root in roots)


def _weight_map(index: Path) -> dict[str, str]:
    remedy = "copy the model's own index there, or save the model anew with save_pretrained"
    names = read_mapping(index, remedy).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; {remedy}.")
    foreign = sorted({name for name in names.values() if not name.endswith(".safetensors")})
    if foreign:
        raise InputError(
            f"{index} names {foreign[0]}, which is no .safetensors file. Pickled weights are never loaded, because "
            "loading them can run code: save the model anew with save_pretrained(..., safe_serialization=True)."
        )
    return names


def _sharded(directory: Path, index: Path, *, quantised: bool) -> dict[Path, list[str]]:
    names = _weight_map(index)
    held = {directory / name: tensors_in(directory, name, quantised=quantised) for name in sorted(set(names.values()))}
    listed = {(directory / name, tensor) for tensor, name in names.items()}
    there = {(file, tensor) for file, tensors in held.items() for tensor in tensors}
    if listed != there:
        wrong = sorted({tensor for _, tensor in listed ^ there})
        raise InputError(
            f"{index} does not say what its files hold: {_some(wrong)}; save the model anew with save_pretrained."
        )
    return held


def stored_dtype(directory: Path, values: dict[str, Any]) -> torch.dtype:
    """The dtype that a folder's weights were saved in: what its config says, else what its first wide tensor is of.

    Errors: `InputError` where neither is a dtype that a model computes in.
    """
    inner = values.get("text_config")
    parts = [values, *([inner] if isinstance(inner, dict) else [])]
    stated = next((str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
    if stated is None:
        for file in weight_files(directory, quantised=True):
            with safe_open(file, framework="pt") as opened:
                kinds = [opened.get_slice(name).get_dtype() for name in opened.keys()]  # noqa: SIM118  no mapping
            stated = next((HALF_AND_WIDER[kind] for kind in kinds if kind in HALF_AND_WIDER), None)
            if stated is not None:
                break
    if stated is None or stated.removeprefix("torch.") not in HALF_AND_WIDER.values():
        raise InputError(f"{directory} does not say a dtype to compute in ({stated}); give one, such as bfloat16.")
    return getattr(torch, stated.removeprefix("torch."))


def require_complete(source: Path, model: Any, report: dict[str, Any]) -> None:
    """Refuse a model some of whose weights were drawn at random, or that left some of the file's out.

    `report` is the `output_loading_info` of `transformers`. Errors: `InputError` with the names.
    """
    tied = {"lm_head.weight", "embed_out.weight"} if _is_tied(model) else set()
    missing = [name for name in report["missing_keys"] if name not in tied]
    unexpected = [name for name in report["unexpected_keys"] if not HARMLESS.search(name)]
    mismatched = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"]]
    faults = [
        f"{what} {_some(sorted(names))}"
        for what, names in (
            ("missing:", missing),
            ("left over:", unexpected),
            ("of another shape:", mismatched),
            ("not read:", list(map(str, report.get("error_msgs", ())))),
        )
        if names
    ]
    if faults:
        raise InputError(
            f"the weights in {source} do not fit its config: {'; '.join(faults)}. Missing weights would be drawn at "
            "random; save the model anew with save_pretrained, or rename its weights to what `transformers` calls them."
        )


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _require_tied(source: Path, model: Any, weights: dict[Path, list[str]]) -> None:
    """Refuse an unembedding of its own in the file of a model whose config ties it to the embedding."""
    if not _is_tied(model) or model.get_output_embeddings() is None:
        return
    used = model.get_input_embeddings().weight  # `transformers` unties the two in silence where their values differ
    names = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    for file, tensors in weights.items():
        for name in {f"{name}.weight" for name in names} & set(tensors):
            with safe_open(file, framework="pt") as opened:
                held = opened.get_tensor(name)
            if held.shape != used.shape or not torch.equal(held.to(used.dtype), used.detach()):
                raise InputError(
                    f"the weights in {source} do not fit its config: {name} is not the embedding, and config.json says "
                    "tie_word_embeddings; set that to false there, or delete the tensor."
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- the tokenizer ---


def tokenizer_in(*directories: Path) -> Any:
    """The tokenizer of the first folder that has one. Errors: `InputError` when none has, or it is broken."""
    for place in directories:
        files = [place / name for name in TOKENIZER_FILES if _present(place / name)]
        if not files:
            continue
        remedy = "save the tokenizer there anew (tokenizer.save_pretrained)"
        for file in files:
            read_mapping(file, remedy) if file.suffix == ".json" else require_file(file, remedy)
        with quiet(), refusing(f"the tokenizer in {place} can't be loaded", remedy):
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            tokenizer(tokenizer.convert_ids_to_tokens(0) or "")  # some are broken only in use
        return tokenizer
    raise InputError(f"{directories[-1]} has no tokenizer; save one beside the model (tokenizer.save_pretrained).")


def require_fitting(directory: Path, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that pads with a token that the model has no embedding of. Errors: `InputError`."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is not None and pad >= rows:
        raise InputError(
            f"the tokenizer in {directory} pads with {tokenizer.pad_token!r} (token {pad}), beyond the model's {rows} "
            "embeddings; resize the embeddings and save the model anew, or set pad_token to a token that it has."
        )


# --- what others raise ---


def require_package(package: str, extra: str) -> None:
    """Refuse to go on without a package. Errors: `InputError` naming the extra that brings it."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f'this needs the package {package}: pip install "circuit-distillation-workbench[{extra}]".')


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever is raised inside (a panic of the tokenizers' own too) into one `InputError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is asked for and refused
            yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{what} ({type(error).__name__}: {said}); {remedy}.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the loading chatter of transformers; restored on exit."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
