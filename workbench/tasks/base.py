"""What a task is, and how its pairs of prompts become tensors.

The road: `Task.pairs` (text) -> `to_dataset` (checked row by row against a tokenizer) -> `encode` (`PromptPairs`,
tensors). A user's own pairs enter at `load_pairs` and travel the same road.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from datasets import Dataset, Features, List, Value
from jaxtyping import Bool, Int
from torch import Tensor

from workbench import storage
from workbench.errors import InputError, nearest
from workbench.tasks.pairs import Pair, Span, Split, numbered_pairs
from workbench.tasks.stages import Stage


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

    def __str__(self) -> str:
        return self.name if self.split is None else f"{self.name}, {self.split} split"


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
    positions serve both."""

    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True on real tokens, False on padding."""
    answers: Int[Tensor, " batch"]
    distractors: Int[Tensor, " batch"]
    positions: Mapping[str, Bool[Tensor, "batch pos"]]
    """Name -> the tokens it stands for; `last` (the last real token) and `all` (every real token) are always there."""
    answer_tokens: Int[Tensor, "batch token"] | None = None
    """With answers of several tokens: all tokens of each answer, padded with -1 (`answers` holds the first); see
    `workbench.tasks.scoring`."""
    distractor_tokens: Int[Tensor, "batch wrong"] | None = None
    """The same of each distractor."""
    teacher: "PromptPairs | None" = None
    """Where the teacher has another tokenizer: its reading of the same prompts, row by row
    (`workbench.tasks.tokenizers`)."""
    origin: Origin | None = None
    """Where they come from, if that is known. It is no part of the fingerprint: the same tokens are the same pairs."""

    def __post_init__(self) -> None:
        if self.teacher is not None and (
            len(self.teacher) != len(self) or self.teacher.positions.keys() != self.positions.keys()
        ):
            raise InputError(
                "the teacher's reading holds other prompts or names other positions; encode the same pairs for both."
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
        if name.startswith("not "):
            return self.positions["all"] & ~self.position(name.removeprefix("not "))
        if "+" in name and name not in self.positions:
            return torch.stack([self.position(part) for part in name.split("+")]).any(0)
        if name not in self.positions:
            raise InputError(f"these prompts have no position {name!r}; {nearest(name, self.positions)}")
        return self.positions[name]

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
            if field.name not in ("positions", "teacher", "origin")
        }
        tensors: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        teacher = None if self.teacher is None else self.teacher._each(change)
        return PromptPairs(
            **tensors,
            positions={name: change(mask) for name, mask in self.positions.items()},
            teacher=teacher,
            origin=self.origin,
        )

    def swapped(self) -> "PromptPairs":
        """Clean and corrupt exchanged, with the same answers: patching then puts clean into corrupt."""
        return replace(
            self,
            clean=self.corrupt,
            corrupt=self.clean,
            teacher=None if self.teacher is None else self.teacher.swapped(),
        )

    def fingerprint(self) -> str:
        """SHA-256 over every token, mask, answer and position: the key of anything cached for these pairs."""
        named = [self.clean, self.corrupt, self.mask, self.answers, self.distractors]
        named += [self.positions[name] for name in sorted(self.positions)]
        named += [tensor for tensor in (self.answer_tokens, self.distractor_tokens) if tensor is not None]
        return storage.digest(
            "|".join(sorted(self.positions)),
            *(part for tensor in named for part in (str(tuple(tensor.shape)), tensor)),
            "" if self.teacher is None else self.teacher.fingerprint(),
            separator="",
        )

    def prompts(self) -> set[bytes]:
        """The clean prompts without their padding, for checks of disjointness."""
        return {row[keep].cpu().numpy().tobytes() for row, keep in zip(self.clean, self.mask, strict=True)}


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
    return to_dataset(enumerate(pairs), tokenizer, source=f"{task.name} ({split})", multi_token=multi_token)


def load_pairs(
    source: str | Path | Dataset, tokenizer: Any, *, split: str = "train", multi_token: bool = False
) -> Dataset:
    """A user's own pairs, checked row by row against the tokenizer.

    `source`: a JSONL file, a CSV or Parquet file, a `datasets.Dataset`, or a hub id, with the columns clean, corrupt,
    answer, distractor and (optionally) positions: name -> token index without BOS (negative counts from the end),
    several of them, or a piece of the clean prompt (its last token counts). Also read where they are there:
    `corrupt_answer` and `facts`, as in `Pair`. Errors: `InputError` with the row's number.
    """
    named = str(source) if not isinstance(source, Dataset) else "the dataset"
    return to_dataset(numbered_pairs(source, split=split), tokenizer, source=named, multi_token=multi_token)


def to_dataset(pairs: Iterable[tuple[int, Pair]], tokenizer: Any, *, source: str, multi_token: bool = False) -> Dataset:
    """Numbered pairs -> a `Dataset` with token positions (indices into the prompt without BOS).

    `multi_token` lets an answer or a distractor have several tokens, as long as their first ones differ. Errors:
    `InputError` with the row's number.
    """
    rows = [checked_row(number, pair, tokenizer, multi_token=multi_token) for number, pair in pairs]
    if not rows:
        raise InputError(f"{source} holds no pairs.")
    names = set(rows[0]["positions"])
    for number, row in enumerate(rows):
        if set(row["positions"]) != names:
            raise InputError(
                f"row {number} of {source} names the positions {sorted(row['positions'])}, the first row "
                f"{sorted(names)}; name the same in each."
            )
        if row.keys() != rows[0].keys() or set(row.get("facts", ())) != set(rows[0].get("facts", ())):
            raise InputError(
                f"row {number} of {source} has other columns or facts than the first row; give `corrupt_answer` and "
                "`facts` in each or in none."
            )
    return Dataset.from_list(rows, features=features_of(rows[0]))


def features_of(row: Mapping[str, Any]) -> Features:
    """The columns of a dataset with rows like this one."""
    text = {name: Value("string") for name in row if name not in ("positions", "facts")}
    positions = {name: List(Value("int32")) for name in sorted(row["positions"])}
    facts = {"facts": {name: Value("int32") for name in sorted(row["facts"])}} if "facts" in row else {}
    return Features({**text, **facts, "positions": positions})


def checked_row(number: int, pair: Pair, tokenizer: Any, *, multi_token: bool = False) -> dict[str, Any]:
    """A pair as a row with token positions. Errors: `InputError` with the row's number."""
    encoded = tokenizer(pair.clean, add_special_tokens=False, return_offsets_mapping=True)
    length, other = len(encoded["input_ids"]), len(tokenizer(pair.corrupt, add_special_tokens=False)["input_ids"])
    if length != other:
        raise InputError(
            f"row {number}: the clean prompt has {length} tokens, the corrupt one {other}; patching needs equal prompt "
            "lengths. Reword one."
        )
    for column in ("answer", "distractor"):
        word = getattr(pair, column)
        if not multi_token and single_token(tokenizer, word) is None:
            count = len(tokenizer(word, add_special_tokens=False)["input_ids"])
            raise InputError(
                f"row {number}: the {column} {word!r} is {count} token(s) or unknown to this tokenizer; it must be one "
                "known token. Choose another word (mind the space before it)."
            )
    if pair.answer == pair.distractor:
        raise InputError(
            f"row {number}: answer and distractor are both {pair.answer!r}; the distractor must be a wrong answer."
        )
    if multi_token:
        _refuse_unscorable(number, pair, tokenizer, encoded["input_ids"])
    positions = {
        name: token_indices(number, name, where, pair.clean, encoded["offset_mapping"])
        for name, where in pair.positions.items()
    }
    return {
        "clean": pair.clean,
        "corrupt": pair.corrupt,
        "answer": pair.answer,
        "distractor": pair.distractor,
        **({} if pair.corrupt_answer is None else {"corrupt_answer": pair.corrupt_answer}),
        **({} if pair.facts is None else {"facts": dict(pair.facts)}),
        "positions": {**positions, "last": [length - 1]},
    }


