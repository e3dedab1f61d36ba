"""A plan against measurement on miniatures: parameters, operations and cache bytes are exact or nearly so, memory
within a stated band.

Operations are what PyTorch's counter counts of the real runs. The formulas may miss 3 %: a chunk of variants repeats
what its heads write.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs
from miniatures import FAMILIES, miniature

from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PROMPTS
from tests.patching.test_patching_cost import operations, peak
from workbench import storage
from workbench.distillation.adapters import LowRankSlices
from workbench.distillation.config import TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices, slices_of_everything, slices_of_heads
from workbench.distillation.teacher_cache import computed, teacher_cache
from workbench.distillation.teacher_shards import teacher_shards
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student, Teacher
from workbench.patching.ablation import ablation_profiles, plain_logits, reference_means
from workbench.patching.engine.passage import Route
from workbench.patching.path import PathPatcher
from workbench.plan import arithmetic, memory, sweeps
from workbench.plan.shapes import ModelShape, shape_of
from workbench.plan.steps import Step, Trained, cache_bytes
from workbench.plan.sweeps import Receiving
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import logit_difference
from workbench.values.refs import Head, Receiver

SIZES = {"layers": 4, "heads": 8, "d_model": 64}
CLOSE = 0.03
MIXED = [
    ("Mixtral", 2, 2 * 3 * 32 * 64 + 4 * 32),  # two of four experts, and the router
    ("Qwen2Moe", 2, 2 * 3 * 32 * 32 + 4 * 32 + 3 * 32 * 32 + 32),  # and a shared expert with its gate
    ("GPTBigCode", 1, 2 * 32 * 128),
    ("Falcon", 1, 2 * 32 * 128),
    ("Llama", 2, 3 * 32 * 64),
]
"""Family, key-value heads, weights of an MLP that a token is multiplied with."""
ROUTES: dict[str, tuple[str, str, str, dict[int, int]]] = {
    "queries": ("q", "last", "last", {1: 2, 3: 1}),
    "values": ("v", "earlier_label", "earlier_label", {2: 1, 3: 2}),
    "keys": ("k", "labels", "labels", {1: 1, 2: 2, 3: 1}),
    "all positions": ("q", "all", "all", {3: 3}),
}
"""Composition, sending and receiving position, receivers of each layer."""


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def folder(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Path:
    return model_folder(request.param, **SIZES)


@pytest.fixture(scope="module")
def model(folder: Path) -> Teacher:
    return Teacher.load(folder)


@pytest.fixture(scope="module")
def shape(folder: Path) -> ModelShape:
    return shape_of(str(folder))


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    return entity_pairs(scenes=4, boxes=7).rows(slice(0, 24))


def test_parameters_are_the_loaded_models(model: Teacher, shape: ModelShape, folder: Path) -> None:
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters().values())
    assert (shape.layers, shape.heads, shape.kv_heads, shape.d_head) == (
        model.n_layers,
        model.n_heads,
        model.n_kv_heads,
        model.d_head,
    )
    student, heads = Student.load(folder, check=False), [Head(0, 1), Head(0, 2), Head(0, 3), Head(3, 7)]
    for train_kv in (True, False):
        parts = slices_of_heads(student, heads, train_kv=train_kv)
        assert shape.slice_parameters(heads, train_kv=train_kv) == TrainedSlices(student, parts).count
        lora = LowRankSlices(student, parts, rank=3)
        assert shape.slice_parameters(heads, train_kv=train_kv, lora_rank=3) == sum(
            leaf.numel() for leaf in lora.leaves.values()
        )
        assert shape.slice_parameters(heads, train_kv=train_kv) <= shape.most_slice_parameters(
            len(heads), train_kv=train_kv
        )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Llama-3.1-8B", 8_030_261_248), ("Llama-3.2-3B", 3_212_749_824), ("Llama-3.2-1B-Instruct", 1_235_814_400)],
)
def test_the_bundled_configs_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    assert shape_of(f"meta-llama/{name}").parameters == parameters


@pytest.mark.parametrize(("family", "kv_heads", "mlp"), MIXED)
def test_active_experts_and_shared_key_value_heads_are_counted(
    family: str, kv_heads: int, mlp: int, tmp_path: Path
) -> None:
    shape = shape_of(str(miniature(family, FAMILIES[family], tmp_path / family)))
    assert (shape.kv_heads, shape.mlp_weights) == (kv_heads, mlp)


def test_forwards_and_ablation(model: Teacher, shape: ModelShape, pairs: PromptPairs) -> None:
    count, tokens = pairs.clean.shape
    assert operations(lambda: model.final_logits(pairs.clean, pairs.mask)) == arithmetic.forward(shape, count, tokens)
    assert operations(lambda: PathPatcher(model, pairs)) == arithmetic.clean_run(shape, count, tokens)
    for position in ("all", "last"):
        found = operations(
            lambda p=position: ablation_profiles(model, pairs, "zero", metrics="logit_difference", position=p)
        )
        assert sweeps.ablation(shape, pairs, batch=256, position=position) == pytest.approx(found, rel=CLOSE)


def test_paths_to_the_logits(model: Teacher, shape: ModelShape, pairs: PromptPairs) -> None:
    patcher, variants = PathPatcher(model, pairs), [frozenset([head]) for head in model.heads]
    patcher.corrupt_logits  # noqa: B018 (the corrupt run, which all sweeps share)
    found = operations(lambda: patcher.effects(variants, Route(position="last"), logit_difference))
    assert sweeps.to_logits(shape, pairs, batch=128) == pytest.approx(found, rel=CLOSE)


@pytest.mark.parametrize("name", ROUTES)
def test_paths_into_heads(model: Teacher, shape: ModelShape, pairs: PromptPairs, name: str) -> None:
    composition, sending, receiving, layers = ROUTES[name]
    group = shape.heads // shape.kv_heads
    receivers = tuple(
        Receiver(Head(layer, index * group), composition) for layer, count in layers.items() for index in range(count)
    )  # type: ignore[arg-type]
    route = Route(position=sending, receivers=receivers, receiver_position=receiving)
    variants = [frozenset([head]) for head in model.heads if head.layer < max(layers)]
    patcher = PathPatcher(model, pairs)
    patcher.effects(variants[-1:], route, logit_difference)  # the corrupt run
    found = operations(lambda: patcher.effects(variants, route, logit_difference))
    known = {layer: Receiving(count, composition) for layer, count in layers.items()}  # type: ignore[arg-type]
    assert sweeps.into_heads(shape, pairs, known, sending, receiving, batch=128) == pytest.approx(found, rel=CLOSE)
    most = sweeps.into_heads(
        shape, pairs, sweeps.receivers_everywhere(shape, 4, composition), sending, receiving, batch=128
    )  # type: ignore[arg-type]
    assert most > found * (1 - CLOSE), "a plan without known receivers takes the most that they can cost"


@pytest.mark.parametrize(
    ("config", "everything"),
    [
        (replace(CONFIG, alignment=None), True),
        (replace(CONFIG, alignment=None), False),
        (CONFIG, False),
        (replace(CONFIG, accumulate=2), False),
    ],
    ids=["everything", "heads", "aligned", "accumulated"],
)
def test_a_step(model_folder: Callable[..., Path], config: TrainingConfig, everything: bool) -> None:
    for architecture in ("llama", "gpt2", "neox"):
        folders = [model_folder(architecture, seed=seed, d_model=64) for seed in (0, 1)]
        teacher, student = Teacher.load(folders[0], check=False), Student.load(folders[1], check=False)
        shapes = [shape_of(str(folder)) for folder in folders]
        outputs = computed(teacher, PROMPTS, hook_names([pair.teacher for pair in PAIRS]))
        slices = TrainedSlices(
            student, slices_of_everything(student) if everything else slices_of_heads(student, HEADS)
        )
        run = Distillation(student, slices, PROMPTS, outputs, PAIRS if config.weight else (), config, seed=3)
        with slices.gradients(), student.training():
            found = operations(lambda run=run: run.step(0))
        layers = sorted({head.layer for head in HEADS})
        touched = len(layers) * shapes[1].attention_weights
        trained = (
            Trained.everything(shapes[1])
            if everything
            else Trained(parameters=slices.count, touched=touched, matrices=touched)
        )
        step = Step(
            student=shapes[1],
            teacher=shapes[0],
            batch=config.batch,
            tokens=PROMPTS.clean.shape[1],
            trained=trained,
            pairs=len(PAIRS) if config.weight else 0,
            rows=config.batch,
            accumulate=config.accumulate,
        )
        assert step.operations(lowest=0 if everything else layers[0]) == pytest.approx(found, rel=CLOSE), architecture


def test_the_teachers_outputs_take_the_bytes_that_are_written(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model_folder("llama")
    teacher, shape = Teacher.load(folder, check=False), shape_of(str(folder))
    names = hook_names([Head(0, 1), Head(2, 3), Head(2, 0)])
    teacher_cache(teacher, PROMPTS, names, tmp_path / "memory")
    teacher_shards(teacher, PROMPTS, names, tmp_path / "shards", shard=5)
    count, tokens = PROMPTS.clean.shape
    for kind in ("memory", "shards"):
        files = list((tmp_path / kind).rglob("*.safetensors"))
        written = sum(value.nbytes for file in files for value in storage.read_tensors(file)[0].values())
        planned = cache_bytes(shape, count, tokens, 2, width=4, shards=kind == "shards")
        assert planned == written, kind
        on_disk = sum(file.stat().st_size for file in files)
        headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
        assert on_disk == planned + headers


@pytest.mark.parametrize("sizes", [{}, {"d_model": 128, "heads": 8}, {"layers": 5, "d_model": 64}], ids=str)
def test_memory_is_within_the_stated_band(model_folder: Callable[..., Path], sizes: dict[str, int]) -> None:
    folder = model_folder("llama", **{"d_model": 96, **sizes})
    student, shape, prompts = Student.load(folder, check=False), shape_of(str(folder)), PROMPTS.rows(slice(0, 16))
    count, tokens = prompts.clean.shape
    outputs = computed(Teacher.load(folder, check=False), PROMPTS, [])
    kept: list[Any] = []
    measured = {
        "forward": (peak(lambda: plain_logits(student, prompts)), memory.forward_bytes(shape, count, tokens, 4)),
        "means": (peak(lambda: reference_means(student, prompts)), memory.means_bytes(shape, count, tokens, 4)),
        "patching": (
            peak(lambda: kept.append(PathPatcher(student, prompts))),
            memory.clean_run_bytes(shape, count, tokens, 4) + memory.forward_bytes(shape, count, tokens, 4),
        ),
        "corrupt": (
            peak(lambda: kept[0].corrupt_logits),
            memory.corrupt_run_bytes(shape, count, tokens, 4) + memory.forward_bytes(shape, count, tokens, 4),
        ),
    }
    for everything in (False, True):
        heads = [Head(0, 0), Head(1, 1)]
        slices = TrainedSlices(
            student, slices_of_everything(student) if everything else slices_of_heads(student, heads)
        )
        touched = 2 * shape.attention_weights
        trained = (
            Trained.everything(shape)
            if everything
            else Trained(parameters=slices.count, touched=touched, matrices=touched)
        )
        run = Distillation(student, slices, PROMPTS, outputs, (), replace(CONFIG, alignment=None), seed=3)
        with slices.gradients(), student.training():
            run.step(0)  # AdamW's state is there from now on
            found = peak(lambda run=run: run.step(1))
        held = 4 * 3 * trained.parameters  # leaves and moments
        predicted = (
            memory.step_bytes(shape, CONFIG.batch, tokens, 4) + trained.gradient_and_optimizer_bytes(shape, 4) - held
        )
        measured[f"step, {'everything' if everything else 'heads'}"] = (found, predicted)
    for name, (found, predicted) in measured.items():
        assert 0.8 < predicted / found < 1.8, f"{name}: planned {predicted:,}, measured {found:,}"


def test_memory_grows_with_what_is_asked(shape: ModelShape) -> None:
    """The band would be worthless if the figures hardly differed."""
    small, large = (memory.step_bytes(shape, batch, 25, 4) for batch in (8, 800))
    assert large == 100 * small
    assert torch.finfo(torch.float32).bits == 8 * 4


def test_a_quantised_teacher_is_planned_with_the_bytes_that_it_takes(model_folder: Callable[..., Path]) -> None:
    shape = shape_of(str(model_folder("llama")))
    matrices = shape.layers * (shape.attention_weights + shape.mlp_weights)
    assert shape.quantisable == matrices
    others, rows = 4 * (shape.parameters - matrices), shape.quantisable_rows
    assert shape.weight_bytes(4) == 4 * shape.parameters
    assert shape.weight_bytes(4, "int8") == others + matrices + 4 * rows
    assert shape.weight_bytes(4, "nf4") == others + matrices // 2 + matrices // 16
