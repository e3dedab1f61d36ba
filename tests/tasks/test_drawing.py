"""Drawing ends: a task with fewer scenes than are asked for says how many it has."""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from workbench.errors import InputError
from workbench.tasks.base import Pair, Split, Stage, task_dataset
from workbench.tasks.check import check
from workbench.tasks.docstring import Docstring
from workbench.tasks.drawing import distinct, fitting
from workbench.tasks.ioi import IndirectObject
from workbench.tasks.vocabulary import mixture_words, word_level_tokenizer
from workbench.tasks.wording import split_by_hash

DOCS = Path(__file__).parents[2] / "docs"
WORDS = word_level_tokenizer(mixture_words())


@pytest.mark.parametrize("there", [1, 2, 7, 30, 200])
def test_all_of_them_are_found_and_one_more_is_refused(there: int) -> None:
    draw = random.Random(there)
    found = list(distinct(lambda _: draw.randrange(there), scenes=there, key=lambda value: value, what="numbers"))
    assert sorted(found) == list(range(there)), "the last one too"
    with pytest.raises(InputError, match=f"numbers has {there} different scenes, not {there + 1} .*ask for fewer"):
        list(distinct(lambda _: draw.randrange(there), scenes=there + 1, key=lambda value: value, what="numbers"))


def test_a_split_without_scenes_ends_too() -> None:
    with pytest.raises(InputError, match=r"has 0 different scenes"):
        list(distinct(lambda _: None, scenes=1, key=lambda value: value, what="nothing"))
    with pytest.raises(InputError, match=r"none of 100,000 draws fits"):
        fitting(lambda: 1, lambda value: value > 1, what="ones")


def test_places_count_what_is_new() -> None:
    """In turns: a repeat is drawn again for the same place."""
    asked: list[int] = []
    values = iter([0, 0, 1, 1, 0, 2])
    list(distinct(lambda place: (asked.append(place), next(values))[1], scenes=3, key=lambda value: value, what="x"))
    assert asked == [0, 1, 1, 2, 2, 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Few:
    """Three prompts in each split."""

    name: ClassVar[str] = "few"
    stages: ClassVar[tuple[Stage, ...]] = (Stage(name="A", title="a", position="last"),)

    @property
    def chance(self) -> float:
        return 0.5

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]:
        draw = random.Random(seed)
        words = ("apple", "bag", "ball", "bell", "boat", "bone", "book", "bus", "cake", "card", "cup")
        mine = [word for word in words if split_by_hash([word]) == split][:3] or list(words[:1])
        for word in distinct(lambda _: draw.choice(mine), scenes=scenes, key=str, what=f"few ({split})"):
            yield Pair(clean=f"The {word}", corrupt="The pen", answer=f" {word}", distractor=" pot", positions={})


def test_what_asks_a_small_task_for_too_much_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"few \(train\) has [123] different scenes, not 600"):
        task_dataset(Few(), WORDS, split="train", scenes=600, seed=0)  # pyright: ignore[reportArgumentType]
    report = check(Few(), WORDS)
    assert report.kinds == {"cannot draw"}
    assert "different scenes" in report.faults[0].message


@pytest.mark.timeout(120)
def test_a_bundled_task_on_few_words_is_told_too() -> None:
    words = [*IndirectObject.words, *Docstring.words]
    few = word_level_tokenizer(
        word for word in words if word not in IndirectObject.words[60:] or word in Docstring.words
    )
    with pytest.raises(InputError):
        list(IndirectObject(template=0, order="abba").pairs(few, split="test", scenes=100_000, seed=0))


def test_the_template_for_a_task_of_your_own_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    sys.modules.pop("your_own_task", None)
    from your_own_task import COLOURS, THINGS, Colours  # pyright: ignore[reportMissingImports]

    few = word_level_tokenizer([*Colours.words[:-16], *THINGS[:1], *COLOURS[:2]])
    task = Colours(things=1)
    there = [len(list(task.pairs(few, split="train", scenes=count, seed=0))) for count in (1,)]
    assert there == [1]
    with pytest.raises(InputError, match=r"colours \(train\) has \d different scenes, not 50"):
        list(task.pairs(few, split="train", scenes=50, seed=0))