def _refuse_unscorable(number: int, pair: Pair, tokenizer: Any, prompt: list[int]) -> None:
    """Answers of several tokens: known ones, which do not merge with the end of the prompt, and which differ in the
    first."""
    first = {}
    for column in ("answer", "distractor"):
        word = getattr(pair, column)
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if not ids or tokenizer.unk_token_id in ids:
            raise InputError(
                f"row {number}: the {column} {word!r} is empty or has tokens unknown to this tokenizer. Choose another "
                "word."
            )
        if tokenizer(pair.clean + word, add_special_tokens=False)["input_ids"] != [*prompt, *ids]:
            raise InputError(
                f"row {number}: the {column} {word!r} merges with the end of the prompt into other tokens. Mind the "
                "space between them."
            )
        first[column] = ids[0]
    if first["answer"] == first["distractor"]:
        raise InputError(
            f"row {number}: answer {pair.answer!r} and distractor {pair.distractor!r} begin with the same token; "
            "choose another distractor."
        )


def token_indices(number: int, name: str, where: Any, text: str, offsets: list[Span]) -> list[int]:
    """Where a named position is, as token indices. Errors: `InputError` with the row's number where it is missing or
    out of range."""
    if isinstance(where, str):
        start = text.rfind(where)
        if start < 0:
            raise InputError(f"row {number}: position {name!r} is {where!r}, which the clean prompt does not contain.")
        return [_covering(offsets, start, start + len(where))[-1]]
    entries = [where] if isinstance(where, int) else list(where)
    found = sorted(
        {
            index
            for entry in entries
            for index in (
                _covering(offsets, *entry) if isinstance(entry, tuple) else [entry + len(offsets) * (entry < 0)]
            )
        }
    )
    if not found or not all(0 <= index < len(offsets) for index in found):
        raise InputError(
            f"row {number}: position {name!r} ({where!r}) is outside the {len(offsets)} tokens of the prompt."
        )
    return found


