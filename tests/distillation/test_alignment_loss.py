"""The alignment as a module: the loop's own loss and gradients, on a plain transformers model too, however its forward
is run; what would train nothing is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distillation.distilling import CONFIG, HEADS, PAIRS, PROMPTS
from workbench.distillation.alignment_loss import CircuitAlignmentLoss
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.distillation.objective import Objective
from workbench.distillation.prompt_rows import PromptFinder
from workbench.distillation.teacher_cache import TeacherCache, computed
from workbench.errors import InputError
from workbench.matching.head_rows import hook_names
from workbench.models.hooked_model import Student, Teacher
from workbench.models.plain_heads import PlainHeads, Recording

Folder = Callable[..., Path]
BATCH = torch.tensor([3, 0, 5, 8, 13, 2])
WEIGHT = 0.5
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(model_folder: Folder) -> tuple[Path, Path]:
    """(student, teacher)."""
    return model_folder("llama", seed=0), model_folder("llama", seed=1)


@pytest.fixture(scope="module")
def teacher(folders: tuple[Path, Path]) -> Teacher:
    return Teacher.load(folders[1], check=False)


@pytest.fixture(scope="module")
def cache(teacher: Teacher) -> TeacherCache:
    return computed(teacher, PROMPTS, hook_names([pair.teacher for pair in PAIRS]))


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def rows_of(prompts: Any) -> tuple[Tensor, Tensor, Any]:
    return prompts.clean, prompts.mask, prompts.positions


def padded(index: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """The prompts as a trainer's rows: padded on the left, an answer and something after it."""
    prompts = PROMPTS.rows(index)
    after = torch.stack([prompts.answers, torch.ones_like(prompts.answers)], 1)
    pad = torch.zeros(len(index), left, dtype=torch.long)
    tokens = torch.cat([pad, prompts.clean, after], 1)
    return tokens, torch.cat([pad.bool(), prompts.mask, torch.ones_like(after, dtype=torch.bool)], 1)


def gradients(model: Any) -> dict[str, Tensor]:
    """By slice, of the matched heads' parts alone."""
    found = {}
    for part in slices_of_heads(model, HEADS):
        gradient = model.parameters()[part.parameter].grad
        found[f"{len(found)}"] = (torch.zeros(()) if gradient is None else gradient[part.index]).clone()
    for parameter in model.parameters().values():
        parameter.grad = None
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * largest)


@pytest.fixture(scope="module")
def loops(folders: tuple[Path, Path], cache: TeacherCache) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(alignment loss, similarities, gradients of `WEIGHT` times the loss) of the loop's own objective."""
    student = Student.load(folders[0], check=False)
    slices = TrainedSlices(student, slices_of_heads(student, HEADS))
    with slices.gradients():
        _, alignment, ckas = Objective(student, PROMPTS, cache, PAIRS, CONFIG).losses(BATCH)
        assert alignment is not None
        (WEIGHT * alignment).backward()
        return alignment.detach(), ckas, gradients(student)


def backward(model: Any, loss: CircuitAlignmentLoss, *given: Any) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    total, similarities = loss(*given)
    total.backward()
    return float(total.detach()), {name: float(value) for name, value in similarities.items()}, gradients(model)


@pytest.mark.parametrize("kind", ["student", "transformers"])
def test_the_loops_own_loss(kind: str, folders: tuple[Path, Path], teacher: Teacher, loops: Any) -> None:
    student = Student.load(folders[0], check=False) if kind == "student" else plain(folders[0])
    heads = student if kind == "student" else PlainHeads(student)
    module = CircuitAlignmentLoss(student, teacher, PAIRS, weight=WEIGHT)
    assert not list(module.parameters()), "it trains nothing, and saves nothing"
    total, similarities, found = backward(heads, module, *rows_of(PROMPTS.rows(BATCH)))
    assert total == pytest.approx(WEIGHT * float(loops[0]), rel=1e-5)
    assert similarities == pytest.approx(dict(zip(map(str, PAIRS), loops[1].tolist(), strict=True)), rel=1e-4)
    assert_same(found, loops[2])


def test_a_teacher_by_its_activations_from_a_cache_and_as_a_transformers_model(
    folders: tuple[Path, Path], teacher: Teacher, cache: TeacherCache, loops: Any
) -> None:
    model = plain(folders[0])
    batch = PROMPTS.rows(BATCH)
    given = cache.rows(BATCH, hook_names([pair.teacher for pair in PAIRS]))
    for module, more in (
        (CircuitAlignmentLoss(model, None, PAIRS, weight=WEIGHT), (given,)),
        (CircuitAlignmentLoss(model, plain(folders[1]), PAIRS, weight=WEIGHT), ()),
    ):
        assert float(module(*rows_of(batch), *more)[0].detach()) == pytest.approx(WEIGHT * float(loops[0]), rel=1e-4)
    same = CircuitAlignmentLoss(model, cache, PAIRS, weight=WEIGHT, prompts=PROMPTS)
    with same.recording() as record:
        model(input_ids=batch.clean, attention_mask=batch.mask.long())
    assert float(same.of_recording(record)[0].detach()) == pytest.approx(WEIGHT * float(loops[0]), rel=1e-4)
    looked_up, _ = same(*rows_of(batch))
    assert float(looked_up.detach()) == pytest.approx(WEIGHT * float(loops[0]), rel=1e-4)
    other = cache.rows(BATCH.flip(0), hook_names([pair.teacher for pair in PAIRS]))
    assert abs(float(module(*rows_of(batch), other)[0].detach()) / WEIGHT - float(loops[0])) > 1e-2, (
        "other rows, another loss"
    )


