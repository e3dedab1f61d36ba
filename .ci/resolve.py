"""Do the pins hold on every Python that the project says it runs on? Nothing is installed.

    python .ci/resolve.py            each version's resolution under the pins; exit code 1 where there is none
    python .ci/resolve.py --write    the pins anew: those of today wherever a version can have them, others by marker

uv resolves, because pip reads the metadata of the Python that it runs on only; indexes are those that pip is set to.
Where no file of torch can be had for a version, the rest is resolved without it, and the line says so.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10.13", "3.11.9", "3.12.7", "3.13.1")
"""Those of the classifiers, each with a patch release that is easily had."""
ENVIRONMENTS = {
    "constraints.txt": ("--extra=dev", "--extra=quantised", "--extra=ray"),
    "constraints-tl3.txt": ("--extra=adapters", "--extra=contract"),
}
"""File of pins -> what the Makefile installs under it."""
MORE = {"constraints-tl3.txt": ("transformer-lens<4",)}
ACCELERATOR = re.compile(r"(nvidia-|cuda-|triton=)")
"""Comes with the build of torch; only torch itself is pinned."""
NO_TORCH = "torch ; python_version < '3'"


def main() -> int:
    options = argparse.ArgumentParser(description="Resolve the pins for every supported Python; nothing is installed.")
    options.add_argument("--write", action="store_true", help="write the files of pins anew")
    write, sound = options.parse_args().write, True
    for pins in ENVIRONMENTS:
        if write:
            _write(pins)
        for python in PYTHONS:
            sound &= _told(pins, python)
    return 0 if sound else 1


def _told(pins: str, python: str) -> bool:
    """Print how one Python fares; whether it has a resolution."""
    lines, error = _resolved(pins, f"--python-version={python}", f"--constraints={pins}")
    note = ""
    if not lines and "torch" in error:
        with _file(NO_TORCH) as other:
            without, _ = _resolved(
                pins, f"--python-version={python}", f"--constraints={pins}", f"--overrides={other.name}"
            )
        lines, note = without, " (without torch: no file of it for this Python can be had here)"
    print(f"{pins}, Python {python}: {len(lines)} packages{note}" if lines else f"{pins}, Python {python}:\n{error}")
    return bool(lines)


def _write(pins: str) -> None:
    """The pins anew, preferring those of today; torch stays at its version."""
    title, *today = (ROOT / pins).read_text().splitlines()
    with _file("\n".join(line for line in today if line.startswith("torch=="))) as torch:
        lines, error = _resolved(
            pins, "--universal", "--python-version=3.10", f"--constraints={torch.name}", preferred=today
        )
    if not lines:
        sys.exit(f"{pins}: {error}")
    (ROOT / pins).write_text("\n".join([title, *(line for line in lines if not ACCELERATOR.match(line))]) + "\n")


def _resolved(pins: str, *options: str, preferred: Sequence[str] = ()) -> tuple[list[str], str]:
    """Lines `name==version` (and marker), or none and the reason."""
    with _file("\n".join(preferred)) as out, _file("\n".join(MORE.get(pins, ()))) as more:
        command = ["uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--index-strategy"]
        command += ["unsafe-best-match", "--output-file", out.name, *options, *ENVIRONMENTS[pins], *_indexes()]
        done = subprocess.run(
            [*command, "pyproject.toml", more.name], cwd=ROOT, capture_output=True, text=True, env=_environment()
        )
        found = [line for line in Path(out.name).read_text().splitlines() if "==" in line]
    return ([], done.stderr.strip()) if done.returncode else (found, "")


def _file(text: str) -> "tempfile._TemporaryFileWrapper[str]":
    file = tempfile.NamedTemporaryFile("w", suffix=".txt")  # noqa: SIM115  the caller's `with` closes it
    file.write(text + "\n")
    file.flush()
    return file


def _pip_settings() -> Iterator[tuple[str, str]]:
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name, value = line.split("=", 1)
        yield name.rsplit(".", 1)[-1], value.strip("'\"")


def _indexes() -> list[str]:
    """pip's indexes as uv's options."""
    options = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links"}
    return list(
        dict.fromkeys(
            f"{options[name]}={place}"
            for name, value in _pip_settings()
            if name in options
            for place in shlex.split(value)
        )
    )


def _environment() -> dict[str, str]:
    """uv beside this Python, with pip's certificate."""
    certificate = dict(_pip_settings()).get("cert")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **({"SSL_CERT_FILE": certificate} if certificate else {})}


if __name__ == "__main__":
    sys.exit(main())
