"""Where models come from: local, fine-tuned, adapter, hub cache and GGUF sources, and what is refused, with which
remedy.

Nothing here uses a network; what an unreachable hub does is played by a hub client that raises.
"""

import json
import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFolder
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from workbench.errors import InputError
from workbench.models import folders, hooked_model, sources
from workbench.models.hooked_model import Student, Teacher
from workbench.pretraining import word_tokenizer

contract = pytest.mark.contract
CLOSE = 2e-5
Patch = pytest.MonkeyPatch


def tokens(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(3, len(word_tokenizer()), (batch, length), generator=torch.Generator().manual_seed(0))


def final(model: Teacher | Student) -> Tensor:
    return model.final_logits(tokens(), torch.ones_like(tokens(), dtype=torch.bool)).detach()


@torch.no_grad()
def plain_final(model: Any) -> Tensor:
    return model.eval()(tokens()).logits[:, -1]


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- directories ---


@contract
def test_a_local_directory_and_a_fine_tuned_one(model_folder: ModelFolder, tmp_path: Path) -> None:
    """A fine-tuned model is a directory like any other: its own weights count, not those it came from."""
    folder, tuned = model_folder("llama"), tmp_path / "tuned"
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(
            plain(tokens()[:, :-1]).logits.flatten(0, 1), tokens()[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain.save_pretrained(tuned)
    word_tokenizer().save_pretrained(tuned)
    for name in (tuned, str(tuned)):
        teacher = Teacher.load(name)
        assert teacher.name == str(tuned)
        assert float((final(teacher) - plain_final(plain)).abs().max()) < CLOSE
    assert float((final(teacher) - final(Teacher.load(folder))).abs().max()) > 1e3 * CLOSE


@contract
def test_a_sharded_directory(model_folder: ModelFolder, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model_folder("llama"), attn_implementation="eager")
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    word_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert float((final(Teacher.load(tmp_path)) - plain_final(plain)).abs().max()) < CLOSE


@contract
def test_a_home_directory_is_expanded(model_folder: ModelFolder, tmp_path: Path, monkeypatch: Patch) -> None:
    copied(model_folder("llama"), tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.local_directory("~/mine") == tmp_path / "mine"


@contract
def test_incomplete_directories_are_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = copied(model_folder("llama"), tmp_path / "model")
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(
        InputError,
        match=r"has no config.json; give a Hugging Face model directory, an adapter directory or a .gguf file",
    ):
        Teacher.load(folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(tmp_path / name)
    with pytest.raises(InputError, match=r"has no tokenizer; save one beside the model \(tokenizer.save_pretrained\)"):
        Teacher.load(folder)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").rename(folder / "tokenizer_config.json")
    (folder / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(InputError, match=r"model.safetensors is no whole safetensors file .*[Hh]eader"):
        Teacher.load(folder)


@contract
@pytest.mark.parametrize("name", ["README.md", "./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere"])
def test_a_path_that_is_no_directory_is_refused_without_asking_the_hub(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("a file")
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(
        InputError, match=r"is not a directory or a .gguf file; give a local model directory, a .gguf file or a hub id"
    ):
        sources.local_directory(name)


@contract
def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file; give the path of a GGUF file"):
        sources.local_directory(tmp_path / "model.gguf")


# --- nothing that can run code ---


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "boom")


@contract
def test_pickled_weights_are_refused_and_not_read(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = copied(model_folder("llama"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(
        InputError, match=r"has no .safetensors weights .*Pickled weights are never loaded.*safe_serialization=True"
    ):
        Teacher.load(folder)
    assert not (tmp_path / "boom").exists()


CODE = """
from pathlib import Path
Path({target!r}).write_text("boom")
from transformers import LlamaConfig as MyConfig, LlamaForCausalLM as MyModel, PreTrainedTokenizerFast as MyTokenizer
"""


@contract
def test_remote_code_is_never_run(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = copied(model_folder("llama"), tmp_path / "model")
    (folder / "my_code.py").write_text(CODE.format(target=str(tmp_path / "boom")))
    change_json(
        folder / "config.json", auto_map={"AutoConfig": "my_code.MyConfig", "AutoModelForCausalLM": "my_code.MyModel"}
    )
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "my_code.MyTokenizer"]})
    assert torch.equal(
        final(Teacher.load(folder)), final(Teacher.load(model_folder("llama")))
    )  # a known architecture: transformers' own class
    change_json(folder / "config.json", model_type="my-own", architectures=["MyModel"])
    with pytest.raises(InputError, match="could not be loaded by transformers"):
        Teacher.load(folder)
    assert not (tmp_path / "boom").exists()


# --- adapters ---


def adapted(base: Path, config: Any) -> Any:
    """A model with a new adapter, drawn with a seed of its own."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing`", FutureWarning
        )  # peft asks transformers under an old name
        torch.manual_seed(0)
        return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), config)


@pytest.fixture
def adapter(model_folder: ModelFolder, tmp_path: Path) -> tuple[Path, Tensor]:
    """A LoRA adapter folder whose B is not zero, and the logits of peft's own forward with it."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = adapted(model_folder("llama"), lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", plain_final(model)


@contract
def test_an_adapter_is_merged_into_its_base(adapter: tuple[Path, Tensor], model_folder: ModelFolder) -> None:
    folder, expected = adapter
    student = Student.load(folder)
    assert float((final(student) - expected).abs().max()) < CLOSE
    assert float((final(student) - final(Teacher.load(model_folder("llama")))).abs().max()) > 1e3 * CLOSE
    assert not any("lora" in name for name in student.parameters())
    assert student.tokenizer.get_vocab() == word_tokenizer().get_vocab()


@contract
def test_an_adapters_own_tokenizer_comes_first(adapter: tuple[Path, Tensor]) -> None:
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(adapter[0])
    assert Teacher.load(adapter[0]).tokenizer.padding_side == "right"


@contract
def test_broken_adapters_are_refused(adapter: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, config = adapter[0], adapter[0] / "adapter_config.json"
    change_json(config, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(
        InputError,
        match=r"the base model of the adapter .* mend base_model_name_or_path in its config: .*gone is not a directory",
    ):
        Teacher.load(folder)
    change_json(config, base_model_name_or_path=None)
    with pytest.raises(InputError, match="does not name its base model; set base_model_name_or_path"):
        Teacher.load(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="Pickled weights are never loaded"):
        Teacher.load(folder)


@contract
def test_an_adapter_that_changes_no_weights_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted(
        model_folder("llama"), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"changes no weights \(it is of type .*; give one that can be merged, such as LoRA"
    ):
        Teacher.load(tmp_path)


@contract
def test_a_missing_package_is_named_with_its_extra(
    adapter: tuple[Path, Tensor], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        InputError, match=r'needs the package peft: pip install "circuit-distillation-workbench\[adapters\]"'
    ):
        sources.open_source(adapter[0], dtype=torch.float32)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"needs the package gguf: .*\[gguf\]"):
        sources.open_source(tmp_path / "model.gguf", dtype=torch.float32)


# --- the hub and its cache ---


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty hub cache of its own."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def put_in_cache(cache: Path, repository: str, folder: Path) -> Path:
    """Lay a model out as huggingface_hub does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    return copied(folder, home / "snapshots" / commit)


def no_network(*_: Any, **__: Any) -> None:
    pytest.fail("the network was used")


@contract
@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_hub_id_loads_without_network(
    offline: bool, hub_cache: Path, model_folder: ModelFolder, monkeypatch: Patch
) -> None:
    snapshot = put_in_cache(hub_cache, "somebody/tiny", model_folder("llama"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(sources.HfApi, "model_info", no_network)
    assert sources.local_directory("somebody/tiny") == snapshot
    teacher = Teacher.load("somebody/tiny")
    assert teacher.name == "somebody/tiny"
    assert torch.equal(final(teacher), final(Teacher.load(model_folder("llama"))))


@contract
@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "models/llama"])
def test_an_unknown_hub_id_offline_says_so_at_once(name: str, hub_cache: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sources.HfApi, "model_info", no_network)
    start = time.monotonic()
    with pytest.raises(
        InputError,
        match=rf"'{name}' is neither a local path nor in the hub cache, and HF_HUB_OFFLINE is set; give a local "
        r"directory",
    ):
        Teacher.load(name)
    assert time.monotonic() - start < 2


@contract
def test_a_cached_config_without_weights_is_not_a_model(hub_cache: Path, model_folder: ModelFolder) -> None:
    snapshot = put_in_cache(hub_cache, "somebody/tiny", model_folder("llama"))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither a local path nor in the hub cache"):
        Teacher.load("somebody/tiny")


@contract
def test_an_unreachable_hub_says_so_at_once(hub_cache: Path, monkeypatch: Patch) -> None:
    def unreachable(*_: Any, **settings: Any) -> None:
        assert settings["timeout"] <= 5
        raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources.HfApi, "model_info", unreachable)
    start = time.monotonic()
    with pytest.raises(
        InputError,
        match=r"and the hub can't be reached \(ConnectionError\); give a local directory or a .gguf file, or go online "
        r"once",
    ):
        Teacher.load("nobody/nothing")
    assert time.monotonic() - start < 2


@contract
def test_a_hub_that_refuses_says_so(hub_cache: Path, monkeypatch: Patch) -> None:
    class Refused(RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Client Error")

        def __str__(self) -> str:
            return "404 Client Error"

    def refuse(*_: Any, **__: Any) -> None:
        raise Refused

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources.HfApi, "model_info", refuse)
    with pytest.raises(
        InputError, match=r"the hub does not give 'nobody/nothing' \(404 Client Error\); check the name and your access"
    ):
        Teacher.load("nobody/nothing")


@contract
def test_what_is_downloaded_holds_neither_code_nor_pickles(
    hub_cache: Path, model_folder: ModelFolder, monkeypatch: Patch
) -> None:
    asked: list[dict[str, Any]] = []
    original = sources.snapshot_download

    def download(name: str, **settings: Any) -> str:
        if settings.get("local_files_only"):
            return original(name, **settings)
        asked.append(settings)
        return str(model_folder("llama"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(sources, "snapshot_download", download)
    assert sources.local_directory("somebody/new") == model_folder("llama")
    assert [settings["allow_patterns"] for settings in asked] == [sources.CONFIG_FILES, sources.HUB_FILES]
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", ".pkl", "*")) for pattern in sources.HUB_FILES)


@contract
def test_a_name_that_can_be_nothing_is_refused(hub_cache: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"'my model!' is neither a local path nor a hub id .* give a directory, a .gguf file or owner/name",
    ):
        Teacher.load("my model!")


# --- GGUF files: converted once, all or nothing ---


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF one")
    return tmp_path / "model.gguf"


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*")) if folder.exists() else []


@contract
def test_a_gguf_file_is_converted_once(gguf: Path, model_folder: ModelFolder, monkeypatch: Patch) -> None:
    converted: list[Path] = []

    def convert(path: Path, target: Path) -> None:
        converted.append(path)
        shutil.copytree(model_folder("llama"), target, dirs_exist_ok=True)

    monkeypatch.setattr(sources, "_convert_gguf", convert)
    first = sources.converted_gguf(gguf)
    assert first.parent == sources.cache_root() / "gguf"
    assert torch.equal(final(Teacher.load(gguf)), final(Teacher.load(model_folder("llama"))))
    checked: list[str] = []
    monkeypatch.setattr(hooked_model, "self_check", lambda model, *_: checked.append(model.name))
    Teacher.load(gguf)
    assert not checked, "it has passed"
    monkeypatch.setattr(sources, "__version__", "9.9")
    Teacher.load(gguf)
    assert len(checked) == 1, "in other versions it is checked anew"
    moved = gguf.rename(gguf.with_name("renamed.gguf"))
    assert sources.converted_gguf(moved) == first  # kept by content, not by name
    assert converted == [gguf]
    moved.write_bytes(b"GGUF two")
    assert sources.converted_gguf(moved) != first
    assert converted == [gguf, moved]
    assert first.stat().st_mode & 0o777 == 0o755


@contract
def test_a_crash_in_the_conversion_leaves_nothing_behind(
    gguf: Path, model_folder: ModelFolder, monkeypatch: Patch
) -> None:
    def crash(path: Path, target: Path) -> None:
        shutil.copytree(model_folder("llama"), target, dirs_exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "_convert_gguf", crash)
    with pytest.raises(KeyboardInterrupt):
        sources.converted_gguf(gguf)
    assert everything_in(sources.cache_root() / "gguf") == []
    monkeypatch.setattr(
        sources, "_convert_gguf", lambda _, target: shutil.copytree(model_folder("llama"), target, dirs_exist_ok=True)
    )
    assert (sources.converted_gguf(gguf) / "config.json").exists()


@contract
def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "mine"))
    assert sources.cache_root() == tmp_path / "mine"
    monkeypatch.delenv("WORKBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_root() == tmp_path / "workbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_root() == tmp_path / ".cache" / "workbench"


@contract
def test_quiet_restores_what_it_held_back() -> None:
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()

    def fail() -> None:
        with sources.quiet():
            assert transformers_logging.get_verbosity() == transformers_logging.ERROR
            assert not transformers_logging.is_progress_bar_enabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, bars)


@contract
def test_the_tokenizer_is_loaded_as_saved(model_folder: ModelFolder) -> None:
    opened = sources.open_source(model_folder("gpt2"), dtype=torch.float32)
    saved = AutoTokenizer.from_pretrained(model_folder("gpt2"))
    assert opened.tokenizer.get_vocab() == saved.get_vocab()
    assert opened.tokenizer.padding_side == saved.padding_side == "left"
    assert opened.model.config._attn_implementation == "eager"
    assert not opened.model.training
