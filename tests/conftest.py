"""Shared tiny models, and the fixture that fails a test which leaks hooks, flags, modes or global random state."""

import functools
import os
import random
import socketserver
import subprocess
import sys
import threading
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # prompts are read one by one: threads would wait for each other

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
)

from tests import budget
from workbench.models.hooked_model import HookedModel, Student, Teacher
from workbench.models.sources import quiet
from workbench.models.transformer_lens import HookedTransformerLike
from workbench.patching import shared
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs, encode, task_dataset
from workbench.tasks.counterparts import Counterparts
from workbench.tasks.entity_tracking import EntityTracking

torch.set_num_threads(1)  # tiny models gain nothing from more, and two busy processes with two threads each crawl


def _name_the_hooked() -> None:
    """From Python 3.12 on a protocol sees no attribute that `__getattr__` gives, as a module gives its parts: what is
    hooked is said by hand there."""
    try:
        from transformer_lens.model_bridge import TransformerBridge as Known
    except ImportError:
        from transformer_lens import HookedTransformer as Known  # pyright: ignore[reportAttributeAccessIssue]
    HookedTransformerLike.register(Known)


if sys.version_info >= (3, 12):
    _name_the_hooked()
LIVING: "weakref.WeakSet[HookedModel]" = weakref.WeakSet()
"""Every wrapper that a test has made and not let go."""
_initialise = HookedModel.__init__


def _remembering(self: HookedModel, *args: Any, **kwargs: Any) -> None:
    _initialise(self, *args, **kwargs)
    LIVING.add(self)


HookedModel.__init__ = _remembering  # type: ignore[method-assign]


def config_of(architecture: str, **sizes: int) -> Any:
    """A tiny `transformers` config: llama (grouped-query attention), llama-mha, gpt2, neox (parallel blocks), gemma2
    (norms after attention and MLP, soft caps), mixtral (a mixture of experts)."""
    vocabulary = len(word_tokenizer())
    layers, heads, width = sizes.get("layers", 3), sizes.get("heads", 4), sizes.get("d_model", 32)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    grouped: dict[str, tuple[Any, dict[str, int]]] = {
        "llama": (LlamaConfig, {}),
        "llama-mha": (LlamaConfig, {"num_key_value_heads": heads}),
        "llama-mqa": (LlamaConfig, {"num_key_value_heads": 1}),
        "gemma2": (Gemma2Config, {"head_dim": 16}),
        "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    }
    if architecture in grouped:
        kind, own = grouped[architecture]
        usual = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
        }
        return kind(**(usual | own | ids))
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_positions=256,
            initializer_range=0.2,
            **ids,
        )
    assert architecture == "neox"
    return GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=256,
        initializer_range=0.2,
        **ids,
    )


