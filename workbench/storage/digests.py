"""One digest of parts: the key of anything that is computed from them, and what a file says it was made of."""

import hashlib

import torch
from torch import Tensor


def digest(*parts: str | bytes | Tensor, separator: str = "|") -> str:
    """SHA-256 over texts and tensors (their bytes, whatever their dtype and device) in order, with a separator between
    them."""
    known = hashlib.sha256()
    for place, part in enumerate(parts):
        known.update(separator.encode() if place else b"")
        known.update(_bytes(part))
    return known.hexdigest()


def _bytes(part: str | bytes | Tensor) -> bytes:
    if isinstance(part, str):
        return part.encode()
    if isinstance(part, bytes):
        return part
    return part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
