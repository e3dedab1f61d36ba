"""Where pairs of prompts come from, in one call: a task by its name, or a file of one's own.

    task("ioi").pairs(model, scenes=20)          read_pairs("my.jsonl", model)

Both give `PromptPairs` in the model's own tokens, on its device, that know their `origin`. With `teacher` they are in
the tokens of the model (the student) with the teacher's reading beside them, where their tokenizers differ.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset

from workbench.errors import InputError, nearest
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import Origin, PromptPairs, Stage, Task
from workbench.tasks.pairs import Pair, Split, numbered_pairs
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.records import RowError
from workbench.tasks.registry import task_named
from workbench.tasks.tokenizers import SharedWords, read_by_both, same_vocabulary

PLAIN = PromptSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPrompts:
    """A task with its options, ready to be put to a model."""

    task: Task

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return self.task.chance

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The groups of heads of its circuit, where they are known: what `find_circuit` searches by."""
        return tuple(self.task.stages)

    def pairs(
        self,
        model: HookedModel,
        *,
        scenes: int = 20,
        split: Split = "calibration",
        seed: int = 0,
        teacher: HookedModel | None = None,
        settings: PromptSettings = PLAIN,
    ) -> PromptPairs:
        """Pairs in the model's tokens: `scenes` of a split, each asked for as often as the task does.

        The splits `train`, `calibration` (for circuits and matching) and `test` never share a prompt. `teacher`: for a
        student whose teacher reads other tokens. Errors: `InputError` for an unknown split, no scenes, or a tokenizer
        with too few of the task's words.
        """
        if split not in get_args(Split):
            raise InputError(f"a task has no split {split!r}; {nearest(str(split), get_args(Split))}")
        if scenes < 1:
            raise InputError(f"`scenes` is the number of scenes to draw, at least 1, not {scenes}.")
        ours, theirs = _tokenizers(model, teacher)
        words = ours if theirs is None else SharedWords(ours, theirs)
        drawn = self.task.pairs(words, split=split, scenes=scenes, seed=seed)
        origin = Origin(name=self.name, split=split, stages=self.stages, chance=self.chance)
        return _encoded(enumerate(drawn), model, theirs, origin, settings)

    def __repr__(self) -> str:
        stages = "; ".join(f"{stage.name}: {stage.title} at {stage.position}" for stage in self.stages)
        return f"{self.task!r}: chance {self.chance:.3f}; stages {stages or 'not known'}"


def task(name: str | Task, **options: Any) -> TaskPrompts:
    """A task by its name with its options: `task("entity_tracking", boxes=5)`; or one of your own: `task(Colours())`.

    Errors: `InputError` for an unknown name (with the nearest), an option that the task does not take, and an object
    that is no task.
    """
    if isinstance(name, str):
        return TaskPrompts(task=task_named(name, options))
    missing = [part for part in ("name", "stages", "chance", "pairs") if not hasattr(name, part)]
    if isinstance(name, type) or missing:
        what = f"the class {name.__name__}" if isinstance(name, type) else f"{type(name).__name__}, no task"
        raise InputError(
            f"this is {what}; give a task's name, or an object with `name`, `stages`, `chance` and `pairs`: "
            "`task(Colours())`."
        )
    if options:
        raise InputError(f"a task that is an object has its options already: {', '.join(options)} can't be set here.")
    return TaskPrompts(task=name)


def read_pairs(
    source: str | Path | Dataset,
    model: HookedModel,
    *,
    teacher: HookedModel | None = None,
    settings: PromptSettings = PLAIN,
    split: str = "train",
    counterfactual: str | None = None,
    skip_bad_rows: bool = False,
) -> PromptPairs:
    """Your own pairs in the model's tokens: a JSONL, CSV or Parquet file, a `datasets.Dataset`, or a hub id.

    Columns: clean, corrupt (equally many tokens, or other numbers of them where `corrupt_positions` is given), answer,
    distractor (one token each, with the space before it, or a list of those: a set), and if you like positions: name ->
    a piece of the clean prompt, or token indices; `corrupt_positions`: the same names in the corrupt prompt. Or the
    columns of MIB's tasks (`workbench.tasks.mib`), as in `read_pairs("mib-bench/ioi", model, split="test")`, with
    another `counterfactual` than the task's own. `split`: of a hub id. `skip_bad_rows`: leave bad rows out, log a table
    of them, and count them in the pairs' `origin`. Errors: `InputError` with a table of all bad rows.
    """
    _, theirs = _tokenizers(model, teacher)
    if isinstance(source, str | Path) and Path(source).suffix in (".csv", ".parquet") and not Path(source).is_file():
        raise InputError(f"{source} is not a file; give a JSONL, CSV or Parquet file with one pair a row.")
    name = "a dataset" if isinstance(source, Dataset) else str(source)
    try:
        problems: list[RowError] = []
        pairs = numbered_pairs(source, split=split, counterfactual=counterfactual, problems=problems)
        return _encoded(
            pairs, model, theirs, Origin(name=name), settings, problems=problems, skip_bad_rows=skip_bad_rows
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: a column of positions or `facts` is not JSON ({error}).") from None


def _tokenizers(model: HookedModel, teacher: HookedModel | None) -> tuple[Any, Any | None]:
    """The model's tokenizer, and the teacher's where it is another one."""
    for each in (model, teacher):
        if each is None:
            continue
        if not isinstance(each, HookedModel):
            raise InputError(f"{each!r} is no loaded model; load it first: Teacher.load(...) or Student.load(...).")
        if each.tokenizer is None:
            raise InputError(f"{each.name} has no tokenizer; set `model.tokenizer`, or load it from a saved directory.")
    ours, theirs = model.tokenizer, None if teacher is None else teacher.tokenizer
    return ours, None if teacher is None or same_vocabulary(ours, theirs) else theirs


def _encoded(
    pairs: Iterable[tuple[int, Pair]],
    model: HookedModel,
    theirs: Any | None,
    origin: Origin,
    settings: PromptSettings,
    *,
    problems: list[RowError] | None = None,
    skip_bad_rows: bool = False,
) -> PromptPairs:
    bad: list[RowError] = [] if problems is None else problems
    how: dict[str, Any] = {"source": str(origin), "problems": bad, "skip_bad_rows": skip_bad_rows}
    if theirs is not None:
        both = read_by_both(pairs, model.tokenizer, theirs, settings=settings, **how)
        origin = replace(origin, left_out=len(bad))
        other = None if both.teacher is None else replace(both.teacher, origin=origin)
        return replace(both, origin=origin, teacher=other).to(model.device)
    dataset = settings.dataset(pairs, model.tokenizer, **how)
    origin = replace(origin, left_out=len(bad))
    return replace(settings.encode(dataset, model.tokenizer), origin=origin).to(model.device)
