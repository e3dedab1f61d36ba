"""What the doors of the fuzz have in common: a case, its outcome, values that nobody expects, and damaged bytes."""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from workbench.errors import InputError

Outcome = Literal["accepted", "refused", "raw"]
SECONDS = 20
"""A door that has not answered by then hangs."""
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**40,
    2**70,
    1.0,
    1.5,
    1e308,
    "",
    " ",
    "x",
    "1",
    "null",
    "\ud800",
    "\x00",
    "\u2028",
    "é" * 300,
    [],
    [[]],
    [None],
    [3],
    [1.5],
    ["x"],
    [True],
    {},
    {"x": 1},
    {"": None},
    [{"x": [1]}],
)


class Hung(Exception):
    """A door that gave no answer in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One input at a door: what was done to it, and the call."""

    name: str
    run: Callable[[], object]


def outcome_of(case: Case) -> tuple[Outcome, str]:
    """What a door does with a case, and in what words."""
    try:
        with in_time(SECONDS):
            case.run()
    except InputError as error:
        return "refused", str(error)
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    return "accepted", ""


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raise `Hung` in a call that takes longer (in the main thread)."""

    def ring(number: int, frame: Any) -> None:
        raise Hung(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(value: Any, draw: random.Random) -> tuple[Any, str]:
    """A JSON value with one change somewhere inside: another value, a missing or an additional entry."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {name: each for name, each in value.items() if name != key}, f"without {key}"
        if kind < 0.15:
            return {**value, str(draw.choice(("x", "", "\ud800", key.upper()))): draw.choice(ODD)}, "another key"
        inside, said = mutated(value[key], draw)
        return {**value, key: inside}, f"{key}: {said}"
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        if draw.random() < 0.15:
            return value[:place] + value[place + 1 :], f"[{place}] gone"
        inside, said = mutated(value[place], draw)
        return [*value[:place], inside, *value[place + 1 :]], f"[{place}] {said}"
    odd = draw.choice(ODD)
    return odd, f"= {odd!r:.40}"


def damaged(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes with something wrong: cut, flipped, put in, encoded otherwise."""
    place = draw.randrange(len(content)) if content else 0
    kind = draw.randrange(12)
    if kind == 0:
        return content[:place], f"cut at {place}"
    if kind == 1:
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :], "a bit"
    if kind == 2:
        return content[:place] + content[place + 1 :], f"byte {place} gone"
    if kind == 3:
        return b"", "empty"
    if kind == 4:
        return b"\xef\xbb\xbf" + content, "BOM"
    if kind == 5:
        return content.decode("utf-8", "replace").encode("utf-16"), "UTF-16"
    if kind == 6:
        return content.replace(b"e", b"\xe9", 1), "Latin-1"
    if kind == 7:
        odd = draw.choice((b"\x00", b"\xe2\x80\xa8", b"\r", b"\t", b"}", b"]", b'"', b"\\ud800", b"NaN", b"1e999"))
        return content[:place] + odd + content[place:], f"{odd!r} at {place}"
    if kind == 8:
        return content.replace(b"\n", b"\r\n"), "CRLF"
    if kind == 9:
        return content + content, "twice"
    if kind == 10:
        return b"[" * 20000 + content, "nested deep"
    return bytes(draw.randrange(256) for _ in range(50)), "noise"
