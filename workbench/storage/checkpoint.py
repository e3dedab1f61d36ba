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

Identity = str | Mapping[str, str]
"""What a run is made of: one digest, or one for each ingredient by name."""


def save(
    path: Path, *, step: int, leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, identity: Identity
) -> None:
    """Write a checkpoint. `identity` names what the run is made of; another run refuses to resume from it."""
    tensors: dict[str, Tensor] = {f"leaf|{key}": leaf for key, leaf in leaves.items()}
    for key, leaf in leaves.items():
        for name, value in optimizer.state.get(leaf, {}).items():
            tensors[f"state|{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    storage.write_tensors(path, tensors, metadata={"checkpoint": json.dumps({"step": step, "identity": identity})})


def load(
    path: Path, *, leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, identity: Identity
) -> tuple[int, dict[str, Tensor]]:
    """Restore the optimizer's state; returns (step, leaf values). Errors: `InputError` when damaged or of another
    run."""
    tensors, metadata = storage.read_tensors(path)
    described = _described(path, metadata)
    _require_same(path, described.get("identity"), identity)
    values: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("|")
        if kind not in ("leaf", "state") or (kind == "state" and "|" not in rest):
            raise _damaged(path)
        if kind == "leaf":
            values[rest] = value
        else:
            field, key = rest.split("|", 1)
            states.setdefault(key, {})[field] = value
    for key, leaf in leaves.items():
        if key in states:
            optimizer.state[leaf] = states[key]
    if not isinstance(described.get("step"), int):
        raise _damaged(path)
    return described["step"], values


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        described = json.loads(metadata.get("checkpoint", "{}"))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise _damaged(path)
    return described


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is no checkpoint, or a damaged one; delete it, and the training begins anew.")


def _require_same(path: Path, actual: Any, identity: Identity) -> None:
    if actual == identity:
        return
    if isinstance(identity, Mapping) and isinstance(actual, str):
        raise InputError(
            f"{path} was written before 0.2.0, when a checkpoint did not say what it was made of (its teacher least of "
            f"all); delete {path.parent} to train this anew."
        )
    if isinstance(identity, Mapping) and isinstance(actual, dict):
        names = [name for name in {**identity, **actual} if actual.get(name) != identity.get(name)]
        other = f" (here: {', '.join(names)})"
    else:
        other = ""
    raise InputError(
        f"{path} was written by a run with another configuration, model or data{other}; delete the run folder or "
        "resume with the recipe that began it."
    )


def names_ingredients(path: Path) -> bool:
    """Whether a checkpoint says what it was made of, ingredient by ingredient (since 0.2.0)."""
    return isinstance(_described(path, storage.read_metadata(path)).get("identity"), dict)
