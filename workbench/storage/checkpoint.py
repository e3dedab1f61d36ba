"""Exact checkpoints of a training run: leaves, optimizer state and step, as one safetensors file written atomically.

Batches are a function of (seed, step), so nothing else needs saving, and a resumed run ends with the same bits as an
uninterrupted one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench import storage
from workbench.errors import InputError


def save(
    path: Path, *, step: int, leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, identity: str
) -> None:
    """Write a checkpoint. `identity` names the run's configuration; another one refuses to resume from it."""
    tensors: dict[str, Tensor] = {f"leaf|{key}": leaf for key, leaf in leaves.items()}
    for key, leaf in leaves.items():
        for name, value in optimizer.state.get(leaf, {}).items():
            tensors[f"state|{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    storage.write_tensors(path, tensors, metadata={"checkpoint": json.dumps({"step": step, "identity": identity})})


def load(
    path: Path, *, leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, identity: str
) -> tuple[int, dict[str, Tensor]]:
    """Restore the optimizer's state; returns (step, leaf values). Errors: `InputError` when damaged or of another
    run."""
    tensors, metadata = storage.read_tensors(path)
    try:
        described: Any = json.loads(metadata.get("checkpoint", "{}"))
    except (ValueError, RecursionError):
        described = None
    damaged = InputError(f"{path} is no checkpoint, or a damaged one; delete it, and the run begins anew.")
    if not isinstance(described, dict):
        raise damaged
    if described.get("identity") != identity:
        raise InputError(
            f"{path} was written by a run with another configuration, model or data; delete the run folder or resume "
            "with the recipe that began it."
        )
    values: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("|")
        if kind not in ("leaf", "state") or (kind == "state" and "|" not in rest):
            raise damaged
        if kind == "leaf":
            values[rest] = value
        else:
            field, key = rest.split("|", 1)
            states.setdefault(key, {})[field] = value
    for key, leaf in leaves.items():
        if key in states:
            optimizer.state[leaf] = states[key]
    if not isinstance(described.get("step"), int):
        raise damaged
    return described["step"], values
