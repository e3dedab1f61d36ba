"""The prompts of a recipe, by their use."""

import functools
import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal

from workbench.experiment.conditions import CONDITIONS
from workbench.experiment.recipe import Recipe
from workbench.storage import located
from workbench.tasks.allotment import Allotment, Use, allot, refuse_copies
from workbench.tasks.base import PromptPairs, Split, Stage, Task
from workbench.tasks.pairs import Pair, numbered_pairs
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.records import RowError
from workbench.tasks.registry import task_named
from workbench.tasks.tokenizers import SharedWords, read_by_both

log = logging.getLogger("workbench")


class Prompts:
    """The prompts of a recipe, by their use; each is disjoint from the others."""

    def __init__(self, recipe: Recipe, tokenizer: Any, *, teacher: Any = None) -> None:
        """`teacher`: the teacher's tokenizer, where it is another one than the student's (`tokenizer`)."""
        self.recipe, self.data, self.tokenizer, self.teacher = recipe, recipe.data, tokenizer, teacher

    @functools.cached_property
    def allotment(self) -> Allotment:
        """How many scenes, or rows of the user's file, each use gets."""
        sizes = self.data.sizes
        if self.data.pairs is None:
            scenes: dict[Use, int] = {use: size or 0 for use, size in sizes.items()}
            return Allotment(total=sum(scenes.values()), sizes=scenes, unit="scenes")
        numbers, texts, rows, _ = self._rows
        allotment = allot(len(rows), sizes, idle=self._idle)
        refuse_copies(allotment, texts, numbers, source=self.data.pairs)
        return allotment

    @property
    def _idle(self) -> list[Use]:
        """Uses that need no rows of a file."""
        trains = any(CONDITIONS[name].trains is not None for name in self.recipe.conditions)
        idle: dict[Use, bool] = {
            "reference": self.data.reference == "corrupt",
            "train": not trains,
            "validation": not trains or not self.recipe.training.evaluate_every,
        }
        return [use for use, is_idle in idle.items() if is_idle]

    def require(self, *uses: Use) -> None:
        """Say who gets which prompts, and refuse uses without any, before anything runs. Errors: `InputError` with the
        key to change."""
        idle: list[Use] = [] if self.data.pairs is None else self._idle
        if not self.recipe.training.evaluate_every:
            idle.append("validation")
        needed: list[Use] = [use for use in uses if use not in idle]
        self._announced  # noqa: B018  once
        self.allotment.require(*needed)

    @functools.cached_property
    def _announced(self) -> None:
        log.info("%s", self.allotment)

    @functools.cached_property
    def _calibration(self) -> tuple[PromptPairs, PromptPairs]:
        if self.data.pairs is not None:
            discovery = self._share("discovery")
            if self.data.reference == "corrupt":
                return discovery.swapped(), discovery
            return self._share("reference"), discovery
        reference, discovery = self.allotment.sizes["reference"], self.allotment.sizes["discovery"]
        pairs = self._task("calibration", reference + discovery)
        cut = reference * (len(pairs) // (reference + discovery))
        return pairs.rows(slice(0, cut)), pairs.rows(slice(cut, None))

    @property
    def reference(self) -> PromptPairs:
        """For the means of the ablation."""
        return self._calibration[0]

    @property
    def discovery(self) -> PromptPairs:
        """For path patching, ablation impacts and matching."""
        return self._calibration[1]

    @functools.cached_property
    def train(self) -> PromptPairs:
        """For distillation."""
        return self._split("train")

    @functools.cached_property
    def validation(self) -> PromptPairs | None:
        """For the evaluations during training, if the recipe has any: scenes of the training split that are not trained
        on."""
        if not self.allotment.sizes["validation"]:
            return None
        if self.data.pairs is not None:
            return self._share("validation")
        scenes = self.allotment.sizes["train"] + self.allotment.sizes["validation"]
        return self._task("train", scenes).rows(slice(len(self.train), None))

    @functools.cached_property
    def test(self) -> PromptPairs:
        """For every number of the results table."""
        return self._split("test")

    @property
    def has_test(self) -> bool:
        """Whether a file of pairs has rows for testing."""
        return self.allotment.sizes["test"] > 0

    @functools.cached_property
    def left_out(self) -> tuple[RowError, ...]:
        """The bad rows of the user's file that are left out, in order."""
        return () if self.data.pairs is None else tuple(sorted(self._rows[3], key=lambda problem: problem.number))

    @functools.cached_property
    def _rows(self) -> tuple[list[int], list[str], PromptPairs, list[RowError]]:
        """Numbers, clean prompts and tensors of the user's rows, and the bad ones."""
        assert self.data.pairs is not None
        source = located(self.data.pairs)
        problems: list[RowError] = []
        pairs = numbered_pairs(source, problems=problems)
        rows = self._read(pairs, source, problems)
        bad = {problem.number for problem in problems}
        good = [(number, pair.clean) for number, pair in pairs if number not in bad]
        return [number for number, _ in good], [text for _, text in good], rows, problems

    def _split(self, split: Literal["train", "test"]) -> PromptPairs:
        return self._task(split, self.allotment.sizes[split]) if self.data.pairs is None else self._share(split)

    def _share(self, use: Use) -> PromptPairs:
        """Rows of the file of pairs."""
        self.allotment.require(use)
        return self._rows[2].rows(self.allotment.rows_of(use))

    def _task(self, split: Split, scenes: int) -> PromptPairs:
        words = self.tokenizer if self.teacher is None else SharedWords(self.tokenizer, self.teacher)
        pairs = self.task.pairs(words, split=split, scenes=scenes, seed=self.data.seed)
        return self._read(enumerate(pairs, 1), f"{self.task.name} ({split})")

    @functools.cached_property
    def task(self) -> Task:
        """The recipe's task."""
        return task_named(self.data.task, self.data.options)

    def _read(
        self, pairs: Iterable[tuple[int, Pair]], source: str, problems: list[RowError] | None = None
    ) -> PromptPairs:
        how: dict[str, Any] = {"source": source, "problems": problems, "skip_bad_rows": self.data.skip_bad_rows}
        if self.teacher is None:
            prompts = self.settings.encode(self.settings.dataset(pairs, self.tokenizer, **how), self.tokenizer)
        else:
            prompts = read_by_both(pairs, self.tokenizer, self.teacher, settings=self.settings, **how)
        return prompts.to(self.recipe.device)

    @property
    def settings(self) -> PromptSettings:
        """How the recipe puts prompts to the models."""
        return PromptSettings(**asdict(self.data.prompts))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the backward search: the recipe's, else the task's."""
        if self.recipe.stages is not None:
            return self.recipe.stages
        return self.task.stages if self.data.pairs is None else (Stage(name="A", title="direct", position="last"),)