def _covering(offsets: list[Span], start: int, end: int) -> list[int]:
    """The tokens that overlap the characters [start, end)."""
    return [index for index, (first, last) in enumerate(offsets) if first < end and last > start]


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

    With `multi_token`, `answers` and `distractors` are first tokens, and `answer_tokens` and `distractor_tokens` hold
    them all.
    """
    if prepend_bos and tokenizer.bos_token_id is None:
        raise InputError("`prepend_bos` is set, but this tokenizer has no BOS token; set it to false.")
    lead = [tokenizer.bos_token_id] if prepend_bos else []
    clean = [lead + ids for ids in tokenizer(dataset["clean"][:], add_special_tokens=False)["input_ids"]]
    corrupt = [lead + ids for ids in tokenizer(dataset["corrupt"][:], add_special_tokens=False)["input_ids"]]
    width = max(map(len, clean))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    starts = [width - len(ids) if padding_side == "left" else 0 for ids in clean]
    mask = torch.zeros(len(clean), width, dtype=torch.bool)
    tokens: dict[str, Any] = {name: torch.full((len(clean), width), pad) for name in ("clean", "corrupt")}
    places = dataset["positions"][:]
    positions = {name: torch.zeros_like(mask) for name in places[0]}
    for row, start in enumerate(starts):
        real = slice(start, start + len(clean[row]))
        mask[row, real] = True
        tokens["clean"][row, real] = torch.tensor(clean[row])
        tokens["corrupt"][row, real] = torch.tensor(corrupt[row])
        for name, indices in places[row].items():
            positions[name][row, [start + len(lead) + index for index in indices]] = True
    if not multi_token:
        _refuse_several_tokens(dataset, tokenizer)
    whole: dict[str, Any] = {
        "answer_tokens": _continuations(dataset["answer"][:], tokenizer),
        "distractor_tokens": _continuations(dataset["distractor"][:], tokenizer),
    }
    return PromptPairs(
        **tokens,
        mask=mask,
        answers=whole["answer_tokens"][:, 0].clone(),
        distractors=whole["distractor_tokens"][:, 0].clone(),
        positions={**positions, "all": mask.clone()},
        **(whole if multi_token else {}),
    )


def _refuse_several_tokens(dataset: Dataset, tokenizer: Any) -> None:
    long = [
        word
        for column in ("answer", "distractor")
        for word in dataset.unique(column)
        if single_token(tokenizer, word) is None
    ]
    if long:
        raise InputError(
            f"{long[0]!r} is no single known token of this tokenizer; encode with `multi_token`, or choose another "
            "word."
        )


def _continuations(words: list[str], tokenizer: Any) -> Int[Tensor, "batch token"]:
    """All tokens of each word, padded with -1."""
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    width = max(map(len, ids))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])
