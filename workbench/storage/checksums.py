"""Checksums of what a run writes: a digit that flips, or a file that is changed by hand, is noticed on reading.

Beside each file of a run lies a small hidden one, `.NAME.sha256`, with its SHA-256 and those of the files that it was
made from (a head map is made from two circuits). Files of before, and files outside a run, have none and are read as
they are. A file is renamed into place between the removal of its old checksum and the writing of the new one, so a kill
leaves a file without a checksum, never one with a wrong one.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import InputError

MARKS = ("run.json", "study.json")
"""A folder with one of these is a run's, with all folders in it."""
DEPTH = 6
APPENDED = ".jsonl"
"""Logs grow line by line and have no sum."""
LARGEST = 64 << 20
"""Bytes of a file that is summed at most: checkpoints and caches are larger, and have identities of their own."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def note_file(path: Path) -> Path:
    """Where a file's checksum lies."""
    return path.with_name(f".{path.name}.sha256")


def in_run(path: Path) -> bool:
    """Whether a file is part of a run."""
    if path.name in MARKS:
        return True
    return any((folder / mark).exists() for folder in list(path.absolute().parents)[:DEPTH] for mark in MARKS)


def note_of(path: Path, content: Path, made_from: Sequence[Path]) -> str | None:
    """What is to be kept of a file that will be `path`, with its content elsewhere; None outside a run, and for large
    files."""
    if path.suffix == APPENDED or not in_run(path) or content.stat().st_size > LARGEST:
        return None
    sources = {os.path.relpath(source, path.parent): sha256(source) for source in made_from if source.exists()}
    return json.dumps({"sha256": sha256(content), "made_from": sources}) + "\n"


def forget(path: Path) -> None:
    """Remove a file's checksum."""
    note_file(path).unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a file with its checksum, where they are there."""
    path.unlink(missing_ok=True)
    forget(path)


def keep(path: Path, note: str | None) -> None:
    """Write a file's checksum, whole or not at all."""
    if note is None:
        return
    temporary = note_file(path).with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(note)
        temporary.replace(note_file(path))
    finally:
        temporary.unlink(missing_ok=True)


def require_unchanged(path: Path, content: bytes | None = None) -> None:
    """Errors: `InputError` where a file, or one that it was made from, is not as the run wrote it."""
    note = _note(path)
    if note is None:
        return
    actual = sha256(path) if content is None else hashlib.sha256(content).hexdigest()
    if actual != note["sha256"]:
        raise InputError(
            f"{path} has changed since the run wrote it (damaged, or edited by hand); delete it and run the stage that "
            f"writes it again, or, if the change is meant, delete {note_file(path)}."
        )
    for name, digest in note["made_from"].items():
        source = path.parent / name
        if source.exists() and sha256(source) != digest:
            raise InputError(
                f"{path} was made from another {source.name} than the one beside it now; delete {path.name} and run "
                f"the stage that writes it again, or, if the change is meant, delete {note_file(path)}."
            )


def _note(path: Path) -> Mapping[str, Any] | None:
    """A file's checksum; None where there is none, or half of one."""
    try:
        note = json.loads(note_file(path).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(note, dict) and isinstance(note.get("sha256"), str) and isinstance(note.get("made_from"), dict)
    return note if whole else None
