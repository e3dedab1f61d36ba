"""What is written to disk and read back: atomic JSON and safetensors, checkpoints, provenance, bundled files. Never a
pickle."""

from workbench.storage.assets import located
from workbench.storage.checksums import discard, sha256
from workbench.storage.digest import digest
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

__all__ = [
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
    "release",
    "sha256",
    "write_atomically",
    "write_json",
    "write_tensors",
    "write_text",
    "writing",
]
