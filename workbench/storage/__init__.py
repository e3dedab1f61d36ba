"""What is written to disk and read back: atomic JSON and safetensors, checkpoints, provenance, bundled files. Never a
pickle."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.storage.assets import located
    from workbench.storage.checksums import discard, sha256
    from workbench.storage.digests import checksum, digest
    from workbench.storage.directories import recovered, replace_directory, require_replaceable
    from workbench.storage.files import (
        json_value,
        map_tensors,
        read_json,
        read_lines,
        read_metadata,
        read_tensors,
        write_atomically,
        write_json,
        write_tensors,
        write_text,
        writing,
    )
    from workbench.storage.process import command, hold, release
    from workbench.storage.typed import read_field, read_typed

_HOMES = {
    "checksum": "digests",
    "command": "process",
    "digest": "digests",
    "discard": "checksums",
    "hold": "process",
    "json_value": "files",
    "located": "assets",
    "map_tensors": "files",
    "read_field": "typed",
    "read_json": "files",
    "read_lines": "files",
    "read_metadata": "files",
    "read_tensors": "files",
    "read_typed": "typed",
    "recovered": "directories",
    "release": "process",
    "replace_directory": "directories",
    "require_replaceable": "directories",
    "sha256": "checksums",
    "write_atomically": "files",
    "write_json": "files",
    "write_tensors": "files",
    "write_text": "files",
    "writing": "files",
}
"""Name -> the file that holds it; it is imported when the name is asked for."""
__all__ = [
    "checksum",
    "command",
    "digest",
    "discard",
    "hold",
    "json_value",
    "located",
    "map_tensors",
    "read_field",
    "read_json",
    "read_lines",
    "read_metadata",
    "read_tensors",
    "read_typed",
    "recovered",
    "release",
    "replace_directory",
    "require_replaceable",
    "sha256",
    "write_atomically",
    "write_json",
    "write_tensors",
    "write_text",
    "writing",
]


def __getattr__(name: str) -> Any:
    """A name of `__all__`: reading a recipe, which needs this room's light files alone, loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
