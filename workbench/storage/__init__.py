"""What is written to disk and read back: atomic JSON and safetensors, checkpoints, provenance, bundled files. Never a
pickle."""

from workbench.storage.assets import located
from workbench.storage.digest import digest
from workbench.storage.directories import recovered, replace_directory, require_replaceable
from workbench.storage.files import (
    map_tensors,
    read_json,
    read_metadata,
    read_tensors,
    sha256,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)
from workbench.storage.process import command, hold, release

__all__ = [
    "command",
    "digest",
    "hold",
    "located",
    "map_tensors",
    "read_json",
    "read_metadata",
    "read_tensors",
    "recovered",
    "release",
    "replace_directory",
    "require_replaceable",
    "sha256",
    "write_atomically",
    "write_json",
    "write_tensors",
    "write_text",
]
