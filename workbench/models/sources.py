"""Where a model comes from: a hub id, a Hugging Face directory, a PEFT/LoRA adapter folder or a GGUF file -> a
`transformers` model.

No remote code is ever executed, weights are safetensors (or the GGUF file), and a name that can't be had says so at
once.
"""

import contextlib
import copy
import functools
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from workbench import __version__, storage
from workbench.errors import InputError
from workbench.models import merging
from workbench.models.folders import (
    IN_MEMORY,
    Placing,
    Source,
    config_of,
    plain_model,
    quiet,
    read_config,
    refusing,
    require_complete,
    require_fitting,
    require_package,
    stored_dtype,
    tokenizer_in,
)
from workbench.models.transformer_lens import refuse_architecture

__all__ = ["Source", "cache_root", "local_directory", "open_source", "plain_model", "quiet", "require_package"]

CONFIG_FILES = ["*.json", "*.txt", "tokenizer.model"]
"""What is downloaded first of a hub repository: enough to refuse it."""
HUB_FILES = [*CONFIG_FILES, "*.safetensors"]
"""What is downloaded of a hub repository: no code, no pickled weights."""


def open_source(name: str | Path, *, dtype: torch.dtype | None, placing: Placing = IN_MEMORY) -> Source:
    """Load from a hub id, a model directory, an adapter directory or a `.gguf` file.

    `dtype`: None for that in which the weights were saved.

    Errors: `InputError` when the name is neither a path nor cached and the hub can't be reached, or the directory is
    incomplete, damaged, or of an architecture that can't be supported exactly.
    """
    directory = local_directory(name)
    adapter = directory if _is_adapter(directory) else None
    if adapter is not None:
        directory = _base_directory(adapter)
        if placing.quantisation is not None:
            raise InputError(
                f"{name} is an adapter, and merging it into quantised weights would change it; merge it first: "
                "Student.load(adapter).save(directory), and quantise that."
            )
        placing = replace(placing, stored=False)
    refuse_architecture(config_of(directory, quantised=placing.stored), str(name))
    if dtype is None:
        dtype = stored_dtype(directory, read_config(directory, quantised=placing.stored))
    model = plain_model(directory, dtype=dtype, placing=placing)
    if adapter is not None:
        model = merging.merged(model, adapter)
    tokenizer = tokenizer_in(*filter(None, (adapter, directory)))
    require_fitting(adapter or directory, tokenizer, model.get_input_embeddings().weight.shape[0])
    placed = placing.device_map is not None or bool(getattr(model, "is_quantized", False))
    return Source(directory=directory, model=model.eval(), tokenizer=tokenizer, dtype=dtype, placed=placed)


def _is_adapter(directory: Path) -> bool:
    return (directory / merging.CONFIG).exists() or (directory / merging.CONFIG).is_symlink()


def local_directory(name: str | Path) -> Path:
    """The local directory behind a name: a bundled model's, itself, a converted GGUF file, or a hub snapshot
    (downloaded when online)."""
    path = storage.recovered(Path(storage.located(name)).expanduser())
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
        known = Path(snapshot_download(name, allow_patterns=CONFIG_FILES))
        if (known / "config.json").exists():
            refuse_architecture(config_of(known, quantised=True), name)
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except InputError:
        raise
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
    base = merging.base_name(adapter)
    try:
        directory = local_directory(base)
    except InputError as error:
        raise InputError(
            f"the base model of the adapter {adapter} can't be had; mend base_model_name_or_path in its config: {error}"
        ) from None
    if _is_adapter(directory):
        raise InputError(
            f"the base model of the adapter {adapter} is itself an adapter ({directory}); merge that one first and "
            "name "
            "the merged model as base_model_name_or_path."
        )
    return directory


def cache_root() -> Path:
    """Where converted models and teacher caches lie: `$WORKBENCH_CACHE`, else `workbench` in the user's cache
    folder."""
    base = os.environ.get("WORKBENCH_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "workbench"


def converted_gguf(path: Path) -> Path:
    """A GGUF file as a plain Hugging Face directory in float32, converted once and kept by the file's content.

    Errors: `InputError` for a file that is none, lacks weights, or is of an architecture that would be refused
    afterwards.
    """
    _require_gguf(path)
    target = storage.recovered(cache_root() / "gguf" / storage.sha256(path)[:24])
    if not (target / "config.json").exists():
        storage.replace_directory(target, lambda temporary: _convert_gguf(path, temporary), keep_existing=True)
    return target


CHECKED = "self_check.json"
"""In a converted file's folder: the self-checks that it has passed."""


def has_passed(directory: Path, how: str) -> bool:
    """Whether a converted GGUF file, whose bytes are known by its folder's name, has passed the self-check so (dtype
    and device) in the versions that are installed."""
    file = directory / CHECKED
    return _is_conversion(directory) and file.exists() and _check(how) in storage.read_json(file).get("passed", [])


def note_passed(directory: Path, how: str) -> None:
    """For `has_passed`; of other folders, which may change, nothing is noted."""
    if _is_conversion(directory) and not has_passed(directory, how):
        file = directory / CHECKED
        passed = storage.read_json(file).get("passed", []) if file.exists() else []
        storage.write_json(file, {"passed": [*passed, _check(how)]})


def _is_conversion(directory: Path) -> bool:
    return directory.parent == cache_root() / "gguf"


def _check(how: str) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "transformer-lens")]
    return ", ".join((f"workbench {__version__}", *versions, how))


def _require_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); give the path of a GGUF file.") from None
    if begin != b"GGUF":
        raise InputError(f"{path} is no GGUF file (it does not begin with GGUF); download or copy it again.")


def _convert_gguf(path: Path, target: Path) -> None:
    require_package("gguf", "gguf")
    with _alone(path) as folder, quiet(), _read_once():
        where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        with refusing(
            f"{path} could not be read by transformers", "download or copy it again, or give the model itself"
        ):
            refuse_architecture(AutoConfig.from_pretrained(folder, **where), str(path))
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, **where, dtype=torch.float32, output_loading_info=True
            )
            model, report = loaded
        require_complete(path, model, report)
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


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Inside, what config, tokenizer and model each ask for anew is computed once: a GGUF file's header (a vocabulary
    of 49,000 tokens takes seconds every time), what transformers makes of it, and the table of tensor names, which is
    asked for by every module of the model."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    class Reader(gguf.GGUFReader):
        """Of plain arrays: views of a memory map are costly to make, and there is one of every token."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    whole: Any = reading.load_gguf_checkpoint
    header = functools.cache(lambda path: whole(path, return_tensors=False))

    def checkpoint(path: Any, return_tensors: bool = False, **rest: Any) -> Any:
        return whole(path, return_tensors=True, **rest) if return_tensors else copy.deepcopy(header(path))

    with (
        _standing_in(gguf, "GGUFReader", functools.cache(Reader)),
        _standing_in(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        _standing_in(reading, "load_gguf_checkpoint", checkpoint),
    ):
        yield


@contextlib.contextmanager
def _standing_in(module: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, a module's name means something else."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder with nothing but a file in it: no config or adapter beside it is taken for its own."""
    with tempfile.TemporaryDirectory() as place:
        try:
            (Path(place) / path.name).symlink_to(path.resolve())
        except OSError:
            shutil.copy(path, Path(place) / path.name)
        yield Path(place)
