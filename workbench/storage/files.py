"""Atomic files: JSON and safetensors only, written beside their final name and renamed, so that a reader never sees
half a file."""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.errors import InputError
from workbench.storage import checksums


def write_atomically(path: Path, write: Callable[[Path], object], *, made_from: Sequence[Path] = ()) -> None:
    """Let `write` fill a temporary file in the same folder, flush it to disk, then rename it to `path`.

    In a run's folder the file's checksum is kept beside it, with those of the files that it was `made_from`
    (`workbench.storage.checksums`). Errors: `InputError` naming the file, where the disk is full, read-only, or no
    folder can be made there.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            note = checksums.note_of(path, temporary, made_from)
            checksums.forget(path)
            temporary.replace(path)
            checksums.keep(path, note)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is written to `path` inside fails with an `InputError` that names it and the remedy: a full or read-only
    disk, a file where a folder must be."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        number = re.search(r"os error (\d+)", str(error))  # in what safetensors says of the system's error
        why = error.strerror if isinstance(error, OSError) else os.strerror(int(number[1])) if number else str(error)
        raise InputError(
            f"{path} can't be written ({why}); free some space, or choose another folder (--out) that can be written "
            "to. What was there before is unchanged."
        ) from None


def write_text(path: Path, text: str, *, made_from: Sequence[Path] = ()) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), made_from=made_from)


def write_json(path: Path, value: Any, *, made_from: Sequence[Path] = ()) -> None:
    """Write JSON atomically; NaN is refused, because other readers of JSON refuse it. `made_from`: files that the value
    follows from; reading it notices when one of them has changed since."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", made_from=made_from)


def read_json(path: Path) -> Any:
    """Read JSON. Errors: `InputError` when the file is missing, damaged, or not as the run wrote it."""
    content = _content(path)
    try:
        checksums.require_unchanged(path, content)
    except InputError:  # another process may have written it anew between the two looks
        content = _content(path)
        checksums.require_unchanged(path, content)
    try:
        text = content.decode("utf-8")
        value = json_value(text)
        _require_whole_characters(value, text)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the stage that writes it again.") from None
    return value


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file. Errors: `InputError` when it is missing or damaged."""
    try:
        return _content(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the stage that writes it again.") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; is its run complete? Run the stage that writes it again.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}); give the file that the run wrote.") from None


def json_value(text: str) -> Any:
    """JSON without what other readers of it refuse: repeated keys, NaN, infinities. Errors: `ValueError` in words."""
    try:
        return json.loads(text, object_pairs_hook=_unrepeated, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _require_whole_characters(value: Any, text: str) -> None:
    """Refuse an escaped lone surrogate, which no file can hold. Errors: `ValueError`."""
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character, {error.object[error.start]!r}") from None


def _unrepeated(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(entries)
    if len(mapping) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"the key {next(name for name in mapping if names.count(name) > 1)!r} stands twice")
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is larger than any number")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically as safetensors; tensors that share storage are written as copies."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata or {})))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata. Errors: `InputError` when the file is missing, damaged, or not as the run wrote it."""
    if path.is_file():
        checksums.require_unchanged(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return load_file(path), metadata
    except (FileNotFoundError, OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}); delete it and run the stage that writes it again."
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Errors: `InputError` when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (FileNotFoundError, OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}); delete it and run the stage that writes it again."
        ) from None


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors as memory maps of their file: read when they are touched. Errors: `InputError` when the file is missing
    or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (FileNotFoundError, OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}); delete it and run the stage that writes it again."
        ) from None
