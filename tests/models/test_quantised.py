"""A teacher whose matrices are held in fewer bits: what it computes beside the full one, and what refuses it; where the
parts of a model lie, and the dtype that it was saved in."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.miniatures import FAMILIES, miniature
from workbench.distillation.teacher_cache import computed
from workbench.errors import InputError
from workbench.models import hooks, quantisation
from workbench.models.devices import require_placed
from workbench.models.hooked_model import Student, Teacher
from workbench.patching.path import PathPatcher
from workbench.tasks.base import PromptPairs


def of(kind: str, *more: Any) -> Any:
    package = quantisation.PACKAGES[kind]
    absent = pytest.mark.skipif(find_spec(package) is None, reason=f"{package}, of the extra quantised")
    return pytest.param(kind, *more, marks=absent, id=kind)


KINDS = [of("int8"), of("nf4")]
pytestmark = pytest.mark.filterwarnings("ignore")  # of what the packages import


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.load("teacher")


@pytest.fixture(scope="module")
def pairs(teacher: Teacher) -> PromptPairs:
    return wb.task("entity_tracking", boxes=3).pairs(teacher, scenes=4)


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


@pytest.mark.parametrize(("kind", "apart", "alike"), [of("int8", 0.02, 0.99), of("nf4", 0.2, 0.9)])
def test_a_quantised_teacher_is_an_exact_model_near_the_full_one(
    kind: Any, apart: float, alike: float, teacher: Teacher, pairs: PromptPairs
) -> None:
    quantised, task = Teacher.load("teacher", quantisation=kind), pairs
    full = teacher.final_logits(task.clean, task.mask)
    logits = quantised.final_logits(task.clean, task.mask)
    difference = float((logits - full).abs().max() / full.abs().max())
    assert 1e-4 < difference < apart, "the size of the rounding is that of the bits: neither none nor everything"
    # law: it is itself an exact model, by the replay that multiplies with the matrices that `full` gives
    written = dequantised(quantised)
    assert torch.allclose(written.final_logits(task.clean, task.mask), logits, atol=1e-3 * float(full.abs().max()))
    assert PathPatcher(quantised, task).engine == PathPatcher(teacher, task).engine == "replay"
    # the circuit: heads rank as in the full model
    for measure in (wb.ablate, wb.path_patch):
        ours, theirs = (measure(each, task).mean() for each in (quantised, teacher))
        assert correlation(ours, theirs) > alike
    ours, theirs = (gradients(each, task) for each in (quantised, teacher))
    assert correlation(ours, theirs) > alike - 0.2
    # what a training reads of it
    names = [hooks.z(layer) for layer in range(teacher.n_layers)]
    ours, theirs = (computed(each, task, names) for each in (quantised, teacher))
    index = torch.arange(len(task))
    assert bool((ours.labels_of(index) == theirs.labels_of(index)).float().mean() > 0.8)
    for name, values in theirs.rows(index, names).items():
        assert correlation(ours.rows(index, names)[name], values) > alike - 0.01
    assert quantised.fingerprint() == Teacher.load("teacher", quantisation=kind, check=False).fingerprint()
    assert quantised.fingerprint() != teacher.fingerprint()


def gradients(model: Teacher, pairs: PromptPairs) -> Tensor:
    return wb.attribute(model, pairs).mean().nan_to_num()


def dequantised(quantised: Teacher) -> Teacher:
    """A plain teacher with the very matrices that the quantised one multiplies with."""
    plain = Teacher.load("teacher")
    for name, parameter in plain.model.named_parameters():
        weight = dict(quantised.model.named_parameters())[name]
        parameter.data.copy_(quantisation.full(weight).to(parameter.dtype))
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Phi3"])
def test_every_way_of_storing_queries_keys_and_values(family: str, kind: Any, tmp_path: Path) -> None:
    folder = miniature(family, FAMILIES[family], tmp_path)
    loaded = Teacher.load(folder, quantisation=kind)  # with its self-check: heads' outputs add up
    some = any(map(quantisation.is_quantised, loaded.parameters().values()))
    assert some == ((family, kind) != ("GPT2", "int8")), "torchao leaves GPT-2's Conv1D as they are"
    head = loaded.output_weights(0)
    assert head.shape == (loaded.n_heads, loaded.d_head, loaded.model.cfg.d_model)
    assert head.is_floating_point()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_saved_quantised_are_a_teachers_alone(kind: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, saved = miniature("Llama", {}, tmp_path / "full"), tmp_path / "saved"
    settings = quantisation.settings_of(kind, torch.float32)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(saved)
    quantised = Teacher.load(folder, quantisation=kind)
    quantised.tokenizer.save_pretrained(saved)
    assert Teacher.load(saved).fingerprint() == quantised.fingerprint()
    with pytest.raises(InputError, match="quantised weights do not train; load it as a teacher, or give the model"):
        Student.load(saved)
    with pytest.raises(InputError, match="holds quantised weights already; leave the quantisation out"):
        Teacher.load(saved, quantisation=kind)
    with pytest.raises(InputError, match="in fewer bits, and quantised weights do not train; leave the quantisation"):
        Student(quantised.model)


def test_a_config_that_says_quantised_of_full_weights_is_refused(tmp_path: Path) -> None:
    folder = miniature("Llama", {}, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for method, more in (("bitsandbytes", {"load_in_4bit": True}), ("torchao", {})):
        stated = {"quantization_config": {"quant_method": method, **more}}
        (folder / "config.json").write_text(json.dumps(config | stated))
        with pytest.raises(InputError, match=r"and they are not; delete that entry"):
            Teacher.load(folder)
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    with pytest.raises(InputError, match="rounds the activations too, so that heads do not add up"):
        Teacher.load(folder)


def test_a_student_is_never_quantised_and_names_are_checked() -> None:
    with pytest.raises(InputError, match="quantised weights do not train; leave the quantisation to the teacher"):
        Student.load("student", quantisation="int8")
    with pytest.raises(InputError, match="no quantisation 'int9'; did you mean 'int8'"):
        Teacher.load("teacher", quantisation="int9")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package torchao: pip install .*\[quantised\]"):
        Teacher.load("teacher", quantisation="int8")


def test_a_device_map_that_this_machine_can_follow(teacher: Teacher, pairs: PromptPairs) -> None:
    expected = teacher.final_logits(pairs.clean, pairs.mask)
    for device_map in ("cpu", {"": "cpu"}):
        placed = Teacher.load("teacher", device_map=device_map, check=False)
        assert torch.equal(placed.final_logits(pairs.clean, pairs.mask), expected)
        assert not placed.is_spread


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without accelerators")
@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ("auto", "spreads a model over several accelerators, and this machine has 0"),
        ({"": "cuda:1"}, "no device 'cuda:1'"),
        ({"": 0}, "names accelerator 0, and this machine has none"),
        ({"model": "cpu", "lm_head": "disk"}, "can't leave parts on disk"),
        ({}, "an empty device_map places nothing"),
        ("everywhere", "'everywhere' is no device"),
    ],
)
def test_a_device_map_that_it_cannot_is_refused(device_map: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Teacher.load("teacher", device_map=device_map, check=False)


def test_a_device_map_and_a_device_are_one_too_many_and_parts_never_come_and_go() -> None:
    with pytest.raises(InputError, match="give one of the two"):
        Teacher.load("teacher", device="meta", device_map="cpu")
    with pytest.raises(InputError, match="on cpu beside others on an accelerator"):
        require_placed({"model": 0, "lm_head": "cpu"})


def test_the_dtype_that_the_weights_were_saved_in(tmp_path: Path) -> None:
    folder = miniature("Llama", {}, tmp_path / "half")
    half = Student.load(folder, dtype="bfloat16")
    half.save(tmp_path / "saved")
    loaded = Teacher.load(tmp_path / "saved", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.fingerprint() == half.fingerprint()
    assert Teacher.load("teacher", dtype="auto", check=False).dtype == torch.float32
