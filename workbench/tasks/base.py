"""What a task is, and how its pairs of prompts become tensors.

The road: `Task.pairs` (text) -> `to_dataset` (checked row by row against a tokenizer) -> `encode` (`PromptPairs`,
tensors). A user's own pairs enter at `load_pairs` and travel the same road.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from datasets import Dataset, Features, List, Value
from jaxtyping import Bool, Int
from torch import Tensor

from workbench import storage
from workbench.errors import InputError
from workbench.tasks.counterparts import Counterparts, require_paired
from workbench.tasks.pairs import (
    MOST_SHOWN,
    SETS,
    Pair,
    Span,
    Split,
    bad_rows,
    named,
    numbered_pairs,
    refuse_broken_text,
    repeated,
)
from workbench.tasks.positions import ANSWERING, named_positions, position_mask
from workbench.tasks.records import FORM, RowError
from workbench.tasks.stages import Stage

__all__ = ["Pair", "PromptPairs", "RowError", "Span", "Split", "Stage", "Task"]
log = logging.getLogger("workbench")
PLACES: dict[str, Literal["clean", "corrupt"]] = {"positions": "clean", "corrupt_positions": "corrupt"}
"""Columns of named positions -> the prompt that they are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where pairs come from: what is known of them beyond their tokens."""

    name: str
    """A task's name, or a file's."""
    split: Split | None = None
    """Of a task: which of its disjoint parts."""
    stages: tuple[Stage, ...] = ()
    """The stages of the circuit that the task declares; empty where none are known."""
    chance: float | None = None
    """Accuracy of guessing."""
    left_out: int = 0
    """Of a file: how many bad rows were left out."""

    def __str__(self) -> str:
        rows = f", {self.left_out} bad rows left out" if self.left_out else ""
        return f"{self.name}{rows}" if self.split is None else f"{self.name}, {self.split} split"


@runtime_checkable
class Task(Protocol):
    """A generator of pairs with a name, a chance level and, where known, the stages of its circuit."""

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]]

    @property
    def chance(self) -> float: ...

    def pairs(self, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Iterator[Pair]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptPairs:
    """A batch of tokenised pairs. Clean and corrupt have the same length row by row, so one mask and one set of
    positions serve both; where they differ in length, `counterparts` says which tokens belong together."""

    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch corrupt_pos"]
    mask: Bool[Tensor, "batch pos"]
    """True on real tokens, False on padding."""
    answers: Int[Tensor, "batch *member"]
    """One token a prompt, or [batch member], padded with -1, where a prompt has a set of answers."""
    distractors: Int[Tensor, "batch *other"]
    """The same of the wrong answers."""
    positions: Mapping[str, Bool[Tensor, "batch pos"]]
    """Name -> the tokens it stands for; `last` (the last real token) and `all` (every real token) are always there."""
    answer_tokens: Int[Tensor, "batch token"] | None = None
    """With answers of several tokens: all tokens of each answer, padded with -1 (`answers` holds the first); see
    `workbench.tasks.scoring`."""
    distractor_tokens: Int[Tensor, "batch wrong"] | None = None
    """The same of each distractor."""
    counterparts: Counterparts | None = None
    """Where clean and corrupt prompts differ in length: the corrupt prompts' own mask, and each clean token's
    counterpart."""
    teacher: "PromptPairs | None" = None
    """Where the teacher has another tokenizer: its reading of the same prompts, row by row
    (`workbench.tasks.tokenizers`)."""
    origin: Origin | None = None
    """Where they come from, if that is known. It is no part of the fingerprint: the same tokens are the same pairs."""

    def __post_init__(self) -> None:
        self._require_layout()
        if self.teacher is not None and (
            len(self.teacher) != len(self) or self.teacher.positions.keys() != self.positions.keys()
        ):
            raise InputError(
                "the teacher's reading holds other prompts or names other positions; encode the same pairs for both."
            )

    def _require_layout(self) -> None:
        other = self.counterparts
        if other is None:
            if self.corrupt.shape != self.mask.shape:
                raise InputError(
                    "clean and corrupt prompts differ in length and nothing says which of their tokens belong "
                    "together; name their positions in both prompts (`corrupt_positions`), or use as many tokens."
                )
        elif (
            other.mask.shape != self.corrupt.shape
            or other.index.shape != self.clean.shape
            or self.corrupt.shape[1] == self.clean.shape[1]
        ):
            raise InputError(
                "counterparts need the masks of both prompts as they are padded, and corrupt prompts of another width "
                "than the clean ones (pad them by one more); encode the pairs anew."
            )

    @property
    def corrupt_mask(self) -> Bool[Tensor, "batch corrupt_pos"]:
        """True on the corrupt prompts' real tokens."""
        return self.mask if self.counterparts is None else self.counterparts.mask

    def aligned(self, value: Tensor) -> Tensor:
        """What the corrupt prompts hold, [batch corrupt_pos ...], in the clean prompts' layout: [batch pos ...].

        NaN at tokens without a counterpart (what would read them has to refuse first: `require_counterparts`), zero on
        padding."""
        if self.counterparts is None:
            return value
        aligned = self.counterparts.aligned(value)
        lacking = self.mask & (self.counterparts.index < 0)
        lacking = lacking.reshape(*lacking.shape, *[1] * (value.ndim - 2)).to(value.device)
        return aligned.masked_fill(lacking, torch.nan)

    def require_counterparts(self, where: Bool[Tensor, "batch pos"]) -> None:
        """Refuse tokens that have no counterpart in the corrupt prompt. Errors: `InputError` with the remedy."""
        if self.counterparts is not None:
            self.counterparts.require(where, self.mask)

    @property
    def has_sets(self) -> bool:
        """Whether a prompt has several answers or distractors."""
        return self.answers.ndim > 1 or self.distractors.ndim > 1

    def first_members(self) -> "PromptPairs":
        """The same prompts with the first answer and the first distractor of each set alone, for what reads one
        token."""
        first = {name: getattr(self, name) for name in ("answers", "distractors")}
        return replace(
            self,
            **{name: ids if ids.ndim == 1 else ids[:, 0] for name, ids in first.items()},
            teacher=None if self.teacher is None else self.teacher.first_members(),
        )

    @property
    def for_teacher(self) -> "PromptPairs":
        """These prompts in the teacher's tokens."""
        return self if self.teacher is None else self.teacher

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __repr__(self) -> str:
        named = ", ".join(name for name in self.positions if name != "all")
        source = "" if self.origin is None else f"; from {self.origin}"
        return f"PromptPairs: {len(self)} pairs of up to {self.clean.shape[1]} tokens; positions {named}{source}"

    def __getitem__(self, index: slice | Int[Tensor, " rows"]) -> "PromptPairs":
        """`pairs[:40]`: the pairs of some rows."""
        if not isinstance(index, slice | Tensor):
            raise InputError(f"pairs[{index!r}] is no selection of pairs; take a slice, such as pairs[:40].")
        return self.rows(index)

    def position(self, name: str) -> Bool[Tensor, "batch pos"]:
        """The mask of a named position, of several together (`last+labels`), or of all real tokens but some (`not
        last+labels`). Errors: `InputError` naming the known positions."""
        return position_mask(self.positions, name)

    def rows(self, index: slice | Int[Tensor, " rows"]) -> "PromptPairs":
        """The pairs of some rows."""
        return self._each(lambda tensor: tensor[index])

    def batches(self, size: int) -> Iterator["PromptPairs"]:
        """Consecutive batches of at most `size` pairs."""
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> "PromptPairs":
        """The same pairs on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PromptPairs":
        """The same change to every tensor; what is None stays None."""
        values = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("positions", "counterparts", "teacher", "origin")
        }
        tensors: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        teacher = None if self.teacher is None else self.teacher._each(change)
        other = self.counterparts
        return PromptPairs(
            **tensors,
            positions={name: change(mask) for name, mask in self.positions.items()},
            counterparts=other and Counterparts(mask=change(other.mask), index=change(other.index)),
            teacher=teacher,
            origin=self.origin,
        )

    def swapped(self) -> "PromptPairs":
        """Clean and corrupt exchanged, with the same answers: patching then puts clean into corrupt."""
        other = self.counterparts
        moved = {} if other is None else {name: other.moved(where) for name, where in self.positions.items()}
        return replace(
            self,
            clean=self.corrupt,
            corrupt=self.clean,
            mask=self.corrupt_mask,
            positions=self.positions if other is None else {**moved, "all": other.mask.clone()},
            counterparts=other and other.swapped(self.mask),
            teacher=None if self.teacher is None else self.teacher.swapped(),
        )

    def fingerprint(self) -> str:
        """SHA-256 over every token, mask, answer and position: the key of anything cached for these pairs."""
        named = [self.clean, self.corrupt, self.mask, self.answers, self.distractors]
        named += [self.positions[name] for name in sorted(self.positions)]
        named += [tensor for tensor in (self.answer_tokens, self.distractor_tokens) if tensor is not None]
        named += [] if self.counterparts is None else [self.counterparts.mask, self.counterparts.index]
        return storage.digest(
            "|".join(sorted(self.positions)),
            *(part for tensor in named for part in (str(tuple(tensor.shape)), tensor)),
            "" if self.teacher is None else self.teacher.fingerprint(),
            separator="",
        )

    def prompts(self) -> set[bytes]:
        """The clean prompts without their padding (and without answers after them), for checks of disjointness."""
        after = 0 if self.answer_tokens is None or ANSWERING not in self.positions else self.answer_tokens.shape[1] - 1
        width = self.clean.shape[1] - after
        rows = zip(self.clean[:, :width], self.mask[:, :width], strict=True)
        return {row[keep].cpu().numpy().tobytes() for row, keep in rows}


def refuse_overlap(reference: PromptPairs, evaluated: PromptPairs) -> None:
    """Raise `InputError` when a prompt of `reference` (calibration, mean ablation) is also among the evaluated ones."""
    shared = len(reference.prompts() & evaluated.prompts())
    if shared:
        raise InputError(
            f"{shared} of the {len(evaluated)} evaluated prompts are also reference prompts of the mean ablation; "
            "draw the reference from another split (calibration) than the evaluation (test)."
        )


def single_token(tokenizer: Any, text: str) -> int | None:
    """The id of a text that is exactly one known token, else None."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def single_token_words(tokenizer: Any, words: Iterable[str]) -> tuple[str, ...]:
    """Those of the words that are one token after a space."""
    return tuple(word for word in words if single_token(tokenizer, f" {word}") is not None)


