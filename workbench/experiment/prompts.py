"""The prompts of a recipe, by their use."""

import functools
from collections.abc import Iterable
from typing import Any

from workbench.errors import InputError
from workbench.experiment.recipe import Recipe
from workbench.storage import located
from workbench.tasks.base import PromptPairs, Split, Stage, Task
from workbench.tasks.pairs import Pair, numbered_pairs
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.registry import task_named
from workbench.tasks.tokenizers import SharedWords, read_by_both


class Prompts:
    """The prompts of a recipe, by their use; each is disjoint from the others."""

    def __init__(self, recipe: Recipe, tokenizer: Any, *, teacher: Any = None) -> None:
        """`teacher`: the teacher's tokenizer, where it is another one than the student's (`tokenizer`)."""
        self.recipe, self.data, self.tokenizer, self.teacher = recipe, recipe.data, tokenizer, teacher

    @functools.cached_property
    def _calibration(self) -> tuple[PromptPairs, PromptPairs]:
        if self.data.pairs is not None:
            pairs = self._rows
            if self.data.reference == "corrupt":
                return pairs.swapped(), pairs
            return pairs.rows(slice(0, self.data.reference_scenes)), pairs.rows(
                slice(self.data.reference_scenes, self.data.reference_scenes + self.data.discovery_scenes)
            )
        pairs = self._task("calibration", self.data.reference_scenes + self.data.discovery_scenes)
        cut = self.data.reference_scenes * (len(pairs) // (self.data.reference_scenes + self.data.discovery_scenes))
        return pairs.rows(slice(0, cut)), pairs.rows(slice(cut, None))

    @property
    def reference(self) -> PromptPairs:
        """For the means of the ablation."""
        return self._calibration[0]

    @property
    def discovery(self) -> PromptPairs:
        """For path patching, ablation impacts and matching."""
        if len(self._calibration[1]) == 0:
            raise InputError(
                f"no pairs are left for discovery after {self.data.reference_scenes} reference rows; give more rows, "
                "or set data.reference to corrupt."
            )
        return self._calibration[1]

    @functools.cached_property
    def train(self) -> PromptPairs:
        """For distillation."""
        return self._split("train", self.data.train_scenes)

    @functools.cached_property
    def validation(self) -> PromptPairs | None:
        """For the evaluations during training, if the recipe has any: scenes of the training split that are not trained
        on."""
        if not self.data.validation_scenes:
            return None
        scenes, count = self.data.train_scenes, self.data.validation_scenes
        if self.data.pairs is None:
            return self._task("train", scenes + count).rows(slice(len(self.train), None))
        return self._left("validation", self.data.reference_scenes + self.data.discovery_scenes + scenes, count)

    @functools.cached_property
    def test(self) -> PromptPairs:
        """For every number of the results table."""
        return self._split("test", self.data.test_scenes)

    @property
    def has_test(self) -> bool:
        """Whether a file of pairs has rows left for testing."""
        return (
            len(self._rows)
            > self.data.reference_scenes
            + self.data.discovery_scenes
            + self.data.train_scenes
            + self.data.validation_scenes
        )

    @functools.cached_property
    def _rows(self) -> PromptPairs:
        assert self.data.pairs is not None
        source = located(self.data.pairs)
        return self._read(numbered_pairs(source), source)

    def _split(self, split: Split, scenes: int) -> PromptPairs:
        if self.data.pairs is None:
            return self._task(split, scenes)
        before = self.data.train_scenes + self.data.validation_scenes if split == "test" else 0
        return self._left(split, self.data.reference_scenes + self.data.discovery_scenes + before, scenes)

    def _left(self, use: str, start: int, count: int) -> PromptPairs:
        """Rows of the file of pairs."""
        rows = self._rows.rows(slice(start, start + count))
        if len(rows) == 0:
            raise InputError(
                f"{self.data.pairs} has {len(self._rows)} rows, none left for {use}; lower the numbers of `data` or "
                "give more rows."
            )
        return rows

    def _task(self, split: Split, scenes: int) -> PromptPairs:
        words = self.tokenizer if self.teacher is None else SharedWords(self.tokenizer, self.teacher)
        pairs = self.task.pairs(words, split=split, scenes=scenes, seed=self.data.seed)
        return self._read(enumerate(pairs, 1), f"{self.task.name} ({split})")

    @functools.cached_property
    def task(self) -> Task:
        """The recipe's task."""
        return task_named(self.data.task, self.data.options)

    def _read(self, pairs: Iterable[tuple[int, Pair]], source: str) -> PromptPairs:
        if self.teacher is None:
            found = self.settings.encode(self.settings.dataset(pairs, self.tokenizer, source=source), self.tokenizer)
        else:
            found = read_by_both(pairs, self.tokenizer, self.teacher, source=source, settings=self.settings)
        return found.to(self.recipe.device)

    @property
    def settings(self) -> PromptSettings:
        """How the recipe puts prompts to the models."""
        return self.data.prompts

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the backward search: the recipe's, else the task's."""
        if self.recipe.stages is not None:
            return self.recipe.stages
        return self.task.stages if self.data.pairs is None else (Stage(name="A", title="direct", position="last"),)
