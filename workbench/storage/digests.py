"""One digest of parts: the key of anything that is computed from them, and what a file says it was made of."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor

CHUNK = 64 * 2**20
"""Bytes of a tensor elsewhere that are brought to the processor at a time."""
Part = str | bytes | Tensor


def digest(*parts: Part, separator: str = "|") -> str:
    """SHA-256 over texts and tensors (their bytes, whatever their dtype and device) in order, with a separator between
    them."""
    known = hashlib.sha256()
    for place, part in enumerate(parts):
        known.update(separator.encode() if place else b"")
        for piece in _bytes(part):
            known.update(piece)
    return known.hexdigest()


def checksum(*parts: Part) -> str:
    """128 bits over the same (XXH3), ten times as fast and no proof against intent: for what this process has seen
    before, never for what is written."""
    known = xxhash.xxh3_128()
    for part in parts:
        for piece in _bytes(part):
            known.update(piece)
    return known.hexdigest()


def _bytes(part: Part) -> Iterator[Any]:
    """Buffers that hold the bytes of a part one after another; no copy is made of what lies in memory as it is read."""
    if isinstance(part, (str, bytes)):
        yield part.encode() if isinstance(part, str) else part
        return
    flat = part.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        yield flat.numpy()
        return
    buffer = torch.empty(min(CHUNK, len(flat)), dtype=torch.uint8)
    for piece in flat.split(CHUNK):
        yield buffer[: len(piece)].copy_(piece).numpy()
