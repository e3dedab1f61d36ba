"""The processes of a run: one by itself, or several under `accelerate launch`, each with its share of every batch.

Every process holds the model (under FSDP2 its shard of it, see `sharding.py`), the optimizer and the same random numbers. What they exchange is sums: of the aligned rows, so that the
alignment sees the whole batch, and of the gradients of the trained slices (for a circuit a small part of what DistributedDataParallel, which
knows whole parameters only, would send). All then take the same optimizer step.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError


class Processes:
    """One process by itself."""

    count: int = 1
    index: int = 0
    shards: bool = False
    """Whether the student's weights are sharded over the processes (FSDP2)."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.index == 0

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the processes, which all hold it in the same shape."""
        return list(tensors)

    def wait(self) -> None:
        """Until all processes are here."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do something before the others do it (and find it done on disk)."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


class LaunchedProcesses(Processes):
    """The processes of `accelerate launch`."""

    def __init__(self, state: Any, *, shards: bool = False) -> None:
        self._state, self.count, self.index, self.shards = state, state.num_processes, state.process_index, shards

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In one exchange, element by element in the tensors' own dtype."""
        from accelerate.utils import reduce

        if not tensors:
            return []
        flat = reduce(torch.cat([tensor.detach().flatten() for tensor in tensors]), reduction="sum")
        assert isinstance(flat, Tensor)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()


def launched(device: torch.device | str = "cpu") -> Processes:
    """The processes of this run, from what `accelerate launch` put into the environment.

    Errors: `InputError` under FSDP1, which flattens the parameters that head slices are parts of.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if shards and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "FSDP of version 1 flattens the parameters, so the slices of single heads are not addressable; set `fsdp_version: 2` "
            "(--fsdp_version 2), or launch with `--multi_gpu`, where each process holds the student."
        )
    from accelerate import PartialState

    return LaunchedProcesses(PartialState(cpu=torch.device(device).type == "cpu"), shards=shards)
