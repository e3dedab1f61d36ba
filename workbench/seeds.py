"""Local random generators, derived from a seed and labels, and splits by hash; nothing here touches global state.

The same (seed, labels) gives the same stream on every machine, whatever ran before: a step that derives its own
generator can be resumed, reordered or run alone.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch

Split = Literal["train", "calibration", "test"]


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed from a seed and labels, by SHA-256."""
    text = "\x1f".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU `torch.Generator` for this seed and these labels."""
    return torch.Generator().manual_seed(derive(seed, *labels))


def chooser(seed: int, *labels: str | int) -> random.Random:
    """A `random.Random` for this seed and these labels, for drawing words and samples of Python objects."""
    return random.Random(derive(seed, *labels))


def split(words: Iterable[str], *, train: int = 8, calibration: int = 1) -> Split:
    """The split that a set of words belongs to, whatever their order: so many tenths train, so many calibration, the
    rest test, by SHA-256."""
    tenth = int.from_bytes(hashlib.sha256("|".join(sorted(words)).encode()).digest()[:4], "big") % 10
    return "train" if tenth < train else "calibration" if tenth < train + calibration else "test"


def local(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> AbstractContextManager[None]:
    """Torch's global generator seeded inside the context (dropout and initialisation know no other), and as it was
    after it."""
    return seeded(derive(seed, *labels), device=device)


@contextmanager
def seeded(number: int, *, device: torch.device | str = "cpu") -> Iterator[None]:
    """`local` with the generator's own number: what the bundled models were initialised with."""
    devices = [] if torch.device(device).type == "cpu" else [torch.device(device)]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(number)
        yield
