"""What a command owes the folder that it works in: one process at a time, nothing left over, and an end that a later
one can go on from.

A folder is held by a lock file with its owner's process id, host and start time. The operating system gives the lock
up when its process dies, whatever the death, so a stale one is taken over. Where it knows no such locks (Windows),
nothing is locked.
"""

import atexit
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from workbench.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}")
"""The names of temporary files and directories (`tempfile`), which a kill leaves behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    handle: int
    process: int
    at_release: Callable[[], object]


_HELD: dict[Path, _Held] = {}


def hold(folder: Path, at_release: Callable[[], object] = lambda: None) -> None:
    """Hold a folder until `release`, or until this process ends; what a killed process has left over in it is removed.

    A process that holds it already goes on holding it. Errors: `InputError` naming the owner, where another process
    holds it.
    """
    place = folder.resolve()
    if fcntl is None or place in _HELD:
        return
    place.mkdir(parents=True, exist_ok=True)
    handle = _locked(place / LOCK)
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(_owner()).encode())
    _HELD[place] = _Held(handle=handle, process=os.getpid(), at_release=at_release)
    remove_leftovers(place)


def _locked(file: Path) -> int:
    """A handle of the lock file that this process alone holds."""
    assert fcntl is not None
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise InputError(_refusal(file.parent, _read(file))) from None
        owner = _read(file)
        if owner.get("host") not in (None, socket.gethostname()):
            os.close(handle)
            raise InputError(f"{_refusal(file.parent, owner)} If it has died there, delete {file}.")
        if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
            return handle
        os.close(handle)  # its former owner has removed it in the meantime


def _owner() -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": now}


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _refusal(folder: Path, owner: dict[str, Any]) -> str:
    return (
        f"{folder} is in use by process {owner.get('process', '(unknown)')} on {owner.get('host', '(unknown)')} since "
        f"{owner.get('since', '(unknown)')}; wait until that has ended (or end it), or choose another --out."
    )


def release(folder: Path) -> None:
    """Give a folder free that this process holds."""
    held = _HELD.pop(folder.resolve(), None)
    if held is None or held.process != os.getpid():  # a forked child holds nothing
        return
    held.at_release()
    (folder.resolve() / LOCK).unlink(missing_ok=True)
    os.close(held.handle)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and directories that a killed process has left."""
    for path in sorted(folder.rglob(".*")):
        if not LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@atexit.register
def _release_all() -> None:
    for folder in list(_HELD):
        release(folder)


@contextmanager
def command() -> Iterator[None]:
    """Inside: SIGTERM ends like Ctrl-C (`KeyboardInterrupt`). At the end: folders that were held inside are free."""
    before = set(_HELD)
    with _terminable():
        try:
            yield
        finally:
            for folder in set(_HELD) - before:
                release(folder)


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
