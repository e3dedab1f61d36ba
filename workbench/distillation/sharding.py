"""A student whose weights are sharded over the processes (FSDP2, `torch.distributed.fsdp.fully_shard`), trained on slices all the same.

FSDP2 shards each parameter by its rows and keeps it a tensor of its own, so a head's slice stays addressable: after backward the gradient of a touched
parameter is gathered once and cut into the slices' leaves; after the step the parameter is gathered, the slices are written into it and each
process keeps its rows. Leaves and AdamW's state are whole on every process, as they are small where a circuit trains. Forward and
gradient are those of the unsharded student, to the rounding of sums over processes.

(FSDP1 flattens the parameters of a module into one vector, in which slices are not addressable while it trains.)
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from workbench.models import Student


def shard(student: Student, processes: int) -> None:
    """Shard every block by itself, and what is outside the blocks together, over all processes of the launch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # it warns of in-place changes to the logits, of which there are none
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