def task_dataset(
    task: Task, tokenizer: Any, *, split: Split, scenes: int, seed: int, multi_token: bool = False
) -> Dataset:
    """The task's pairs as a `datasets.Dataset`, checked row by row against the tokenizer."""
    pairs = task.pairs(tokenizer, split=split, scenes=scenes, seed=seed)
    return to_dataset(enumerate(pairs, 1), tokenizer, source=f"{task.name} ({split})", multi_token=multi_token)


def load_pairs(
    source: str | Path | Dataset,
    tokenizer: Any,
    *,
    split: str = "train",
    multi_token: bool = False,
    skip_bad_rows: bool = False,
) -> Dataset:
    """A user's own pairs, checked row by row against the tokenizer.

    `source`: a JSONL file (UTF-8, one object a line), a CSV or Parquet file, a `datasets.Dataset`, or a hub id, with
    the columns clean, corrupt, answer, distractor and (optionally) positions, an object (JSON text in a CSV file) of
    name -> place. A place is a token's number without BOS (0 is the first; negative counts from the end, -1 is the
    last), a list of them, a piece of the clean prompt (meant is the last token of its last occurrence), or a list of
    character spans [[start, end], ...] of the clean prompt. `last` and `all` are always there. Also read where they
    are there: `corrupt_answer` and `facts`, as in `Pair`, and `corrupt_positions`: the same names in the corrupt
    prompt, for prompts of unequal length. An answer or a distractor may be a list of texts that are each one (a set).
    `skip_bad_rows` leaves bad rows out and logs how many and why; repeated prompts are logged by number.
    Errors: `InputError` listing all bad rows, counted from 1, with their reasons.
    """
    problems: list[RowError] = []
    pairs = numbered_pairs(source, split=split, problems=problems)
    copies = repeated(pairs)
    if copies:
        repeats = ", ".join(f"row {row} repeats row {first}" for row, first in copies[:MOST_SHOWN])
        log.warning("%s: %d clean prompts stand twice (%s)", named(source), len(copies), repeats)
    return to_dataset(
        pairs,
        tokenizer,
        source=named(source),
        multi_token=multi_token,
        problems=problems,
        skip_bad_rows=skip_bad_rows,
    )


