"""What is wrong with a task? `check(task, tokenizer)` draws its prompts and names every fault it finds.

For a task of your own: write the class (docs/your_own_task.py is a template), run `workbench check-task NAME
--tokenizer PATH`, mend, repeat. A task without faults is sound in form. Whether it measures what you mean is yours to
judge: look at the shortcuts' accuracies, too.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from workbench.errors import InputError
from workbench.tasks.base import Pair, Split, Task, positions_of_both, read_endings
from workbench.tasks.positions import named_positions

FaultKind = Literal[
    "cannot draw",
    "not reproducible",
    "one sample for all seeds",
    "unequal lengths",
    "answer tokens",
    "answer is distractor",
    "clean is corrupt",
    "same answer",
    "ambiguous",
    "repeated prompt",
    "positions",
    "stage position",
    "leak",
    "unbalanced answers",
    "shortcut",
]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
MARGIN = 0.02
"""A rule may beat chance by so much."""
DEVIATIONS = 3.0
"""A rule beats chance where it does so by this many standard errors, too: a small sample raises no false alarm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong, and where it shows first."""

    kind: FaultKind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """What a check found."""

    task: str
    chance: float
    pairs: int
    """Pairs examined for shortcuts (of the train split)."""
    shortcuts: Mapping[str, float]
    """Rule -> its accuracy, to be held against `chance`."""
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    @property
    def kinds(self) -> set[str]:
        """The kinds of the faults."""
        return {fault.kind for fault in self.faults}

    def __str__(self) -> str:
        rules = "\n".join(f"  {accuracy:.3f}  {rule}" for rule, accuracy in self.shortcuts.items())
        wrong = "\n".join(f"  {fault.kind}: {fault.message}" for fault in self.faults) or "  none"
        return (
            f"{self.task}: {self.pairs} pairs, chance {self.chance:.3f}\naccuracy of "
            f"shortcuts\n{rules}\nfaults\n{wrong}"
        )


def check(task: Task, tokenizer: Any, *, scenes: int = 600, seed: int = 0, multi_token: bool = False) -> TaskReport:
    """All faults of a task with a tokenizer, each kind reported once for each place it can show. Draws `scenes` scenes
    of each split, twice.

    `multi_token` allows answers of several tokens. A task whose corrupt prompts are meant to have the clean answer says
    so with `keeps_answer = True`.
    """
    drawn: dict[Split, list[Pair]] = {}
    for split in SPLITS:
        try:
            drawn[split] = list(task.pairs(tokenizer, split=split, scenes=scenes, seed=seed))
        except InputError as error:
            return _failed(task, f"split {split}: {error}")
        if not drawn[split]:
            return _failed(task, f"split {split} holds no pairs.")
    train = drawn["train"]
    rules = shortcuts(train)
    faults = [
        *_reproducibility(task, tokenizer, drawn, scenes, seed),
        *(
            fault
            for split in SPLITS
            for fault in _rows(drawn[split], split, tokenizer, multi_token, getattr(task, "keeps_answer", False))
        ),
        *_stage_positions(task, train),
        *_leaks(drawn),
        *_beaten(rules, task.chance, len(train)),
    ]
    return TaskReport(task=task.name, chance=task.chance, pairs=len(train), shortcuts=rules, faults=tuple(faults))


def _failed(task: Task, message: str) -> TaskReport:
    return TaskReport(
        task=task.name, chance=task.chance, pairs=0, shortcuts={}, faults=(Fault(kind="cannot draw", message=message),)
    )


def _reproducibility(
    task: Task, tokenizer: Any, drawn: Mapping[Split, list[Pair]], scenes: int, seed: int
) -> Iterator[Fault]:
    for split in SPLITS:
        if _again(task, tokenizer, split, scenes, seed) != drawn[split]:
            yield Fault(
                kind="not reproducible",
                message=f"split {split}: the same seed gives other pairs; draw from `seeds.chooser(seed, ...)` alone.",
            )
    if _again(task, tokenizer, "train", scenes, seed + 1) == drawn["train"]:
        yield Fault(kind="one sample for all seeds", message="another seed gives the same pairs; use the seed.")


def _again(task: Task, tokenizer: Any, split: Split, scenes: int, seed: int) -> list[Pair] | None:
    """Another drawing; None where a task with few scenes gives fewer this time."""
    try:
        return list(task.pairs(tokenizer, split=split, scenes=scenes, seed=seed))
    except InputError:
        return None


def _rows(
    pairs: Sequence[Pair], split: Split, tokenizer: Any, multi_token: bool, keeps_answer: bool
) -> Iterator[Fault]:
    """Faults of single pairs: the first of each kind, with how many there are."""
    faults: dict[FaultKind, list[str]] = {}
    answers: dict[str, tuple[str, ...]] = {}
    for number, pair in enumerate(pairs):
        for kind, message in itertools.chain(
            _of_row(pair, tokenizer, multi_token, keeps_answer), _against_before(pair, answers)
        ):
            faults.setdefault(kind, []).append(f"split {split}, pair {number}: {message}")
        if pair.positions.keys() != pairs[0].positions.keys():
            names = sorted(pair.positions.keys() ^ pairs[0].positions.keys())
            faults.setdefault("positions", []).append(
                f"split {split}, pair {number}: positions {names} are in this pair or in the first, not in both"
            )
    for kind, messages in faults.items():
        yield Fault(kind=kind, message=messages[0] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""))


def _against_before(pair: Pair, answers: dict[str, tuple[str, ...]]) -> Iterator[tuple[FaultKind, str]]:
    if pair.clean not in answers:
        answers[pair.clean] = pair.answers
    elif set(answers[pair.clean]) == set(pair.answers):
        yield "repeated prompt", f"{pair.clean!r} came before"
    else:
        here, before = (", ".join(map(repr, words)) for words in (pair.answers, answers[pair.clean]))
        yield "ambiguous", f"{pair.clean!r} is answered {here} here and {before} before"


def _of_row(pair: Pair, tokenizer: Any, multi_token: bool, keeps_answer: bool) -> Iterator[tuple[FaultKind, str]]:
    encoded = tokenizer(pair.clean, add_special_tokens=False, return_offsets_mapping=True)
    clean, (corrupt, *endings) = encoded["input_ids"], read_endings(pair, tokenizer)
    if len(clean) != len(corrupt) and pair.corrupt_positions is None:
        yield "unequal lengths", f"the clean prompt has {len(clean)} tokens, the corrupt one {len(corrupt)}"
    if clean == corrupt:
        yield "clean is corrupt", f"both prompts are {pair.clean!r}"
    words = [*pair.answers, *pair.distractors]
    if both := [word for word in pair.answers if word in pair.distractors]:
        yield "answer is distractor", f"both are {both[0]!r}"
    if pair.corrupt_answer in pair.answers and not keeps_answer:
        yield "same answer", f"the corrupt prompt is answered {pair.corrupt_answer!r} too"
    for word, ids, whole in zip(words, endings[: len(words)], endings[len(words) :], strict=True):
        if not ids or tokenizer.unk_token_id in ids:
            yield "answer tokens", f"{word!r} is empty or has a token that is unknown to this tokenizer"
        elif not multi_token and len(ids) != 1:
            yield "answer tokens", f"{word!r} has {len(ids)} tokens, not one (allow several with `multi_token`)"
        elif whole != [*clean, *ids]:
            yield "answer tokens", f"{word!r} merges with the end of the prompt into other tokens"
    for name, where in pair.positions.items():
        try:
            named_positions(replace(pair, positions={name: where}), encoded["offset_mapping"])
        except InputError as error:
            yield "positions", str(error)
            return
    try:
        positions_of_both(pair, tokenizer)
    except InputError as error:
        yield "positions", str(error)


def _stage_positions(task: Task, pairs: Sequence[Pair]) -> Iterator[Fault]:
    known = {*pairs[0].positions, "last", "all"}
    for stage in task.stages:
        if stage.position not in known:
            yield Fault(
                kind="stage position",
                message=f"stage {stage.name} acts at {stage.position!r}; the pairs name {sorted(known)}",
            )


def _leaks(drawn: Mapping[Split, list[Pair]]) -> Iterator[Fault]:
    for one, other in itertools.combinations(SPLITS, 2):
        shared = {pair.clean for pair in drawn[one]} & {pair.clean for pair in drawn[other]}
        if shared:
            yield Fault(
                kind="leak",
                message=f"{len(shared)} clean prompt(s) of {other} are in {one} too, for example {min(shared)!r}",
            )
        mixed = {pair.clean for pair in drawn[one]} & {pair.corrupt for pair in drawn[other]}
        mixed |= {pair.corrupt for pair in drawn[one]} & {pair.clean for pair in drawn[other]}
        if mixed:
            yield Fault(
                kind="leak",
                message=f"{len(mixed)} prompt(s) are clean in {one} or {other} and corrupt in the other, for example "
                f"{min(mixed)!r}",
            )


def shortcuts(pairs: Sequence[Pair]) -> dict[str, float]:
    """Accuracy of rules that look at nothing but mentions: the first, last or most often mentioned candidate, each
    n-th, and any constant answer.

    A candidate is a word that is the answer of some pair and stands in the prompt.
    """
    answers = [{word.strip() for word in pair.answers} for pair in pairs]
    known = set().union(*answers)
    mentioned = [[word for word in re.findall(r"\w+|[^\w\s]", pair.clean) if word in known] for pair in pairs]
    constant, share = Counter(word for pair in pairs for word in map(str.strip, pair.answers)).most_common(1)[0]
    width = min(8, max(len(dict.fromkeys(words)) for words in mentioned))
    rules: dict[str, Callable[[list[str]], str | None]] = {
        "the first candidate mentioned": lambda words: words[0] if words else None,
        "the last candidate mentioned": lambda words: words[-1] if words else None,
        "the candidate mentioned most often (the first of several)": lambda words: (
            Counter(words).most_common(1)[0][0] if words else None
        ),
        "the candidate mentioned most often (the last of several)": lambda words: (
            Counter(words[::-1]).most_common(1)[0][0] if words else None
        ),
        **{f"candidate {place + 1} in the order of first mention": _nth(place) for place in range(1, width)},
    }
    accuracies = {
        name: sum(rule(words) in right for words, right in zip(mentioned, answers, strict=True)) / len(pairs)
        for name, rule in rules.items()
    }
    return {**accuracies, f"always {constant!r} (the most frequent answer)": share / len(pairs)}


def _nth(place: int) -> Callable[[list[str]], str | None]:
    def rule(words: list[str]) -> str | None:
        distinct = list(dict.fromkeys(words))
        return distinct[place] if place < len(distinct) else None

    return rule


def _beaten(rules: Mapping[str, float], chance: float, pairs: int) -> Iterator[Fault]:
    allowed = chance + max(MARGIN, DEVIATIONS * math.sqrt(chance * (1 - chance) / pairs))
    for rule, accuracy in rules.items():
        if accuracy > allowed:
            kind: FaultKind = "unbalanced answers" if rule.startswith("always") else "shortcut"
            yield Fault(
                kind=kind,
                message=f"{rule} is right in {accuracy:.3f} of {pairs} prompts; chance is {chance:.3f} (allowed: "
                f"{allowed:.3f})",
            )
