"""The processes of a run: one by itself, or several under `accelerate launch`, each with its share of every batch.

Every process holds the model (under FSDP2 its shard of it), the optimizer and the same random numbers. What they
exchange is sums: of the aligned rows, so that the alignment sees the whole batch, and of the gradients of the trained
slices (for a circuit a small part of what DistributedDataParallel, which knows whole parameters only, would send). All
then take the same optimizer step.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) each parameter is sharded by its rows and stays a tensor of its own,
so a head's slice stays addressable: after backward the gradient of a touched parameter is gathered once and cut into
the slices' leaves; after the step the parameter is gathered, the slices are written into it and each process keeps its
rows. Leaves and AdamW's state are whole on every process, as they are small where a circuit trains. Forward and
gradient are those of the unsharded student, to the rounding of sums over processes.

(FSDP1 flattens the parameters of a module into one vector, in which slices are not addressable while it trains.)
"""

import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from workbench.errors import InputError
from workbench.models.hooked_model import Student


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
            "FSDP of version 1 flattens the parameters, so the slices of single heads are not addressable; set "
            "`fsdp_version: 2` "
            "(--fsdp_version 2), or launch with `--multi_gpu`, where each process holds the student."
        )
    from accelerate import PartialState

    return LaunchedProcesses(PartialState(cpu=torch.device(device).type == "cpu"), shards=shards)


def rows_of_all(rows: Sequence[Float[Tensor, "_ _"]]) -> tuple[list[Float[Tensor, "_ _"]], int]:
    """(each matrix with the rows of all processes one below the other, in their order; how many processes there are).

    The own rows stay in the graph. Processes may hold different numbers of rows.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if distributed else 1
    if count == 1:
        return list(rows), 1
    own, device = torch.distributed.get_rank(), rows[0].device
    lengths = [torch.zeros(len(rows), dtype=torch.long, device=device) for _ in range(count)]
    torch.distributed.all_gather(lengths, torch.tensor([len(each) for each in rows], device=device))
    sizes = [[int(length) * each.shape[1] for length, each in zip(held, rows, strict=True)] for held in lengths]
    flat = torch.cat([each.detach().flatten().to(_widest(rows)) for each in rows])
    padded = flat.new_zeros(max(map(sum, sizes)))
    padded[: len(flat)] = flat
    others = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(others, padded)
    parts = [held[: sum(each)].split(each) for held, each in zip(others, sizes, strict=True)]
    return [
        torch.cat(
            [
                matrix if place == own else part[number].view(-1, matrix.shape[1]).to(matrix.dtype)
                for place, part in enumerate(parts)
            ]
        )
        for number, matrix in enumerate(rows)
    ], count


def _widest(rows: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (each.dtype for each in rows))


def shard(student: Student, processes: int) -> None:
    """Shard every block by itself, and what is outside the blocks together, over all processes of the launch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module"
    )  # it warns of in-place changes to the logits, of which there are none
    mesh = init_device_mesh(student.device.type, (processes,))
    hooked: Any = student.model
    for block in hooked.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(hooked, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds a part of it only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one a gathered copy."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradient(parameter: Tensor) -> Tensor | None:
    """All of a parameter's gradient: of a sharded one the sum over the processes, which FSDP has averaged."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        return gradient.full_tensor() * gradient.device_mesh.size()
    return gradient


@torch.no_grad()
def keep_own(parameter: Tensor, value: Tensor) -> None:
    """Set a sharded parameter to a whole value: each process keeps its rows of it."""
    assert isinstance(parameter, DTensor)
    pieces, mine = value.chunk(parameter.device_mesh.size()), parameter.device_mesh.get_local_rank()
    if mine < len(pieces):
        parameter.to_local().copy_(pieces[mine])