def to_dataset(
    pairs: Iterable[tuple[int, Pair]],
    tokenizer: Any,
    *,
    source: str,
    multi_token: bool = False,
    problems: list[RowError] | None = None,
    skip_bad_rows: bool = False,
) -> Dataset:
    """Numbered pairs -> a `Dataset` with token positions (indices into the prompt without BOS).

    `multi_token` lets an answer or a distractor have several tokens, as long as their first ones differ. `problems`:
    rows that were bad before they came here; it takes up those that are bad here. Errors: `InputError` listing all bad
    rows, or (with `skip_bad_rows`) when none is left.
    """
    rows: list[dict[str, Any]] = []
    bad = [] if problems is None else problems
    for number, pair in pairs:
        try:
            row = checked_row(number, pair, tokenizer, multi_token=multi_token)
            _refuse_other_columns(number, row, rows[0] if rows else row)
            rows.append(row)
        except RowError as problem:
            bad.append(problem)
    if bad:
        error = bad_rows(bad, of=len(bad) + len(rows), source=source)
        if not skip_bad_rows or not rows:
            raise error
        log.warning("%s", error)
        log.warning("%s: %d rows are left out, %d are used", source, len(bad), len(rows))
    if not rows:
        raise InputError(f"{source} holds no pairs; give {FORM}.")
    rows = _alike(rows)
    return Dataset.from_list(rows, features=features_of(rows[0]))


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with lists in a column wherever one row has a list there."""
    sets = [column for column in SETS if any(isinstance(row[column], list) for row in rows)]
    lists = [{column: [row[column]] for column in sets if isinstance(row[column], str)} for row in rows]
    return [{**row, **more} for row, more in zip(rows, lists, strict=True)]


def _refuse_other_columns(number: int, row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    if row["positions"].keys() != first["positions"].keys():
        raise RowError(
            number,
            f"names the positions {sorted(row['positions'])}, the first good row {sorted(first['positions'])}; name "
            "the same in each.",
            "positions",
        )
    if row.keys() != first.keys() or set(row.get("facts", ())) != set(first.get("facts", ())):
        raise RowError(
            number,
            "has other columns or facts than the first good row; give `corrupt_answer`, `corrupt_positions` and "
            "`facts` in each or in none.",
        )


def features_of(row: Mapping[str, Any]) -> Features:
    """The columns of a dataset with rows like this one."""
    text = {
        name: List(Value("string")) if isinstance(row[name], list) else Value("string")
        for name in row
        if name not in (*PLACES, "facts")
    }
    positions = {
        column: {name: List(Value("int32")) for name in sorted(row[column])} for column in PLACES if column in row
    }
    facts = {"facts": {name: Value("int32") for name in sorted(row["facts"])}} if "facts" in row else {}
    return Features({**text, **facts, **positions})


def checked_row(number: int, pair: Pair, tokenizer: Any, *, multi_token: bool = False) -> dict[str, Any]:
    """A pair as a row with token positions. Errors: `RowError` with the row's number."""
    for column, texts in _texts(pair).items():
        for text in texts:
            refuse_broken_text(number, column, text, column)
    encoded = tokenizer(pair.clean, add_special_tokens=False, return_offsets_mapping=True)
    corrupt, *endings = read_endings(pair, tokenizer)
    length, other = len(encoded["input_ids"]), len(corrupt)
    if not length or not other:
        raise RowError(number, "a prompt is empty; write prompts that end where the answer should follow.", "clean")
    if length != other and pair.corrupt_positions is None:
        raise RowError(
            number,
            f"the clean prompt has {length} tokens, the corrupt one {other}; patching needs equal prompt lengths. "
            "Reword one (its named positions would be other tokens in the other prompt), name the positions in both "
            "(`corrupt_positions`), or leave such rows out.",
            "corrupt",
        )
    if length != other and multi_token:
        raise RowError(
            number,
            f"the clean prompt has {length} tokens, the corrupt one {other}; answers of several tokens "
            "(`multi_token`) need equal prompt lengths. Reword one, or choose answers of one token.",
            "corrupt",
        )
    if both := [word for word in pair.answers if word in pair.distractors]:
        raise RowError(
            number, f"answer and distractor are both {both[0]!r}; the distractor must be a wrong answer.", "distractor"
        )
    _refuse_unscorable(number, pair, tokenizer, encoded["input_ids"], endings, multi_token)
    try:
        places = positions_of_both(pair, tokenizer)
    except InputError as error:
        raise RowError(number, str(error), "positions") from None
    return {
        "clean": pair.clean,
        "corrupt": pair.corrupt,
        "answer": list(pair.answers) if pair.more_answers else pair.answer,
        "distractor": list(pair.distractors) if pair.more_distractors else pair.distractor,
        **({} if pair.corrupt_answer is None else {"corrupt_answer": pair.corrupt_answer}),
        **({} if pair.facts is None else {"facts": dict(pair.facts)}),
        **places,
    }


