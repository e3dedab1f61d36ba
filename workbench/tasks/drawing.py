"""Drawing scenes at random, each once, with an end: a task that has fewer than are asked for says so.

A loop `while len(seen) < scenes` never ends where all scenes have been seen. Here so many draws in a row that give
nothing new end it: the n-th of N equally likely scenes is missed by `PATIENCE * n` draws with probability below
exp(-PATIENCE).
"""

from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from workbench.errors import InputError
from workbench.values.bar import bar

Drawn = TypeVar("Drawn")
FEWEST, PATIENCE = 1000, 50
"""So many repeats in a row end the drawing: 1000, and 50 for each scene that has been seen."""
OTHERS = 100
"""So many times as many draws of other splits do."""
TRIES = 100_000
"""Of one draw until it fits: a split holds a tenth of all scenes."""
SECONDS = 2.0
"""A drawing that takes longer shows a progress bar."""


def distinct(
    make: Callable[[int], Drawn | None], *, scenes: int, key: Callable[[Drawn], Hashable], what: str
) -> Iterator[Drawn]:
    """`scenes` draws that differ in their key. `make` draws one for a place (0, 1, ...), or gives None for a scene of
    another split; it is asked again until it gives a new one.

    `what`: the task and split, in words. Errors: `InputError` with how many there are, where there are fewer.
    """
    seen: set[Hashable] = set()
    repeats = others = 0
    with bar(total=scenes, desc=f"drawing {what}", unit="scene", delay=SECONDS) as drawing:
        while len(seen) < scenes:
            drawn = make(len(seen))
            if drawn is not None and key(drawn) not in seen:
                repeats = others = 0
                seen.add(key(drawn))
                drawing.update()
                yield drawn
                continue
            repeats, others = repeats + (drawn is not None), others + (drawn is None)
            most = FEWEST + PATIENCE * len(seen)
            if repeats > most or others > OTHERS * most:
                raise InputError(
                    f"{what} has {len(seen)} different scenes, not {scenes} ({repeats + others} draws in a row gave "
                    "nothing new); ask for fewer scenes, or set the task's options so that there are more."
                )


def fitting(make: Callable[[], Drawn], fits: Callable[[Drawn], bool], *, what: str) -> Drawn:
    """The first draw that fits. Errors: `InputError` where so many don't that none does."""
    for _ in range(TRIES):
        drawn = make()
        if fits(drawn):
            return drawn
    raise InputError(
        f"{what}: none of {TRIES:,} draws fits; use a tokenizer with more whole words, or other options of the task."
    )
