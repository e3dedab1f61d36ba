"""Teacher and student with different tokenizers: both read the same texts, each in its own tokens.

A token's number means another word to the other model, and a token's place in a prompt another place. What they share
is text: words that are one token for both, and positions named as pieces of it. `PromptPairs.teacher` holds the
teacher's reading beside the student's, row by row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from workbench.errors import InputError
from workbench.tasks.base import PromptPairs, checked_row, single_token
from workbench.tasks.pairs import Pair
from workbench.tasks.positions import RESERVED, by_index
from workbench.tasks.prompts import PromptSettings
from workbench.tasks.records import RowError
from workbench.values.refs import Position


class SharedWords:
    """Stands in for a tokenizer where a task chooses its words (`single_token_words`): a text is one token only if it
    is for each tokenizer."""

    unk_token_id = None

    def __init__(self, *tokenizers: Any) -> None:
        self.tokenizers = tokenizers

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """The most tokens that a tokenizer makes of the text; none where that is one which another does not know."""
        longest = max((tokenizer(text, **options)["input_ids"] for tokenizer in self.tokenizers), key=len)
        known = all(single_token(tokenizer, text) is not None for tokenizer in self.tokenizers)
        return {"input_ids": longest if known or len(longest) > 1 else []}


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether two tokenizers give the same words the same numbers. A model without one is taken to read as the other
    does."""
    return first is None or second is None or first.get_vocab() == second.get_vocab()


def read_by_both(
    pairs: Iterable[tuple[int, Pair]],
    student: Any,
    teacher: Any,
    *,
    source: str,
    settings: PromptSettings | None = None,
    problems: list[RowError] | None = None,
    skip_bad_rows: bool = False,
) -> PromptPairs:
    """Numbered pairs in the tokens of the student's tokenizer, with the same in the teacher's beside them.

    `problems`, `skip_bad_rows`: as in `to_dataset`; a row is left out where one of them can't read it. Errors:
    `InputError` for positions given as token indices, and for what one of the tokenizers can't read.
    """
    settings, readers = settings or PromptSettings(), (student, teacher)
    bad, good = [] if problems is None else problems, list[tuple[int, Pair]]()
    for number, pair in pairs:
        try:
            refuse_token_indices(number, pair)
            for tokenizer in readers:
                _refuse_unreadable(number, pair, tokenizer, settings)
            good.append((number, pair))
        except RowError as problem:
            bad.append(problem)
    first = settings.dataset(good, student, source=source, problems=bad, skip_bad_rows=skip_bad_rows)
    second = settings.dataset(good, teacher, source=source)
    return replace(settings.encode(first, student), teacher=settings.encode(second, teacher))


def _refuse_unreadable(number: int, pair: Pair, tokenizer: Any, settings: PromptSettings) -> None:
    """Errors: `RowError` for a row that a tokenizer can't read."""
    try:
        refuse_unknown_words(pair, tokenizer)
    except InputError as error:
        raise RowError(number, str(error)) from None
    for _, wrapped in settings.wrapped([(number, pair)], tokenizer):
        checked_row(number, wrapped, tokenizer, multi_token=settings.multi_token)


def refuse_token_indices(number: int, pair: Pair) -> None:
    """Refuse positions that are the numbers of tokens, which are other words in other tokens. `last` and `all` mean the
    same in any."""
    sides = {"clean": pair.positions, "corrupt": pair.corrupt_positions or {}}
    try:
        numbered = [(name, side) for side in sides for name in by_index(sides[side]) if name not in RESERVED]
    except InputError as error:
        raise RowError(number, str(error)) from None
    if numbered:
        name, side = numbered[0]
        raise RowError(
            number,
            f"position {name!r} is given by token index, but the models have different tokenizers; give a piece "
            f"of the {side} prompt.",
            "positions" if side == "clean" else "corrupt_positions",
        )


def refuse_unknown_words(pair: Pair, tokenizer: Any) -> None:
    """A word-level tokenizer turns what it does not know into one token for all; refuse such prompts and name the
    words."""
    for name in ("clean", "corrupt"):
        text = getattr(pair, name)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not encoded["input_ids"]:
            raise InputError(f"the {name} prompt is empty; write a prompt that ends where the answer should follow.")
        unknown = tokenizer.unk_token_id
        words = [
            text[start:end].strip()
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if unknown is not None and token == unknown
        ]
        if words:
            raise InputError(
                f"this model's tokenizer does not know {', '.join(map(repr, dict.fromkeys(words)))} in the {name} "
                "prompt; use other words."
            )


def require_same_words(prompts: PromptPairs, student: Sequence[Position], teacher: Sequence[Position]) -> None:
    """Refuse unknown positions, and those that are not the same words in two readings: all of a prompt, or words of
    more tokens in one."""
    ours, theirs = (
        torch.stack([side.position(name) for name in names]).any(0).sum(1)
        for side, names in ((prompts, student), (prompts.for_teacher, teacher))
    )
    if prompts.teacher is None:
        return
    remedy = "set alignment.positions to a position of one token in both, such as last"
    if "all" in (*student, *teacher):
        raise InputError(
            "the models have different tokenizers, so the tokens of a whole prompt do not belong together one by one; "
            f"{remedy}."
        )
    if not torch.equal(ours, theirs):
        raise InputError(
            f"position {' + '.join(student)} of the student and {' + '.join(teacher)} of the teacher are different "
            "numbers of tokens in their "
            f"tokenizers; {remedy}."
        )


def require_readings(prompts: PromptPairs, student: Any, teacher: Any) -> None:
    """Refuse prompts in the tokens of one tokenizer for models that have two (given here)."""
    if prompts.teacher is None and not same_vocabulary(student, teacher):
        raise InputError(
            "the models have different tokenizers, and these prompts are in the tokens of one; encode them with "
            "`workbench.tasks.tokenizers.read_by_both`."
        )
