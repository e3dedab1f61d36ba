"""Circuits that can be loaded: files of circuits in the session's folder and in run folders, with the ranking that a
search left beside one (`NAME-search.json`), along which the circuit can be stepped.

A ranking names the most needed head first, so its first k heads are what is left of an elimination with k heads to go.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.search_curve import SearchCurve
from workbench.errors import InputError
from workbench.values.refs import Head

LARGEST, MOST = 4 * 2**20, 200
"""Bytes of a file, and files of a folder, that are looked at."""
MAP = "the heat map in view"
"""The ranking that is always there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A circuit of a file, and the ranking that it is the beginning of."""

    name: str
    circuit: Circuit
    ranking: tuple[Head, ...] = ()
    curve: SearchCurve | None = None

    def first(self, size: int) -> Circuit:
        """The first heads of the ranking: those of the circuit in their roles there, the others everywhere."""
        return first_of(self.ranking, size, self.circuit, f"{self.circuit.method}, first {size} of its ranking")

    def describe(self) -> dict[str, Any]:
        """What the page says of it."""
        return {
            "name": self.name,
            "heads": len(self.circuit.heads),
            "method": self.circuit.method,
            "shape": self.circuit.shape,
            "steps": len(self.ranking),
        }


def first_of(ranking: Iterable[Head], size: int, circuit: Circuit, method: str) -> Circuit:
    """A circuit of the first heads of a ranking; heads of `circuit` keep their roles and positions."""
    chosen = list(ranking)[:size]
    known = [member for member in circuit.members if member.head in chosen]
    others = [Member(head, "ranked", "all") for head in chosen if head not in circuit.heads]
    return Circuit.of([*known, *others], shape=circuit.shape, method=method)


def sources(folders: Iterable[Path]) -> dict[str, Source]:
    """The circuits in some folders and in their `circuits`, by name: FILE, or FOLDER/FILE where that is taken."""
    found: dict[str, Source] = {}
    for folder in folders:
        for file in (*_files(folder), *_files(folder / "circuits")):
            name = file.name if file.name not in found else f"{folder.resolve().name}/{file.name}"
            source = _source(file, name)
            if source is not None and name not in found:
                found[name] = source
    return found


def _files(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(path for path in folder.iterdir() if path.suffix == ".json")[:MOST]
    except OSError:
        return
    for path in names:
        try:
            if path.is_file() and path.stat().st_size <= LARGEST and path.name.isprintable():
                yield path
        except OSError:
            continue


def _source(file: Path, name: str) -> Source | None:
    """The circuit of a file; None where it holds none."""
    try:
        written = storage.read_json(file)
        circuit = Circuit.from_json({name: value for name, value in written.items() if name != "origin"})
    except (InputError, OSError, AttributeError, TypeError):
        return None
    ranking, curve = _search(file.with_name(f"{file.stem}-search.json"))
    inside = all(head.layer < circuit.shape[0] and head.index < circuit.shape[1] for head in ranking)
    if not inside:
        ranking, curve = (), None
    if len(set(ranking)) != len(ranking):  # a head stands once for each of its positions, which the curve counts
        ranking, curve = tuple(dict.fromkeys(ranking)), None
    return Source(name=name, circuit=circuit, ranking=ranking, curve=curve)


def _search(file: Path) -> tuple[tuple[Head, ...], SearchCurve | None]:
    """The ranking and the curve of a search's file; nothing where there is none, or none of heads alone."""
    try:
        if not file.is_file() or file.stat().st_size > LARGEST:
            return (), None
        written = storage.read_json(file)
        ranking = tuple(Head.parse(name) for name in written["ranking"])
        curve = written.get("curve")
        return ranking, None if curve is None else SearchCurve.from_json(curve)
    except (InputError, OSError, AttributeError, TypeError, KeyError):
        return (), None