def test_result_is_what_the_heads_write(folders: tuple[Path, Path], teacher: Teacher, cache: TeacherCache) -> None:
    both = [
        float(
            CircuitAlignmentLoss(student, teacher, PAIRS, activation="result", reduction="mean")(
                *rows_of(PROMPTS.rows(BATCH))
            )[0].detach()
        )
        for student in (Student.load(folders[0], check=False), plain(folders[0]))
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    settings: Any = {"activation": "result", "reduction": "mean", "prompts": PROMPTS}
    cached = CircuitAlignmentLoss(plain(folders[0]), cache, PAIRS, **settings)(*rows_of(PROMPTS.rows(BATCH)))[0]
    assert float(cached.detach()) == pytest.approx(both[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("way", ["plain", "padded", "checkpointed", "autocast", "shuffled with others"])
def test_recorded_in_the_trainers_own_forward(
    way: str, folders: tuple[Path, Path], teacher: Teacher, loops: Any
) -> None:
    """However the forward is run, the gradients are the loop's; under bfloat16 to its digits, in float32 all the
    same."""
    model = plain(folders[0])
    module = CircuitAlignmentLoss(model, teacher, PAIRS, weight=WEIGHT, prompts=PROMPTS)
    tokens, mask = padded(BATCH, 0 if way == "plain" else 3)
    if way == "shuffled with others":
        order = torch.tensor([4, 6, 1, 0, 7, 5, 2, 3])
        tokens, mask = (torch.cat([each, each[:2].flip(1)])[order] for each in (tokens, mask))
        tokens[order >= 6] = 2
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with module.recording() as record, torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
        with torch.no_grad():
            model(input_ids=tokens.flip(0), use_cache=False)  # for somebody's metrics
        total, _ = module.of_recording(record, all_rows=way != "shuffled with others")
    assert total.dtype == torch.float32
    assert record.activations["blocks.1.attn.hook_z"].dtype == (torch.bfloat16 if way == "autocast" else torch.float32)
    total.backward()
    tolerance = 0.1 if way == "autocast" else 5e-4
    assert float(total.detach()) == pytest.approx(WEIGHT * float(loops[0]), rel=0.01 if way == "autocast" else 1e-4)
    assert_same(gradients(PlainHeads(model)), loops[2], tolerance)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_reentrant_checkpointing_is_refused(folders: tuple[Path, Path], teacher: Teacher) -> None:
    """It runs the forward without a graph, so the alignment would train nothing, in silence."""
    model = plain(folders[0]).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    module = CircuitAlignmentLoss(model, teacher, PAIRS, prompts=PROMPTS)
    tokens, mask = padded(BATCH, 0)
    with module.recording() as record:
        model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
    with pytest.raises(InputError, match="no gradient reaches"):
        module.of_recording(record)


def test_other_rows_are_left_out_and_so_is_a_prompt_by_itself(folders: tuple[Path, Path], cache: TeacherCache) -> None:
    """One row has no similarity; where other rows are mixed in, a batch may well hold one prompt alone."""
    model = plain(folders[0])
    module = CircuitAlignmentLoss(model, cache, PAIRS, prompts=PROMPTS)
    tokens, mask = padded(BATCH, 0)
    tokens[1:, 1] = 2
    with module.recording() as record:
        model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
    total, similarities = module.of_recording(record, all_rows=False)
    assert (float(total.detach()), similarities) == (0, {})
    total.backward()
    assert not any(float(value.abs().max()) for value in gradients(PlainHeads(model)).values())


def test_rows_are_recognised_by_their_tokens() -> None:
    finder = PromptFinder(PROMPTS)
    tokens, mask = padded(BATCH, 2)
    found = finder.rows_in(tokens, mask)
    assert found.index.tolist() == BATCH.tolist()
    for name, where in PROMPTS.rows(BATCH).positions.items():
        assert torch.equal(found.batch.position(name)[:, 2:-2], where), name
    assert not found.batch.position("all")[:, :2].any()
    assert not found.batch.position("all")[:, -2:].any()
    tokens[2, 5] += 1
    assert finder.rows_in(tokens, mask, all_rows=False).rows.tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(InputError, match=r"1 of the batch's 6 rows begin with none .*BOS"):
        finder.rows_in(tokens, mask)


def test_what_does_not_fit_is_refused(folders: tuple[Path, Path], teacher: Teacher, cache: TeacherCache) -> None:
    model = plain(folders[0])
    for message, given, named in (
        ("no setting", (model, teacher, PAIRS), {"estimatr": "biased"}),
        ("weight", (model, teacher, PAIRS), {"weight": -1}),
        ("no option", (model, teacher, PAIRS), {"options": {"fraction": 0.1}}),
        ("give these as `prompts`", (model, cache, PAIRS), {}),
        ("build it for these prompts", (model, cache, PAIRS), {"prompts": PROMPTS[:5]}),
        ("nothing to align", (model, teacher, ()), {}),
        ("not read from a plain", (model, teacher, PAIRS), {"measure": "attention_kl", "activation": "pattern"}),
        ("keep them", (model, teacher, PAIRS), {"positions": "last"}),
    ):
        with pytest.raises(InputError, match=message):
            CircuitAlignmentLoss(*given, **named)
    with pytest.raises(InputError, match="no teacher to run"):
        CircuitAlignmentLoss(model, None, PAIRS)(*rows_of(PROMPTS.rows(BATCH)))
    with pytest.raises(InputError, match="at least 2 examples"):
        CircuitAlignmentLoss(model, teacher, PAIRS[:1])(*rows_of(PROMPTS.rows(BATCH[:1])))
    with pytest.raises(InputError, match="give them as `prompts`"):
        CircuitAlignmentLoss(model, teacher, PAIRS).of_recording(Recording())
