"""Whole directories written all or nothing, and never over anything that this program has not written.

A directory of ours carries a marker (`workbench.json`: format, version, and the files that were written). Writing one:
fill a new directory beside the target, flush it to disk, rename the old one away, rename the new one in, remove the old
one. Killed between any two of these, the old or the new directory is there, or comes back with the next call that
names it (`recovered`).
"""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.storage import checksums
from workbench.storage.files import read_json, write_json, writing

MARKER = "workbench.json"
FORMAT = "workbench-directory"
VERSION = 1
ADDED_LATER = {MARKER, "accuracies.json"}
"""Written by us into a directory after it was made."""
SAVED = frozenset({"config.json", "model.safetensors"})
BESIDE = frozenset(
    {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    | {"training_log.jsonl", "accuracies.json"}
)


def replace_directory(target: Path, fill: Callable[[Path], object], *, keep_existing: bool = False) -> None:
    """Fill a new directory and put it in the target's place; a reader never sees half a directory.

    `keep_existing`: a target that has come to be meanwhile stays (for content that its name determines). Errors:
    `InputError` for a target that `require_replaceable` refuses, before `fill` is called, and for a disk that is
    full or read-only.
    """
    require_replaceable(target)
    with writing(target):
        _replace(target, fill, keep_existing=keep_existing)


def _replace(target: Path, fill: Callable[[Path], object], *, keep_existing: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_left_over(target)
    new = Path(
        tempfile.mkdtemp(prefix=f"{_prefix(target)}new-{socket.gethostname()}-{os.getpid()}-", dir=target.parent)
    )
    try:
        fill(new)
        _mark(new)
        new.chmod(0o755)
        _flush(new)
        if not (keep_existing and target.exists()):
            _swap(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def require_replaceable(target: Path) -> None:
    """Refuse a target that can't be written, or that holds what this program has not written. Errors: `InputError`."""
    for place in (target, *target.absolute().parents):
        if place.is_symlink() and place == target:
            raise InputError(f"{target} is a link, which would be replaced; give the folder that it points to.")
        if place.exists() and not place.is_dir():
            raise InputError(f"{place} is a file, so that {target} can't be a folder; choose another folder.")
        if place.exists() and not os.access(place if place != target else place.parent, os.W_OK | os.X_OK):
            raise InputError(f"{place} can't be written; choose another folder, or give yourself the right to write.")
        if place.exists() and place != target:
            break
    recovered(target)
    foreign = _foreign(target) if target.exists() else []
    if foreign:
        raise InputError(
            f"{target} holds what this program has not written ({', '.join(foreign[:3])}), and would be replaced as a "
            "whole; choose another folder, or move its content away yourself."
        )


def recovered(target: Path) -> Path:
    """The target itself, after putting back the directory that a kill in the middle of a replacement has left beside
    it."""
    old = _old(target)
    if not target.exists() and not target.is_symlink() and old.is_dir():
        with contextlib.suppress(OSError):  # another process is at it
            old.rename(target)
    return target


def _foreign(target: Path) -> list[str]:
    """Files that are in a directory and were not written by us; nothing for one that is empty."""
    present = {
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    present -= {checksums.note_file(target / name).relative_to(target).as_posix() for name in present}
    if not present:
        return sorted(path.name for path in target.iterdir())
    written = _written(target / MARKER) if MARKER in present else None
    if written is not None:
        return sorted(present - written - ADDED_LATER)
    return [] if _was_ours(target, present) else sorted(present)


def _was_ours(target: Path, present: set[str]) -> bool:
    """Of a directory without a marker: whether it is exactly what this program wrote before there was one.

    A trained model with its `training.json`, the student of a run's condition beside its log, or an adapter (peft's own
    have a README.md). A model without any of these may be anybody's.
    """
    if SAVED | {"training.json"} <= present <= SAVED | BESIDE | {"training.json"}:
        with contextlib.suppress(InputError):
            training = read_json(target / "training.json")
            return isinstance(training, dict) and "steps" in training
    if SAVED <= present <= SAVED | BESIDE:
        return target.name == "student" and (target.parent / "log.jsonl").is_file()
    return present == {"adapter_config.json", "adapter_model.safetensors"}


def _written(marker: Path) -> set[str] | None:
    """The files that a marker lists, or None where it is none of ours."""
    if not marker.is_file():
        return None
    try:
        value: Any = read_json(marker)
    except InputError:
        return None
    files = value.get("files") if isinstance(value, dict) and value.get("format") == FORMAT else None
    return {str(name) for name in files} if isinstance(files, list) else None


def _mark(directory: Path) -> None:
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    write_json(directory / MARKER, {"format": FORMAT, "version": VERSION, "files": files})


def _prefix(target: Path) -> str:
    return f".{target.name}.workbench-"


def _old(target: Path) -> Path:
    return target.absolute().parent / f"{_prefix(target)}old"


def _swap(new: Path, target: Path) -> None:
    """The target's directory away, the new one in, the old one removed; an error puts the old one back."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)  # what a kill has left after its swap
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        recovered(target)
        raise
    _flush_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clear_left_over(target: Path) -> None:
    """Remove what killed processes of this machine have left beside the target."""
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)
    begin = f"{_prefix(target)}new-{socket.gethostname()}-"
    for path in target.absolute().parent.glob(f"{_escaped(begin)}*"):
        process = path.name.removeprefix(begin).split("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _escaped(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(directory: Path) -> None:
    """To disk: every file, then the directories that name them."""
    for path in _below(directory):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            _flush_entry(path)
    _flush_entry(directory)


def _below(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if not path.is_symlink())


def _flush_entry(directory: Path) -> None:
    if os.name != "posix":  # elsewhere directories can't be opened
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
