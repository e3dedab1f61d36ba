"""The prompts of a session, as text: pairs to pick from, pairs to evaluate circuits on, and reference prompts of the
mean ablation.

From a task they are drawn of different splits (calibration to look at, test to evaluate, train for the means); a
user's own pairs serve to look at and to evaluate, and their means need `reference` pairs of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs, RowError, Task, checked_row, single_token
from workbench.tasks.pairs import Pair, Split, numbered_pairs, refuse_broken_text
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.registry import task_named, task_names
from workbench.tasks.tokenizers import refuse_unknown_words

PLAIN = PromptSettings()
MOST_TOKENS = 1024
"""Of a prompt: attention of every token on every other is computed and sent to the page."""
Given = str | Path | Dataset | Sequence[Pair]
"""Pairs as a file (JSONL, CSV, Parquet), a dataset, a hub id, or `Pair`s."""
Key = tuple[str, ...]
"""What makes a pair this pair and no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Pairs, and the Python expression that gives them again (over `tokenizer`, and over `pairs` or `reference` where
    they were given in memory)."""

    pairs: tuple[Pair, ...]
    python: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All prompts of a session."""

    title: str
    shown: Drawn
    evaluated: Drawn
    reference: Drawn | None
    """None: mean ablation is not to be had."""
    chance: float | None
    settings: PromptSettings = PLAIN
    """How the prompts are put to the models."""
    cut: str | None = None
    """What the memory budget left out, in words."""

    def describe(self) -> dict[str, Any]:
        """What is needed of it on the page."""
        return {
            "title": f"{self.title}{said_of(self.settings)}",
            "chance": self.chance,
            "evaluated": len(self.evaluated.pairs),
            "reference": len(self.reference.pairs) if self.reference else 0,
            "cut": self.cut,
            "pairs": [text_of(pair) for pair in self.shown.pairs],
        }


def said_of(settings: PromptSettings) -> str:
    """What of the settings is not plain, for the page."""
    said = [
        *(["BOS prepended"] if settings.prepend_bos else []),
        *([f"chat template: {settings.chat}"] if settings.chat != "none" else []),
    ]
    return f" ({', '.join(said)})" if said else ""


def text_of(pair: Pair) -> dict[str, str]:
    """The four texts of a pair."""
    return {"clean": pair.clean, "corrupt": pair.corrupt, "answer": pair.answer, "distractor": pair.distractor}


def key_of(pair: Pair) -> Key:
    """A pair's key in a cache."""
    return (pair.clean, pair.corrupt, *pair.answers, "or", *pair.distractors)


def material_of_task(
    task: Task | str,
    options: Mapping[str, Any],
    tokenizer: Any,
    *,
    prompts: int,
    seed: int,
    spelled: str = "tokenizer",
    settings: PromptSettings = PLAIN,
) -> Material:
    """Prompts drawn from a task, by its name or as an object: as many to look at as to evaluate, twice as many for the
    means.

    `spelled`: the tokenizer in Python.
    """
    name = task if isinstance(task, str) else type(task).name
    chosen = task_named(task, options) if isinstance(task, str) else task
    known = isinstance(task, str) or name in task_names()
    made_as = f"task_named({name!r}, {_options(chosen)!r})" if known else "task"

    def drawn(split: Split, count: int) -> Drawn:
        pairs = chosen.pairs(tokenizer, split=split, scenes=count, seed=seed)  # a scene gives at least one pair
        python = f"list(islice({made_as}.pairs({spelled}, split={split!r}, scenes={count}, seed={seed}), {count}))"
        return Drawn(pairs=tuple(islice(pairs, count)), python=python)

    return Material(
        title=name.replace("_", " "),
        shown=drawn("calibration", prompts),
        evaluated=drawn("test", prompts),
        reference=drawn("train", 2 * prompts),
        chance=chosen.chance,
        settings=settings,
    )


def _options(task: Task) -> dict[str, Any]:
    """The settings of a task that differ from its defaults."""
    settings = fields(task)  # pyright: ignore[reportArgumentType]
    return {each.name: getattr(task, each.name) for each in settings if getattr(task, each.name) != each.default}