ROOT = Path(__file__).parents[1]
ModelFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """`model_folder("llama", seed=0, layers=3)` -> a saved Hugging Face directory with random weights and the
    word-level tokenizer."""
    made: dict[Any, Path] = {}

    def make(architecture: str, *, seed: int = 0, **sizes: int) -> Path:
        key = (architecture, seed, tuple(sorted(sizes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-")
            with torch.random.fork_rng(), quiet():
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config_of(architecture, **sizes))
                for (
                    name,
                    parameter,
                ) in (
                    model.named_parameters()
                ):  # biases start at 0, norms at 1: give them values that a mistake would show
                    if name.endswith("bias") or "norm" in name or ".ln_" in name:
                        parameter.data += 0.1 * torch.randn_like(parameter)
                model.save_pretrained(folder)
                word_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(params=["llama", "gpt2", "neox"])
def architecture(request: pytest.FixtureRequest) -> str:
    """Each supported architecture in turn."""
    return request.param


@pytest.hookimpl(tryfirst=True)  # before the marks choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What was measured as slow is marked so. Files with slow tests first: what comes last then is short, and no
    process waits long for the others."""
    measured = budget.slow_tests()
    for item in items:
        if budget.function_of(item.nodeid) in measured:
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


class Pool:
    """Loaded models that tests are lent one after another: loading costs more than most tests do with a model.

    Two calls in one test give two models. A model that comes back gets its weights of before; one with other
    parameters, settings or attributes than it had is not lent again.
    """

    def __init__(self) -> None:
        self.idle: dict[Any, list[HookedModel]] = {}
        self.lent: list[tuple[Any, HookedModel]] = []
        self._as_loaded: dict[int, tuple[Any, list[tuple[torch.Tensor, bool]]]] = {}

    def lend(self, kind: type[HookedModel], folder: Path) -> HookedModel:
        """A model of the folder that nobody else has."""
        key = (kind, folder)
        if self.idle.get(key):
            model = self.idle[key].pop()
        else:
            model = kind.load(folder)
            weights = [(value.detach().clone(), value.requires_grad) for _, value in model.model.named_parameters()]
            self._as_loaded[id(model)] = self._make(model), weights
        self.lent.append((key, model))
        return model

    def take_back(self) -> None:
        """End all loans."""
        while self.lent:
            key, model = self.lent.pop()
            make, weights = self._as_loaded[id(model)]
            if self._make(model) == make:
                for (_, parameter), (value, takes_gradients) in zip(
                    model.model.named_parameters(), weights, strict=True
                ):
                    with torch.no_grad():
                        parameter.copy_(value)
                    parameter.requires_grad_(takes_gradients).grad = None
                self.idle.setdefault(key, []).append(model)

    def holds(self, model: HookedModel) -> bool:
        """Whether a model is in the pool, as it was when it was loaded."""
        return any(model is each for models in self.idle.values() for each in models)

    @staticmethod
    def _make(model: HookedModel) -> Any:
        leaves = [(name, id(value), value.shape, value.dtype) for name, value in model.model.named_parameters()]
        attributes = {name: id(value) for name, value in vars(model).items()}
        return leaves, attributes, repr(sorted(vars(model.model.cfg).items(), key=str))


POOL = Pool()


@pytest.fixture
def load_teacher(model_folder: ModelFolder) -> Callable[..., Teacher]:
    """A frozen model."""
    return lambda architecture="llama", **kwargs: POOL.lend(Teacher, model_folder(architecture, **kwargs))


@pytest.fixture
def load_student(model_folder: ModelFolder) -> Callable[..., Student]:
    """A model that trains."""
    return lambda architecture="llama", **kwargs: POOL.lend(Student, model_folder(architecture, **kwargs))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site of docs/, built once for all the processes of a run."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / "site"
    with FileLock(shared / "site.lock"):
        if not folder.exists():
            fresh = shared / "site-new"
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(fresh)]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
            )
            assert done.returncode == 0, done.stderr[-3000:]
            fresh.rename(folder)
    return folder


@functools.cache
def entity_pairs(*, split: str = "calibration", scenes: int = 4, boxes: int = 3, seed: int = 0) -> PromptPairs:
    """Entity-tracking pairs for the word-level tokenizer."""
    tokenizer = word_tokenizer()
    return encode(
        task_dataset(EntityTracking(boxes=boxes), tokenizer, split=split, scenes=scenes, seed=seed), tokenizer
    )  # pyright: ignore[reportArgumentType]


def tokens_by_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward by rows of shared prefixes takes, as they come."""
    sizes, run = [], shared._by_rows

    def counting(model: Any, pairs: PromptPairs, stand_ins: Any, rows: Any) -> torch.Tensor:
        sizes.append(rows.prompt.numel())
        return run(model, pairs, stand_ins, rows)

    monkeypatch.setattr(shared, "_by_rows", counting)
    return sizes


def left_padded(pairs: PromptPairs, rows: Sequence[int], *, tokens: int = 3) -> PromptPairs:
    """The pairs with the first tokens of some rows taken for padding."""
    mask = pairs.mask.clone()
    mask[list(rows), :tokens] = False
    return PromptPairs(
        clean=pairs.clean,
        corrupt=pairs.corrupt,
        mask=mask,
        answers=pairs.answers,
        distractors=pairs.distractors,
        positions={name: where & mask for name, where in pairs.positions.items()},
    )


def with_counterparts(pairs: PromptPairs, *, pad: int = 2) -> PromptPairs:
    """Pairs of equal length as if they were not: every token the counterpart of its like, corrupt prompts of another
    padding."""
    index = (torch.arange(pairs.clean.shape[1]) + pad).expand(pairs.clean.shape)
    return replace(
        pairs,
        corrupt=torch.nn.functional.pad(pairs.corrupt, (pad, 0)),
        counterparts=Counterparts(
            mask=torch.nn.functional.pad(pairs.mask, (pad, 0)), index=torch.where(pairs.mask, index, -1)
        ),
    )


@pytest.fixture
def small_recipe(model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`small_recipe(conditions=[...])` -> a recipe as plain values, on random-weight models and a cache of its own;
    thresholds at 0, so that circuits are found in noise."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    usual = {
        "teacher": str(model_folder("llama", seed=1)),
        "student": str(model_folder("llama", seed=2, layers=2)),
        "data": {"boxes": 3, "reference_scenes": 4, "discovery_scenes": 4, "train_scenes": 6, "test_scenes": 5},
        "discovery": {"heads": 2, "least_effect": 0.0, "confidence": 0.01},
        "training": {"steps": 4, "batch": 6, "checkpoint_every": 2},
    }
    return lambda **changes: usual | changes


@contextmanager
def in_background(server: socketserver.BaseServer) -> Iterator[None]:
    """A server at work in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that changes grad mode, default dtype or global random state, or leaves hooks or training mode on a
    model.

    Python's own `random` is left out: beartype draws from it to choose which items of a list to check.
    """
    before = _state()
    yield
    after = _state()
    leaked = [name for name, value in before.items() if after[name] != value]
    for model in list(LIVING):
        if POOL.holds(model):
            continue
        hooked = [name for name, point in model.model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
        if hooked or model.model.training:
            leaked.append(f"{model.name}: hooks {hooked[:3]}, training {model.model.training}")
        if isinstance(model, Teacher) and any(
            parameter.requires_grad for _, parameter in model.model.named_parameters()
        ):
            leaked.append(f"{model.name}: a teacher's parameter takes gradients")
    if not leaked:
        POOL.take_back()
    POOL.lent.clear()
    assert not leaked, f"the test leaked: {leaked}"


@pytest.fixture
def others_randomness() -> Iterator[None]:
    """Other people's trainers seed globally: what they leave is put back."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def _state() -> dict[str, Any]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "torch RNG": torch.get_rng_state().numpy().tobytes(),
        "numpy RNG": np.random.get_state()[1].tobytes(),  # type: ignore[union-attr]
    }
