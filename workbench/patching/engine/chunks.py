"""Many variants in chunks that fit a memory budget; a chunk for which memory runs out is halved and done again."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from workbench.errors import InputError

MEMORY = 64 * 2**20
"""Default bytes of one chunk's activations. Larger chunks are not faster on a processor: they leave its cache."""
SHARE = 16
"""On an accelerator a chunk may take its memory over this: of all of it, not of what is free, because the same chunks
round to the same bits."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def memory_on(device: torch.device) -> int:
    """Default bytes of one chunk's activations on a device."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device.type)
    if module is None or not hasattr(module, "mem_get_info"):
        return MEMORY
    return max(MEMORY, module.mem_get_info(device)[1] // SHARE)


def in_chunks(
    items: Sequence[Item],
    size: int,
    work: Callable[[list[Item]], Result],
    *,
    skip: Callable[[list[Item]], bool] = lambda chunk: False,
) -> Iterator[tuple[list[Item], Result]]:
    """(chunk, work(chunk)) over consecutive chunks of at most `size` items, smaller once memory has run out; chunks to
    skip are left out.

    Errors: `InputError` when memory runs out for a single item.
    """
    start = 0
    while start < len(items):
        chunk = list(items[start : start + size])
        if skip(chunk):
            start += len(chunk)
            continue
        try:
            result = work(chunk)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if size == 1 or len(chunk) == 1:
                raise InputError(
                    "memory ran out for a single variant; use fewer prompts in a batch (`batch`), or shorter ones."
                ) from error
            size = max(1, len(chunk) // 2)
            continue
        yield chunk, result
        start += len(chunk)


def _out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out (the processor's allocator raises a plain RuntimeError)."""
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )
