"""Computing in the background: what is wanted is computed one part after another in one thread, remembered, and left
off when no longer wanted.

A part is a name (its key: all that its value depends on) and a function. `want` replaces the list of wanted parts; what
is running and not among them ends at its next chunk (`patching.progress.watched`). Errors become text, so that no frame
of a failed run outlives it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from workbench.errors import InputError
from workbench.patching.progress import watched

KEPT = 600
"""How many results are remembered."""
REMEMBERED = 256 * 2**20
"""Bytes that they may take together, beside those that are wanted now."""


class Stopped(Exception):
    """The running part is no longer wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something to compute."""

    key: tuple[Hashable, ...]
    label: str
    """What it is, for the progress line."""
    run: Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a part gave: a value, or why there is none."""

    value: Any = None
    error: str | None = None


def bytes_of(value: Any) -> int:
    """What a result takes of the memory, about."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, str | bytes):
        return 50 + len(value)
    if isinstance(value, Mapping):
        return 64 + sum(map(bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return 56 + 8 * len(value) + sum(map(bytes_of, value))
    if is_dataclass(value):
        return 48 + sum(bytes_of(getattr(value, each.name)) for each in fields(value))
    return 32


class Worker:
    """One thread that computes the wanted parts in their order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: list[Part] = []
        self._known: OrderedDict[tuple[Hashable, ...], Outcome] = OrderedDict()
        self._bytes: dict[tuple[Hashable, ...], int] = {}
        self._stopped: set[tuple[Hashable, ...]] = set()
        self._running: Part | None = None
        self._share = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    def want(self, parts: Sequence[Part]) -> None:
        """Compute these, first things first, and nothing else."""
        with self._changed:
            if self._closed:
                raise InputError("this explorer is closed; make another with `workbench.explore(...)`.")
            self._wanted = list(parts)
            if self._thread is None and self._missing():
                self._thread = threading.Thread(target=self._work, name="workbench explorer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until all that is wanted is there, but no longer than this; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or not self._missing(), timeout=seconds)

    def outcome(self, key: tuple[Hashable, ...]) -> Outcome | None:
        """What is known of a part."""
        with self._changed:
            return self._known.get(key)

    def pending(self) -> list[dict[str, Any]]:
        """What is wanted and not there yet, with the share that is done."""
        with self._changed:
            return [
                {"label": part.label, "share": self._share if part is self._running else 0.0}
                for part in self._missing()
            ]

    def stopped(self) -> list[str]:
        """What was wanted and stopped."""
        with self._changed:
            return [part.label for part in self._wanted if part.key in self._stopped]

    def stop(self) -> None:
        """Leave off whatever is not done yet, until `resume`."""
        with self._changed:
            self._stopped |= {part.key for part in self._missing()}
            self._changed.notify_all()

    def resume(self) -> None:
        """Take up again what was stopped."""
        with self._changed:
            self._stopped.clear()

    def close(self) -> None:
        """End the thread and wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _missing(self) -> list[Part]:
        return [part for part in self._wanted if part.key not in self._known and part.key not in self._stopped]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._missing())
                if self._closed:
                    return
                self._running, self._share = self._missing()[0], 0.0
                running = self._running
            outcome = self._attempt(running)
            with self._changed:
                self._running = None
                if outcome is not None:
                    self._remember(running.key, outcome)
                self._changed.notify_all()

    def _remember(self, key: tuple[Hashable, ...], outcome: Outcome) -> None:
        """Keep a result; the oldest that are not wanted now are forgotten where they are too many or too large."""
        self._known[key], self._bytes[key] = outcome, bytes_of(outcome.value)
        wanted = {part.key for part in self._wanted}
        for old in [each for each in self._known if each not in wanted]:
            if len(self._known) <= KEPT and sum(self._bytes.values()) <= REMEMBERED:
                return
            del self._known[old], self._bytes[old]

    def _attempt(self, part: Part) -> Outcome | None:
        try:
            with torch.no_grad(), watched(lambda share: self._heard(part, share)):
                return Outcome(value=part.run())
        except Stopped:
            return None
        except InputError as error:
            return Outcome(error=str(error))
        except Exception as error:
            return Outcome(error=f"{type(error).__name__}: {error}")

    def _heard(self, part: Part, share: float) -> None:
        with self._changed:
            self._share = share
            if self._closed or all(part.key != each.key for each in self._missing()):
                raise Stopped
