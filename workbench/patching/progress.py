"""What a sweep has computed so far, written to a file as it goes, so that an interrupted sweep resumes where it
stopped, to the same bits.

A sweep fills an array of entries (variants, heads, layers) by examples. What is computed together, a chunk, is marked
as found together, and a chunk of which anything is missing is computed again whole: batched arithmetic rounds by the
batch that it is done in.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from workbench import storage
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.tasks.base import PromptPairs
from workbench.values.bar import bar
from workbench.values.metrics import Metric
from workbench.values.scores import Scores

Places = Int[Tensor, " _"] | Sequence[int]
"""Indices along one axis."""
SECONDS = 10.0
"""Least time between two writes."""


FORMAT = 2
"""Of the identities: a new number where what they are made of changes."""


def identity(
    sweep: str,
    model: HookedModel,
    pairs: Sequence[PromptPairs],
    *,
    metrics: Sequence[Metric],
    replacement: str = "corrupt",
    settings: Mapping[str, object],
) -> str:
    """SHA-256 of all that a sweep's numbers depend on, and so of what its files may be taken for.

    That is: the kind of sweep, the model's weights, the prompts, what is measured (name, unit and function of each
    metric), what stands in for a head (its `identity`), the sweep's own settings, and the number of this scheme. How it
    is carried out (`Execution`) is no part of it.
    """
    parts = [
        f"format {FORMAT}",
        sweep,
        model.fingerprint(),
        *(part.fingerprint() for part in pairs),
        *(metric.fingerprint for metric in metrics),
        replacement,
        *(f"{name}={value!r}" for name, value in sorted(settings.items())),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_or_sweep(
    file: Path | None, identify: Callable[[], str], sweep: Callable[["PartialFile | None"], Scores]
) -> Scores:
    """The scores of a sweep: from `file` when they are there, else computed (on from where an interruption left them)
    and written there.

    Errors: `InputError` when the file, or what is left of an interrupted sweep, has another identity.
    """
    files = None if file is None else {"": file}
    return load_or_sweep_all(files, identify, lambda partial: {"": sweep(partial)})[""]


def load_or_sweep_all(
    files: Mapping[str, Path] | None,
    identify: Callable[[], str],
    sweep: Callable[["PartialFile | None"], dict[str, Scores]],
) -> dict[str, Scores]:
    """`load_or_sweep` for one sweep that gives several scores, each with its file; what there is so far stands beside
    the first."""
    if files is None:
        return sweep(None)
    known = identify()
    if all(file.exists() for file in files.values()):
        return {name: Scores.load(file, identity=known) for name, file in files.items()}
    partial = PartialFile(next(iter(files.values())), known)
    scores = sweep(partial)
    for name, file in files.items():
        scores[name].save(file, identity=known)
    partial.drop()
    return scores


Tell = Callable[[float], object]
"""Is told what share of a sweep is done (0 to 1)."""
_WATCHER: ContextVar[Tell | None] = ContextVar("watcher of sweeps", default=None)


@contextmanager
def watched(tell: Tell) -> Iterator[None]:
    """Inside, and in this thread alone, `tell` hears of every chunk that a sweep has done; what it raises ends the
    sweep between two chunks."""
    token = _WATCHER.set(tell)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def progress_bar(*items: Any, shown: bool = True, **settings: Any) -> "tqdm[Any]":
    """The bar of a sweep (`workbench.values.bar`); a watched sweep draws none."""
    return bar(*items, shown=shown and _WATCHER.get() is None, **settings)


class KnownValues:
    """Numbers by key, each computed once; in a file as they come where there is one, so that an evaluation that was
    interrupted goes on. Errors: `InputError` for another evaluation's file."""

    def __init__(self, file: Path | None, identity: Callable[[], str]) -> None:
        """`identity`: of all that the numbers depend on, asked for where there is a file."""
        self._values, self._file, self._identity = dict[str, float](), file, "" if file is None else identity()
        if file is not None and file.exists():
            described = storage.read_json(file)
            if described.get("identity") != self._identity:
                raise InputError(
                    f"{file} holds values of another model, other prompts, another metric or ablation, or of an "
                    "earlier version; delete it, or keep these elsewhere."
                )
            self._values |= described["values"]

    def of(self, key: str, compute: Callable[[], float]) -> float:
        """The key's number, computed where it is not known yet."""
        if key not in self._values:
            self._values[key] = compute()
            if self._file is not None:
                storage.write_json(self._file, {"identity": self._identity, "values": self._values})
        return self._values[key]


