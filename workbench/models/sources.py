"""Where a model comes from: a hub id, a Hugging Face directory, a PEFT/LoRA adapter folder or a GGUF file -> a
`transformers` model.

No remote code is ever executed, weights are safetensors (or the GGUF file), and a name that can't be had says so at
once.
"""

import contextlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from workbench import storage
from workbench.errors import InputError

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "tokenizer.model"]
"""What is downloaded of a hub repository: no code, no pickled weights."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A `transformers` model in eager attention, its tokenizer, and the local directory of its config."""

    directory: Path
    model: Any
    tokenizer: Any


def open_source(name: str | Path, *, dtype: torch.dtype) -> Source:
    """Load from a hub id, a model directory, an adapter directory or a `.gguf` file.

    Errors: `InputError` when the name is neither a path nor cached and the hub can't be reached, or the directory is
    incomplete.
    """
    directory = local_directory(name)
    adapter = directory if (directory / "adapter_config.json").exists() else None
    if adapter is not None:
        directory = _base_directory(adapter)
    if not (directory / "config.json").exists():
        raise InputError(
            f"{directory} has no config.json; give a Hugging Face model directory, an adapter directory or a .gguf "
            "file."
        )
    _require_safetensors(directory)
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{directory} could not be loaded by transformers: {error}") from error
        if adapter is not None:
            model = _merged(model, adapter)
        tokenizer = _tokenizer(adapter, directory)
    return Source(directory=directory, model=model.eval(), tokenizer=tokenizer)


def local_directory(name: str | Path) -> Path:
    """The local directory behind a name: a bundled model's, itself, a converted GGUF file, or a hub snapshot
    (downloaded when online)."""
    path = Path(storage.located(name)).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path} is not a file; give the path of a GGUF file.")
        return converted_gguf(path)
    if path.is_dir():
        return path
    if path.is_file() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise InputError(
            f"{name} is not a directory or a .gguf file; give a local model directory, a .gguf file or a hub id "
            "(owner/name)."
        )
    return _hub_snapshot(str(name))


def _hub_snapshot(name: str) -> Path:
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
            if any(cached.glob("*.safetensors")):  # other programs leave a config alone in the cache
                return cached
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a local path nor a hub id ({error}); give a directory, a .gguf file or owner/name."
        ) from None
    remedy = "give a local directory or a .gguf file, or go online once to fetch it"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name!r} is neither a local path nor in the hub cache, and HF_HUB_OFFLINE is set; {remedy}.")
    try:
        HfApi().model_info(name, timeout=5)
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except HfHubHTTPError as error:
        raise InputError(f"the hub does not give {name!r} ({error}); check the name and your access to it.") from None
    except (
        Exception
    ) as error:  # whatever the HTTP client raises without a network: not reachable is all that matters here
        raise InputError(
            f"{name!r} is neither a local path nor in the hub cache, and the hub can't be reached "
            f"({type(error).__name__}); {remedy}."
        ) from None


def _base_directory(adapter: Path) -> Path:
    require_package("peft", "adapters")
    _require_safetensors(adapter)
    base = storage.read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"{adapter / 'adapter_config.json'} does not name its base model; set base_model_name_or_path in it."
        )
    try:
        return local_directory(base)
    except InputError as error:
        raise InputError(
            f"the base model of the adapter {adapter} can't be had; mend base_model_name_or_path in its config: {error}"
        ) from None


def _require_safetensors(directory: Path) -> None:
    if not any(directory.glob("*.safetensors")):
        raise InputError(
            f"{directory} has no .safetensors weights. Pickled weights are never loaded, because loading them can run "
            "code: "
            "where they come from, save them with save_pretrained(..., safe_serialization=True)."
        )


def require_package(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f'this needs the package {package}: pip install "circuit-distillation-workbench[{extra}]".')


def _merged(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
    ):  # it draws initial weights, which are then replaced
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing`", FutureWarning
        )  # peft still asks transformers under the old name
        adapted = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    if not hasattr(adapted, "merge_and_unload"):
        raise InputError(
            f"the adapter {adapter} changes no weights (it is of type {adapted.peft_type}); give one that can be "
            "merged, such as LoRA."
        )
    return adapted.merge_and_unload()


def _tokenizer(adapter: Path | None, directory: Path) -> Any:
    for place in filter(None, (adapter, directory)):
        if any(
            (place / name).exists()
            for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        ):
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    raise InputError(f"{directory} has no tokenizer; save one beside the model (tokenizer.save_pretrained).")


def cache_root() -> Path:
    """Where converted models and teacher caches lie: `$WORKBENCH_CACHE`, else `workbench` in the user's cache
    folder."""
    base = os.environ.get("WORKBENCH_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "workbench"


def converted_gguf(path: Path) -> Path:
    """A GGUF file as a plain Hugging Face directory in float32, converted once and kept by the file's content."""
    target = cache_root() / "gguf" / storage.sha256(path)[:24]
    if not (target / "config.json").exists():
        replace_directory(target, lambda temporary: _convert_gguf(path, temporary))
    return target


def _convert_gguf(path: Path, target: Path) -> None:
    require_package("gguf", "gguf")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del (
            model.config.quantization_config
        )  # the weights are dequantized; with it `save_pretrained` and loading refuse
    model.config.architectures = [type(model).__name__]
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


def replace_directory(target: Path, fill: Any) -> None:
    """Fill a new directory beside `target` and rename it into place, so that a reader never sees half a directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
