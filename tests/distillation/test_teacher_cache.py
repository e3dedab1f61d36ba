"""The teacher's outputs: sharded on disk and live equal those in memory; interrupted builds go on; damage is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation.distilling import CONFIG, PAIRS, PROMPTS, furthest, trained, values
from workbench import seeds, storage
from workbench.distillation import teacher_shards
from workbench.distillation.teacher_cache import LiveTeacher, TeacherCache, TeacherOutputs, computed
from workbench.distillation.teacher_shards import INDEX, TeacherShards
from workbench.errors import InputError
from workbench.matching.head_rows import hook_names
from workbench.models import hooks
from workbench.models.hooked_model import Teacher

Loader = Callable[..., Any]
NAMES = hook_names([pair.teacher for pair in PAIRS])
build = teacher_shards.teacher_shards


def built(teacher: Teacher, folder: Path, *, names: list[str] = NAMES) -> TeacherShards:
    return build(teacher, PROMPTS, names, folder, shard=10, batch=5)


def forwards(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that this teacher is run on from now on."""
    seen: list[int] = []
    run = teacher.activations

    def watched(tokens: Any, mask: Any, names: Any, **options: Any) -> Any:
        seen.append(len(tokens))
        return run(tokens, mask, names, **options)

    monkeypatch.setattr(teacher, "activations", watched)
    return seen


def assert_equal_outputs(found: TeacherOutputs, expected: TeacherCache, *, names: list[str] = NAMES) -> None:
    assert len(found) == len(expected) == len(PROMPTS)
    for draw in range(4):
        index = torch.randperm(len(PROMPTS), generator=seeds.generator(draw, "rows"))[: 3 + 7 * draw]
        assert torch.equal(found.logits_of(index), expected.logits_of(index))
        assert torch.equal(found.labels_of(index), expected.labels_of(index))
        rows, others = found.rows(index, names), expected.rows(index, names)
        assert list(rows) == list(others)
        assert all(torch.equal(rows[name], others[name]) for name in names)
    assert found.output_weights.keys() == expected.output_weights.keys()
    assert all(torch.equal(found.output_weights[layer], weight) for layer, weight in expected.output_weights.items())


