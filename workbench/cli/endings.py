"""How a command ends: one line that names the remedy for whatever the user can mend, never a raw traceback of it."""

import argparse
import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator

from workbench.errors import InputError

INPUT, INTERRUPTED, CLOSED = 2, 130, 141
"""Exit codes: bad input or a file that can't be had; Ctrl-C or SIGTERM; the reader of a pipe has gone."""
REMEDIES = {
    errno.ENOSPC: "make room there, or choose another folder",
    errno.EDQUOT: "make room in your quota, or choose another folder",
    errno.EFBIG: "files of this size are not allowed there; choose another folder, or raise the limit",
    errno.EROFS: "nothing can be written there; choose another folder",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOTDIR: "a part of this path is a file; choose another place, or move that file away",
    errno.EEXIST: "something of that name stands there already; move it away, or choose another place",
    errno.EISDIR: "a folder stands where a file belongs; give a file, or move the folder away",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EADDRINUSE: "choose another --port, or leave it out",
}
OS_ERROR = re.compile(r"os error (\d+)")
"""In what safetensors says of a file that it could not write."""
log = logging.getLogger("workbench")


def explained(error: Exception) -> str | None:
    """What is wrong and the remedy, in one line; None for an error that is no matter of the user's."""
    if isinstance(error, InputError):
        return str(error)
    os_error = OS_ERROR.search(str(error))
    if not isinstance(error, OSError):
        return _of_a_file(int(os_error[1]), None) if os_error and type(error).__name__ == "SafetensorError" else None
    if error.errno is None:
        return " ".join(str(error).split())
    return _of_a_file(error.errno, error.filename2 or error.filename)


def _of_a_file(code: int, place: object) -> str:
    where = f"{os.fsdecode(place)}: " if isinstance(place, str | bytes | os.PathLike) else ""
    return f"{where}{os.strerror(code)}; {REMEDIES.get(code, '--debug shows where it happened')}."


def interrupted(options: argparse.Namespace) -> str:
    """What goes on after Ctrl-C, which is not the same for all commands."""
    after = getattr(options, "after", None)
    if after and getattr(options, "resume", False):
        after = after.replace(" with --resume", "")
    return f"interrupted; {after}" if after else "interrupted"


def close_output() -> None:
    """Let the interpreter end without a second complaint of a pipe that nobody reads."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def messages(options: argparse.Namespace) -> Iterator[None]:
    """Inside: messages go to the screen (with `--quiet` warnings alone, and no progress bars) and to `--log-file`."""
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.setLevel(logging.WARNING if options.quiet else logging.INFO)
    handlers: list[logging.Handler] = [screen]
    if options.log_file is not None:
        options.log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(options.log_file, encoding="utf-8"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, bars = log.level, os.environ.get("TQDM_DISABLE")
    log.setLevel(logging.INFO)
    for handler in handlers:
        log.addHandler(handler)
    if options.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # tqdm's own switch, which the processes of a study inherit
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        if options.quiet and bars is None:
            del os.environ["TQDM_DISABLE"]