def material_of_pairs(pairs: Given, reference: Given | None, settings: PromptSettings = PLAIN) -> Material:
    """A user's own pairs."""
    shown, title = _given(pairs, "pairs"), Path(str(pairs)).name if isinstance(pairs, str | Path) else "own pairs"
    return Material(
        title=title,
        shown=shown,
        evaluated=shown,
        reference=None if reference is None else _given(reference, "reference"),
        chance=None,
        settings=settings,
    )


def _given(source: Given, name: str) -> Drawn:
    if isinstance(source, str | Path | Dataset):
        drawn = tuple(pair for _, pair in numbered_pairs(source))
        python = f"[pair for _, pair in numbered_pairs({name if isinstance(source, Dataset) else repr(str(source))})]"
    else:
        drawn, python = tuple(source), f"list({name})"
    if not drawn or not all(isinstance(pair, Pair) for pair in drawn):
        raise InputError(
            f"`{name}` holds no pairs; give a JSONL file, a dataset, or `Pair(clean=..., corrupt=..., answer=..., "
            "distractor=...)`s."
        )
    return Drawn(pairs=drawn, python=python)


def encoded(pairs: Sequence[Pair], model: HookedModel, settings: PromptSettings = PLAIN) -> PromptPairs:
    """Pairs as tensors for a model. Errors: `InputError` for unequal lengths, unknown words, answers of several tokens,
    and (before any tensor is made) prompts longer than the model or the page can take."""
    for pair in pairs:
        refuse_unknown_words(pair, model.tokenizer)
    wrapped = settings.wrapped(enumerate(pairs, 1), model.tokenizer)
    refuse_long([pair for _, pair in wrapped], model, settings)
    dataset = settings.dataset(enumerate(pairs, 1), model.tokenizer, source="the pairs")
    return settings.encode(dataset, model.tokenizer).to(model.device)


def refuse_long(pairs: Sequence[Pair], model: HookedModel, settings: PromptSettings) -> None:
    """Refuse prompts beyond the model's context, or beyond `MOST_TOKENS`."""
    context = getattr(model.model.cfg, "n_ctx", None) or MOST_TOKENS
    most = min(context, MOST_TOKENS)
    for pair in pairs:
        for text in (pair.clean, pair.corrupt):
            tokens = len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) + settings.prepend_bos
            if tokens > most:
                whose = f"{model.name} reads" if context <= MOST_TOKENS else "the explorer shows"
                raise InputError(f"a prompt has {tokens} tokens; {whose} {most} at most. Give a shorter one.")


def typed_pair(text: Mapping[str, Any], model: HookedModel, settings: PromptSettings = PLAIN) -> Pair:
    """A pair as it was typed: an answer without its leading space gets one where the prompt does not end in a space.

    Errors: `InputError` for a missing text, prompts of unequal length or too long, unknown words, answers that are not
    one token.
    """
    tokenizer = model.tokenizer
    for name in ("clean", "corrupt", "answer", "distractor"):
        title = name.replace("clean", "clean prompt").replace("corrupt", "corrupt prompt")
        if not isinstance(text.get(name), str) or not text[name].strip():
            raise InputError(f"the {title} is empty; fill it in.")
        try:
            refuse_broken_text(1, f"the {title}", text[name])
        except RowError as error:
            raise InputError(error.reason) from None
    answer, distractor = (_spaced(text[name], text["clean"], tokenizer) for name in ("answer", "distractor"))
    pair = Pair(clean=text["clean"], corrupt=text["corrupt"], answer=answer, distractor=distractor, positions={})
    refuse_unknown_words(pair, tokenizer)
    try:
        for number, wrapped in settings.wrapped([(1, pair)], tokenizer):
            checked_row(number, wrapped, tokenizer)
            refuse_long([wrapped], model, settings)
    except RowError as error:
        raise InputError(error.reason) from None
    return pair


def _spaced(word: str, prompt: str, tokenizer: Any) -> str:
    spaced = f" {word.strip()}"
    return (
        spaced
        if not prompt[-1].isspace() and not word[0].isspace() and single_token(tokenizer, spaced) is not None
        else word
    )
