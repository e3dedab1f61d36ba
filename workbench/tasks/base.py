"""What a task is, and how its pairs of prompts become tensors.

The road: `Task.pairs` (text) -> `to_dataset` (checked row by row against a tokenizer) -> `encode` (`PromptPairs`, tensors).
A user's own pairs enter at `load_pairs` and travel the same road.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from datasets import Dataset, Features, List, Value, load_dataset
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import InputError, nearest

Split = Literal["train", "calibration", "test"]
Span = tuple[int, int]
"""Characters [start, end) of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One clean prompt, its corrupt counterpart of equal length, the right answer, a wrong one, and named positions in both."""

    clean: str
    corrupt: str
    answer: str
    distractor: str
    positions: Mapping[str, Any]
    """Name -> token indices (an int or several; negative counts from the end), character spans, or a piece of the clean text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A group of heads in a backward search: where its heads act and whose input they write to.

    `into=None` means the logits; otherwise `composition` says which input (q, k or v) of the heads of group `into` receives.
    """

    name: str
    title: str
    position: str
    into: str | None = None
    composition: Literal["q", "k", "v"] | None = None

    def __post_init__(self) -> None:
        if (self.into is None) != (self.composition is None):
            raise InputError(f"stage {self.name!r}: `into` and `composition` go together (both, or neither for the logits).")


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
    """A batch of tokenised pairs. Clean and corrupt have the same length row by row, so one mask and one set of positions serve both."""

    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True on real tokens, False on padding."""
    answers: Int[Tensor, " batch"]
    distractors: Int[Tensor, " batch"]
    positions: Mapping[str, Bool[Tensor, "batch pos"]]
    """Name -> the tokens it stands for; `last` (the last real token) and `all` (every real token) are always there."""

    def __len__(self) -> int:
        return self.clean.shape[0]

    def position(self, name: str) -> Bool[Tensor, "batch pos"]:
        """The mask of a named position. Errors: `InputError` naming the known positions."""
        if name not in self.positions:
            raise InputError(f"these prompts have no position {name!r}; {nearest(name, self.positions)}")
        return self.positions[name]

    def rows(self, index: slice | Int[Tensor, " rows"]) -> "PromptPairs":
        """The pairs of some rows."""
        tensors = {field.name: getattr(self, field.name)[index] for field in fields(self) if field.name != "positions"}
        return PromptPairs(**tensors, positions={name: mask[index] for name, mask in self.positions.items()})

    def batches(self, size: int) -> Iterator["PromptPairs"]:
        """Consecutive batches of at most `size` pairs."""
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> "PromptPairs":
        """The same pairs on another device."""
        tensors = {field.name: getattr(self, field.name).to(device) for field in fields(self) if field.name != "positions"}
        return PromptPairs(**tensors, positions={name: mask.to(device) for name, mask in self.positions.items()})

    def swapped(self) -> "PromptPairs":
        """Clean and corrupt exchanged, with the same answers: patching then puts clean into corrupt."""
        return replace(self, clean=self.corrupt, corrupt=self.clean)

    def fingerprint(self) -> str:
        """SHA-256 over every token, mask, answer and position: the key of anything cached for these pairs."""
        digest = hashlib.sha256()
        named = [self.clean, self.corrupt, self.mask, self.answers, self.distractors]
        named += [self.positions[name] for name in sorted(self.positions)]
        digest.update("|".join(sorted(self.positions)).encode())
        for tensor in named:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

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


def task_dataset(task: Task, tokenizer: Any, *, split: Split, scenes: int, seed: int) -> Dataset:
    """The task's pairs as a `datasets.Dataset`, checked row by row against the tokenizer."""
    return to_dataset(enumerate(task.pairs(tokenizer, split=split, scenes=scenes, seed=seed)), tokenizer, source=f"{task.name} ({split})")


def load_pairs(source: str | Path | Dataset, tokenizer: Any, *, split: str = "train") -> Dataset:
    """A user's own pairs, checked row by row against the tokenizer.

    `source`: a JSONL file, a CSV or Parquet file, a `datasets.Dataset`, or a hub id, with the columns clean, corrupt, answer, distractor and
    (optionally) positions: name -> token index without BOS (negative counts from the end), several of them, or a piece of the
    clean prompt (its last token counts). Errors: `InputError` with the row's number.
    """
    return to_dataset(_rows(source, split), tokenizer, source=str(source) if not isinstance(source, Dataset) else "the dataset")


def _rows(source: str | Path | Dataset, split: str) -> Iterator[tuple[int, Pair]]:
    if isinstance(source, Dataset):
        records: Iterable[tuple[int, Any]] = enumerate(source)
    elif str(source).endswith((".jsonl", ".json")):
        records = _json_lines(Path(source))
    elif str(source).endswith((".csv", ".parquet")):
        kind = "csv" if str(source).endswith(".csv") else "parquet"
        records = enumerate(load_dataset(kind, data_files=str(source), split="train"))
    else:
        records = enumerate(load_dataset(str(source), split=split))
    return ((number, _pair(number, record)) for number, record in records)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a JSONL file with one pair a line (clean, corrupt, answer, distractor, positions).")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"row {number} of {path} is not JSON ({error}); write one object a line.") from None


