"""What is read once of a model inside `reading_once`: how often it runs, and that its numbers are those of reading it
anew."""

from collections.abc import Callable

import pytest
import torch

from tests.conftest import entity_pairs
from workbench.matching import head_rows
from workbench.matching.head_rows import Readings, read, reading_once
from workbench.models import hooks
from workbench.models.hooked_model import Teacher

PROMPTS, OTHERS = entity_pairs(scenes=2), entity_pairs(scenes=2, seed=1)
NAMES = [hooks.z(0), hooks.z(1)]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The hook names of every forward that reads activations."""
    seen: list[list[str]] = []
    plain = Teacher.early_activations

    def counting(model: Teacher, tokens: torch.Tensor, mask: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        seen.append(list(names))
        return plain(model, tokens, mask, names)

    monkeypatch.setattr(Teacher, "early_activations", counting)
    return seen


def test_the_same_prompts_are_read_once_and_others_anew(
    load_teacher: Callable[..., Teacher], forwards: list[list[str]]
) -> None:
    teacher = load_teacher()
    plain = {prompts: read(teacher, prompts, NAMES) for prompts in (PROMPTS, OTHERS)}
    forwards.clear()
    readings = Readings(teacher)
    for prompts, names, expected in (
        (PROMPTS, NAMES[:1], NAMES[:1]),
        (PROMPTS, NAMES, NAMES),
        (PROMPTS, NAMES, None),
        (OTHERS, NAMES, NAMES),
        (OTHERS, NAMES[:1], None),
    ):
        with reading_once(readings):
            values = read(teacher, prompts, names)
        assert all(torch.equal(values[name], plain[prompts][name]) for name in names)
        assert forwards == ([] if expected is None else [expected])
        forwards.clear()


def test_what_is_larger_than_the_room_is_read_each_time(
    load_teacher: Callable[..., Teacher], forwards: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher()
    plain = read(teacher, PROMPTS, NAMES)
    monkeypatch.setattr(head_rows, "ROOM", plain[NAMES[0]].nbytes)
    forwards.clear()
    readings = Readings(teacher)
    for _ in range(2):
        with reading_once(readings):
            values = read(teacher, PROMPTS, NAMES)
        assert all(torch.equal(values[name], plain[name]) for name in NAMES)
    assert forwards == [NAMES, NAMES]
