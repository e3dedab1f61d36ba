"""Named positions of a prompt as the numbers of its tokens.

A position is a token's number (negative counts from the end), several of them, character spans [start, end), or a
piece of the prompt: meant is the last token of its last occurrence. `last` and `all` are always there and mean the last
token and every token; whoever names them must mean that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.errors import InputError, nearest
from workbench.tasks.pairs import Pair, Span

RESERVED = ("last", "all")
ANSWERING = "answering"
"""The tokens that an answer's tokens are read from: of prompts by themselves the last, of prompts with their answers
(`workbench.tasks.forcing`) one for each of the answer's tokens."""
REMEDY = (
    "give a token's number (0 is the first, -1 the last), a list of them, a piece of the clean prompt (its last token "
    "counts, where it stands last), or character spans [[start, end], ...]"
)


def position_mask(positions: Mapping[str, Bool[Tensor, "batch pos"]], name: str) -> Bool[Tensor, "batch pos"]:
    """The mask of a named position, of several together (`last+labels`), or of all real tokens but some (`not
    last+labels`). Errors: `InputError` naming the known positions."""
    if name.startswith("not "):
        return positions["all"] & ~position_mask(positions, name.removeprefix("not "))
    if "+" in name and name not in positions:
        return torch.stack([position_mask(positions, part) for part in name.split("+")]).any(0)
    if name == ANSWERING and name not in positions:
        return positions["last"]
    if name not in positions:
        raise InputError(f"these prompts have no position {name!r}; {nearest(name, positions)}")
    return positions[name]


def named_positions(
    pair: Pair, offsets: Sequence[Span], side: Literal["clean", "corrupt"] = "clean"
) -> dict[str, list[int]]:
    """Name -> token numbers of one of the prompts, without `last` and `all`. Errors: `InputError` for a position that
    is none, or a reserved name for something else."""
    named, text = (pair.positions, pair.clean) if side == "clean" else (pair.corrupt_positions or {}, pair.corrupt)
    places = {name: token_indices(name, where, text, offsets, side) for name, where in named.items()}
    meant = {"last": [len(offsets) - 1], "all": list(range(len(offsets)))}
    for name in RESERVED:
        if places.get(name, meant[name]) != meant[name]:
            raise InputError(
                f"position {name!r} is {named[name]!r:.60}, but {name!r} always means "
                f"{'the last token' if name == 'last' else 'every token'}; leave it out, or choose another name."
            )
    return {name: tokens for name, tokens in places.items() if name not in RESERVED}


def token_indices(
    name: str, where: Any, text: str, offsets: Sequence[Span], side: Literal["clean", "corrupt"] = "clean"
) -> list[int]:
    """Where a named position is, as token indices in order. Errors: `InputError` where it is missing, out of range, or
    no position at all."""
    if isinstance(where, str):
        return [_piece(name, where, text, offsets, side)[-1]]
    indices: set[int] = set()
    for entry in entries_of(name, where):
        if isinstance(entry, int):
            indices.add(entry + len(offsets) * (entry < 0))
            continue
        if not 0 <= entry[0] < entry[1] <= len(text):
            raise InputError(
                f"position {name!r} has the characters {list(entry)}, outside the {len(text)} characters of the prompt."
            )
        indices.update(covering(offsets, *entry) or [-1])
    if not indices or not all(0 <= index < len(offsets) for index in indices):
        raise InputError(f"position {name!r} ({where!r:.60}) is outside the {len(offsets)} tokens of the prompt.")
    return sorted(indices)


def entries_of(name: str, where: Any) -> list[int | Span]:
    """The numbers and spans of a position that is no text. Errors: `InputError` for what is neither."""
    if _whole(where):
        return [where]
    if isinstance(where, list | tuple) and where and all(map(_entry, where)):
        return [entry if _whole(entry) else (entry[0], entry[1]) for entry in where]
    raise InputError(f"position {name!r} is {where!r:.60}; {REMEDY}.")


def by_index(where: Mapping[str, Any]) -> list[str]:
    """Which of some positions are given by token number. Errors: as `entries_of`."""
    return [
        name
        for name, place in where.items()
        if not isinstance(place, str) and any(isinstance(entry, int) for entry in entries_of(name, place))
    ]


def _entry(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_whole, value)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _piece(name: str, piece: str, text: str, offsets: Sequence[Span], side: str) -> list[int]:
    start = text.rfind(piece)
    if start < 0:
        raise InputError(f"position {name!r} is {piece!r:.60}, which the {side} prompt does not contain.")
    tokens = covering(offsets, start, start + len(piece))
    if not tokens:
        raise InputError(f"position {name!r} is {piece!r:.60}, in which no token stands; {REMEDY}.")
    return tokens


def covering(offsets: Sequence[Span], start: int, end: int) -> list[int]:
    """The tokens that overlap the characters [start, end)."""
    return [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