def positions_of_both(pair: Pair, tokenizer: Any) -> dict[str, dict[str, list[int]]]:
    """Column -> name -> token numbers, `last` among them; of the corrupt prompt only where it has positions of its own.
    Errors: `InputError` for a position that is none, and for names that do not say which tokens belong together."""
    places: dict[str, dict[str, list[int]]] = {}
    for column, side in PLACES.items():
        if side == "corrupt" and pair.corrupt_positions is None:
            continue
        encoded = tokenizer(getattr(pair, side), add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        places[column] = {**named_positions(pair, offsets, side), "last": [len(offsets) - 1]}
    if pair.corrupt_positions is not None:
        require_paired(places["positions"], places["corrupt_positions"])
    return places


def read_endings(pair: Pair, tokenizer: Any) -> list[list[int]]:
    """The tokens of: the corrupt prompt, all answers, all distractors, then the clean prompt with each of them."""
    words = [*pair.answers, *pair.distractors]
    texts = [pair.corrupt, *words, *(pair.clean + word for word in words)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _texts(pair: Pair) -> dict[str, tuple[str, ...]]:
    return {
        "clean": (pair.clean,),
        "corrupt": (pair.corrupt,),
        "answer": pair.answers,
        "distractor": pair.distractors,
    }


def _refuse_unscorable(
    number: int, pair: Pair, tokenizer: Any, prompt: list[int], endings: Sequence[list[int]], multi_token: bool
) -> None:
    """Answers of known tokens (of one, unless `multi_token`), which do not merge with the end of the prompt, and which
    differ in the first. `endings`: what `read_endings` gives after the corrupt prompt."""
    if multi_token and (pair.more_answers or pair.more_distractors):
        raise RowError(
            number,
            "a set of answers holds answers of one token; give one answer and one distractor, or leave "
            "`multi_token` out.",
            "answer" if pair.more_answers else "distractor",
        )
    named = [(column, word) for column in SETS for word in _texts(pair)[column]]
    first: dict[int, tuple[str, str]] = {}
    for (column, word), ids, whole in zip(named, endings[: len(named)], endings[len(named) :], strict=True):
        if not multi_token and (len(ids) != 1 or ids[0] == tokenizer.unk_token_id):
            wrong = "is unknown to this tokenizer" if len(ids) == 1 else f"has {len(ids)} tokens"
            raise RowError(
                number,
                f"the {column} {word!r} {wrong}; it must be one known token. Choose another word (mind the space "
                "before it), or set `multi_token`.",
                column,
            )
        if not ids or tokenizer.unk_token_id in ids:
            raise RowError(
                number,
                f"the {column} {word!r} is empty or has tokens unknown to this tokenizer. Choose another word.",
                column,
            )
        if whole != [*prompt, *ids]:
            raise RowError(
                number,
                f"the {column} {word!r} merges with the end of the prompt into other tokens. Mind the space between "
                "them.",
                column,
            )
        before = first.setdefault(ids[0], (column, word))
        if before[0] != column:
            raise RowError(
                number,
                f"answer {before[1]!r} and distractor {word!r} begin with the same token; choose another distractor.",
                "distractor",
            )
        if before[1] != word:
            raise RowError(number, f"the {column}s {before[1]!r} and {word!r} are one token; give it once.", column)
    for column in SETS:
        words = _texts(pair)[column]
        if len(set(words)) < len(words):
            raise RowError(number, f"column {column!r} names one of its words twice; give each once.", column)


def encode(
    dataset: Dataset,
    tokenizer: Any,
    *,
    padding_side: Literal["left", "right"] = "left",
    prepend_bos: bool = False,
    multi_token: bool = False,
) -> PromptPairs:
    """A checked dataset -> tensors. No token is added unless `prepend_bos` asks for it; shorter prompts are padded on
    `padding_side`.

    Sets of answers give [batch member], padded with -1. With `multi_token`, `answers` and `distractors` are first
    tokens, and `answer_tokens` and `distractor_tokens` hold them all.
    """
    if prepend_bos and tokenizer.bos_token_id is None:
        raise InputError("`prepend_bos` is set, but this tokenizer has no BOS token; set it to false.")
    lead = [tokenizer.bos_token_id] if prepend_bos else []
    clean = [lead + ids for ids in tokenizer(dataset["clean"][:], add_special_tokens=False)["input_ids"]]
    corrupt = [lead + ids for ids in tokenizer(dataset["corrupt"][:], add_special_tokens=False)["input_ids"]]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    places = dataset["positions"][:]
    named, tokens, mask = _padded(clean, places, len(lead), pad, padding_side)
    others = dataset["corrupt_positions"][:] if "corrupt_positions" in dataset.column_names else places
    counterparts = None
    if others == places and list(map(len, clean)) == list(map(len, corrupt)):
        _, other_tokens, _ = _padded(corrupt, places, len(lead), pad, padding_side)
    else:
        there, other_tokens, other_mask = _padded(corrupt, others, len(lead), pad, padding_side, not_as_wide_as=mask)
        counterparts = Counterparts.named(named, there, other_mask, mask.shape[1])
    positions = {name: torch.zeros_like(mask) for name in places[0]}
    for name, rows in named.items():
        for row, columns in enumerate(rows):
            positions[name][row, columns] = True
    both: dict[str, Any] = {
        "clean": tokens,
        "corrupt": other_tokens,
        "mask": mask,
        "positions": {**positions, "all": mask.clone()},
        "counterparts": counterparts,
    }
    answers, distractors = (dataset[column][:] for column in SETS)
    if not multi_token:
        return PromptPairs(**both, answers=_members(answers, tokenizer), distractors=_members(distractors, tokenizer))
    if any(isinstance(words[0], list) for words in (answers, distractors)):
        raise InputError("a set of answers holds answers of one token; encode these pairs without `multi_token`.")
    whole = [_continuations(words, tokenizer) for words in (answers, distractors)]
    return PromptPairs(
        **both,
        answers=whole[0][:, 0].clone(),
        distractors=whole[1][:, 0].clone(),
        answer_tokens=whole[0],
        distractor_tokens=whole[1],
    )


def _padded(
    prompts: list[list[int]],
    places: Sequence[Mapping[str, Sequence[int]]],
    lead: int,
    pad: int,
    side: Literal["left", "right"],
    not_as_wide_as: Tensor | None = None,
) -> tuple[dict[str, list[list[int]]], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """(name -> columns of each prompt, tokens, mask). `places`: token numbers without the `lead` tokens in front."""
    width = max(map(len, prompts))
    width += not_as_wide_as is not None and width == not_as_wide_as.shape[1]
    tokens, mask = torch.full((len(prompts), width), pad), torch.zeros(len(prompts), width, dtype=torch.bool)
    columns: dict[str, list[list[int]]] = {name: [] for name in places[0]}
    for row, ids in enumerate(prompts):
        start = width - len(ids) if side == "left" else 0
        mask[row, start : start + len(ids)] = True
        tokens[row, start : start + len(ids)] = torch.tensor(ids)
        for name, indices in places[row].items():
            columns[name].append([start + lead + index for index in indices])
    return columns, tokens, mask


def _members(words: list[Any], tokenizer: Any) -> Int[Tensor, "batch *member"]:
    """The token of each word; of lists of words [batch member], padded with -1, unless each holds one."""
    sets = [[word] if isinstance(word, str) else word for word in words]
    distinct = list(dict.fromkeys(word for members in sets for word in members))
    ids = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    for word, tokens in zip(distinct, ids, strict=True):
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            raise InputError(
                f"{word!r} is no single known token of this tokenizer; encode with `multi_token`, or choose another "
                "word."
            )
    token = {word: tokens[0] for word, tokens in zip(distinct, ids, strict=True)}
    width = max(map(len, sets))
    members = torch.tensor([[*map(token.__getitem__, row), *[-1] * (width - len(row))] for row in sets])
    return members[:, 0].clone() if width == 1 else members


def _continuations(words: list[str], tokenizer: Any) -> Int[Tensor, "batch token"]:
    """All tokens of each word, padded with -1."""
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    width = max(map(len, ids))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])