def _pair(number: int, record: Any) -> Pair:
    if not isinstance(record, Mapping):
        raise InputError(f"row {number} is not an object with columns clean, corrupt, answer, distractor.")
    for column in ("clean", "corrupt", "answer", "distractor"):
        if not isinstance(record.get(column), str):
            raise InputError(f"row {number} has no text in column {column!r}; {nearest(column, record)}")
    positions = record.get("positions") or {}
    if isinstance(positions, str):
        positions = json.loads(positions)
    return Pair(**{name: record[name] for name in ("clean", "corrupt", "answer", "distractor")}, positions=dict(positions))


def to_dataset(pairs: Iterable[tuple[int, Pair]], tokenizer: Any, *, source: str) -> Dataset:
    """Numbered pairs -> a `Dataset` with token positions (indices into the prompt without BOS). Errors: `InputError` with the row's number."""
    rows = [_checked_row(number, pair, tokenizer) for number, pair in pairs]
    if not rows:
        raise InputError(f"{source} holds no pairs.")
    names = set(rows[0]["positions"])
    for number, row in enumerate(rows):
        if set(row["positions"]) != names:
            raise InputError(
                f"row {number} of {source} names the positions {sorted(row['positions'])}, the first row {sorted(names)}; name the same in each."
            )
    text = dict.fromkeys(("clean", "corrupt", "answer", "distractor"), Value("string"))
    positions = {name: List(Value("int32")) for name in sorted(names)}
    return Dataset.from_list(rows, features=Features({**text, "positions": positions}))


def _checked_row(number: int, pair: Pair, tokenizer: Any) -> dict[str, Any]:
    encoded = tokenizer(pair.clean, add_special_tokens=False, return_offsets_mapping=True)
    length, other = len(encoded["input_ids"]), len(tokenizer(pair.corrupt, add_special_tokens=False)["input_ids"])
    if length != other:
        raise InputError(
            f"row {number}: the clean prompt has {length} tokens, the corrupt one {other}; patching needs equal prompt lengths. Reword one."
        )
    for column in ("answer", "distractor"):
        word = getattr(pair, column)
        if single_token(tokenizer, word) is None:
            count = len(tokenizer(word, add_special_tokens=False)["input_ids"])
            raise InputError(
                f"row {number}: the {column} {word!r} is {count} token(s) or unknown to this tokenizer; it must be one known token. Choose another word (mind the space before it)."
            )
    if pair.answer == pair.distractor:
        raise InputError(f"row {number}: answer and distractor are both {pair.answer!r}; the distractor must be a wrong answer.")
    positions = {name: _token_indices(number, name, where, pair.clean, encoded["offset_mapping"]) for name, where in pair.positions.items()}
    return {
        "clean": pair.clean,
        "corrupt": pair.corrupt,
        "answer": pair.answer,
        "distractor": pair.distractor,
        "positions": {**positions, "last": [length - 1]},
    }


def _token_indices(number: int, name: str, where: Any, text: str, offsets: list[Span]) -> list[int]:
    if isinstance(where, str):
        start = text.rfind(where)
        if start < 0:
            raise InputError(f"row {number}: position {name!r} is {where!r}, which the clean prompt does not contain.")
        return [_covering(offsets, start, start + len(where))[-1]]
    entries = [where] if isinstance(where, int) else list(where)
    found = sorted(
        {index for entry in entries for index in (_covering(offsets, *entry) if isinstance(entry, tuple) else [entry + len(offsets) * (entry < 0)])}
    )
    if not found or not all(0 <= index < len(offsets) for index in found):
        raise InputError(f"row {number}: position {name!r} ({where!r}) is outside the {len(offsets)} tokens of the prompt.")
    return found


def _covering(offsets: list[Span], start: int, end: int) -> list[int]:
    """The tokens that overlap the characters [start, end)."""
    return [index for index, (first, last) in enumerate(offsets) if first < end and last > start]


def encode(dataset: Dataset, tokenizer: Any, *, padding_side: Literal["left", "right"] = "left", prepend_bos: bool = False) -> PromptPairs:
    """A checked dataset -> tensors. No token is added unless `prepend_bos` asks for it; shorter prompts are padded on `padding_side`."""
    if prepend_bos and tokenizer.bos_token_id is None:
        raise InputError("`prepend_bos` is set, but this tokenizer has no BOS token; set it to false.")
    lead = [tokenizer.bos_token_id] if prepend_bos else []
    clean = [lead + ids for ids in tokenizer(dataset["clean"][:], add_special_tokens=False)["input_ids"]]
    corrupt = [lead + ids for ids in tokenizer(dataset["corrupt"][:], add_special_tokens=False)["input_ids"]]
    width = max(map(len, clean))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    starts = [width - len(ids) if padding_side == "left" else 0 for ids in clean]
    mask = torch.zeros(len(clean), width, dtype=torch.bool)
    tokens = {name: torch.full((len(clean), width), pad) for name in ("clean", "corrupt")}
    places = dataset["positions"][:]
    positions = {name: torch.zeros_like(mask) for name in places[0]}
    for row, start in enumerate(starts):
        real = slice(start, start + len(clean[row]))
        mask[row, real] = True
        tokens["clean"][row, real] = torch.tensor(clean[row])
        tokens["corrupt"][row, real] = torch.tensor(corrupt[row])
        for name, indices in places[row].items():
            positions[name][row, [start + len(lead) + index for index in indices]] = True
    answers, distractors = ([single_token(tokenizer, word) for word in dataset[column]] for column in ("answer", "distractor"))
    return PromptPairs(
        **tokens, mask=mask, answers=torch.tensor(answers), distractors=torch.tensor(distractors), positions={**positions, "all": mask.clone()}
    )