def test_shards_equal_memory(load_teacher: Loader, architecture: str, tmp_path: Path) -> None:
    teacher = load_teacher(architecture, seed=1)
    expected = computed(teacher, PROMPTS, NAMES, batch=5)
    found = built(teacher, tmp_path)
    assert_equal_outputs(found, expected)
    assert len(list(found.folder.glob("0*.safetensors"))) == -(-len(PROMPTS) // 10)
    assert_equal_outputs(TeacherShards.open(found.folder, PROMPTS), expected)
    assert not torch.equal(expected.logits[0], expected.logits[1])


def test_an_interrupted_build_goes_on_at_the_next_shard(
    load_teacher: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(seed=1)
    expected = computed(teacher, PROMPTS, NAMES, batch=5)
    run, left = teacher.activations, [3]

    def dying(*given: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(*given, **options)

    monkeypatch.setattr(teacher, "activations", dying)
    with pytest.raises(KeyboardInterrupt):
        built(teacher, tmp_path)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    assert len(storage.read_json(folder / INDEX)["shards"]) == 1, "the second shard was half done"
    with pytest.raises(InputError, match=r"10 of 24 prompts.*interrupted"):
        TeacherShards.open(folder, PROMPTS)
    seen = forwards(teacher, monkeypatch)
    assert_equal_outputs(built(teacher, tmp_path), expected)
    assert seen == [5, 5, 4], "the first shard was kept"
    built(teacher, tmp_path)
    assert len(seen) == 3, "nothing is run for a complete cache"


@pytest.mark.parametrize("damage", ["a bit", "torn", "missing"])
def test_a_damaged_shard_is_made_again_or_refused(
    load_teacher: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    teacher = load_teacher(seed=1)
    expected = computed(teacher, PROMPTS, NAMES, batch=5)
    folder = built(teacher, tmp_path).folder
    shard = folder / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(bytes(content) if damage == "a bit" else content[:100])
    with pytest.raises(InputError, match=r"00001.safetensors in .* is missing or damaged; make it again"):
        TeacherShards.open(folder, PROMPTS)
    seen = forwards(teacher, monkeypatch)
    assert_equal_outputs(built(teacher, tmp_path), expected)
    assert seen == [5, 5], "that shard alone"
    (folder / INDEX).write_text("{half a")
    assert_equal_outputs(built(teacher, tmp_path), expected)


def test_other_prompts_hooks_and_teachers(load_teacher: Loader, tmp_path: Path) -> None:
    teacher = load_teacher(seed=1)
    found = built(teacher, tmp_path)
    assert built(load_teacher(seed=2), tmp_path).folder != found.folder
    assert built(teacher, tmp_path, names=[hooks.z(0)]).folder != found.folder
    with pytest.raises(InputError, match="other prompts"):
        TeacherShards.open(found.folder, PROMPTS.swapped())
    with pytest.raises(InputError, match="not in this teacher cache"):
        found.rows(torch.arange(2), [hooks.z(1)])
    with pytest.raises(InputError, match=r"no hook 'blocks.0.attn.hook_zz'"):
        built(teacher, tmp_path, names=["blocks.0.attn.hook_zz"])


def test_rows_are_mapped_not_loaded(load_teacher: Loader, tmp_path: Path) -> None:
    """What is read comes from the file at that moment: a map, not a copy."""
    found = built(load_teacher(seed=1), tmp_path)
    before = found.rows(torch.arange(3), NAMES)[NAMES[0]]
    shard = found.folder / "00000.safetensors"
    with shard.open("r+b") as file:
        file.seek(-shard.stat().st_size // 2, 2)
        file.write(bytes(shard.stat().st_size // 2))
    after = {name: found.rows(torch.arange(10), [name])[name] for name in NAMES}
    assert any(bool((value == 0).any()) for value in after.values())
    assert not bool((before == 0).any())


def test_a_live_teacher_is_run_once_a_batch(load_teacher: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(seed=1)
    expected = computed(teacher, PROMPTS, NAMES)
    live = LiveTeacher(teacher, PROMPTS, NAMES)
    seen = forwards(teacher, monkeypatch)
    index = torch.randperm(len(PROMPTS), generator=seeds.generator(0, "live"))[:9]
    torch.testing.assert_close(live.logits_of(index), expected.logits_of(index))
    assert torch.equal(live.labels_of(index), expected.labels_of(index))
    for part in (index, index[4:], index[[7, 1]]):
        rows = live.rows(part, NAMES)
        for name in NAMES:
            torch.testing.assert_close(rows[name], expected.rows(part, NAMES)[name])
    assert seen == [9]
    with pytest.raises(InputError, match="not in this teacher cache"):
        live.rows(index, [hooks.z(1)])


def test_training_is_the_same_from_memory_shards_and_a_live_teacher(
    load_teacher: Loader, load_student: Loader, tmp_path: Path
) -> None:
    teacher = load_teacher(seed=1)
    folder = built(teacher, tmp_path).folder
    memory, shards, live = load_student(), load_student(), load_student()
    start = values(memory)
    reports = trained(memory, computed(teacher, PROMPTS, NAMES, batch=5), CONFIG, tmp_path / "memory")
    assert trained(shards, TeacherShards.open(folder, PROMPTS), CONFIG, tmp_path / "shards") == reports
    assert furthest(values(shards), values(memory)) == 0
    trained(live, LiveTeacher(teacher, PROMPTS, NAMES), CONFIG, tmp_path / "live")
    assert furthest(values(live), values(memory)) < 1e-4, "another batch size in the teacher's forward rounds otherwise"
    assert furthest(start, values(memory)) > 100 * 1e-4


def test_shards_without_activations(load_teacher: Loader, tmp_path: Path) -> None:
    """Training without alignment reads labels and logits alone; such a cache builds, opens and opens again."""
    teacher = load_teacher()
    for found in (
        built(teacher, tmp_path, names=[]),
        built(teacher, tmp_path, names=[]),
        TeacherShards.open(next(tmp_path.iterdir()), PROMPTS),
    ):
        assert_equal_outputs(found, computed(teacher, PROMPTS, [], batch=5), names=[])
        assert found.output_weights == {}