class Progress:
    """Values [*entry *extra example] and which of them are present [*entry example]; a value that is not present is
    whatever it was begun with."""

    def __init__(
        self,
        values: Tensor,
        present: Bool[Tensor, "*entry example"],
        keep: Callable[[], object] | None = None,
        *,
        whole: "Progress | None" = None,
    ) -> None:
        self.values, self.present, self._keep = values, present, keep
        self._whole = whole or self

    @classmethod
    def of(
        cls, entries: tuple[int, ...], examples: int, *, extra: tuple[int, ...] = (), file: "PartialFile | None" = None
    ) -> "Progress":
        """Nothing yet, or what `file` holds. Values are kept in float64, which holds every metric's own. Errors:
        `InputError` when the file is another sweep's."""
        values, present = (
            torch.zeros(*entries, *extra, examples, dtype=torch.float64),
            torch.zeros(*entries, examples, dtype=torch.bool),
        )
        if file is None:
            return cls(values, present)
        file.read_into(values, present)
        return cls(values, present, lambda: file.keep(values, present))

    def examples(self, start: int, stop: int) -> "Progress":
        """The part of some examples; it shares the values and the file."""
        return Progress(self.values[..., start:stop], self.present[..., start:stop], self._keep, whole=self._whole)

    def has(self, *places: Places) -> bool:
        """Whether all entries at these places of each axis are present."""
        return bool(self.present[_block(places)].all())

    def mark(self, *places: Places) -> None:
        """Say that the entries at these places of each axis are there now; the file is written when that is due, and a
        watcher is told."""
        self.present[_block(places)] = True
        if self._keep is not None:
            self._keep()
        if (tell := _WATCHER.get()) is not None:
            tell(float(self._whole.present.float().mean()))


def _block(places: Sequence[Places]) -> tuple[Tensor, ...]:
    """The index of every combination of places."""
    axes = [torch.as_tensor(place).cpu().reshape(-1) for place in places]
    return tuple(
        axis.view(*(len(axis) if other == number else 1 for other in range(len(axes))))
        for number, axis in enumerate(axes)
    )


class PartialFile:
    """A sweep's file of what there is so far, beside the file that its scores will have."""

    def __init__(self, scores: Path, identity: str) -> None:
        self.scores, self.path, self.identity = scores, scores.with_name(f"{scores.stem}.partial"), identity
        self._others: list[PartialFile] = []
        self._written = time.monotonic()

    def named(self, name: str) -> "PartialFile":
        """Another file of the same sweep, for a part of it."""
        self._others.append(PartialFile(self.scores.with_name(f"{self.scores.stem}-{name}"), self.identity))
        return self._others[-1]

    def drop(self) -> None:
        """The sweep is done and its scores are written."""
        for file in (self, *self._others):
            file.path.unlink(missing_ok=True)

    def read_into(self, values: Tensor, present: Tensor) -> None:
        """Fill in what there was before the interruption."""
        if not self.path.exists():
            return
        tensors, metadata = storage.read_tensors(self.path)
        if metadata.get("identity") != self.identity:
            raise InputError(
                f"{self.path} is of another sweep (model, prompts, metric or settings differ, or an earlier version of "
                "the workbench began it); delete it, or keep these scores elsewhere."
            )
        values.copy_(tensors["values"])
        present.copy_(tensors["found"])

    def keep(self, values: Tensor, present: Tensor) -> None:
        """Write, unless that was done a moment ago."""
        if time.monotonic() - self._written >= SECONDS:
            storage.write_tensors(self.path, {"values": values, "found": present}, metadata={"identity": self.identity})
            self._written = time.monotonic()
