"""The teacher's activations by hook name, its logits and its labels, computed once and kept on disk.

The key is the content: the teacher's weights, the prompts, the hook names. Another teacher, other prompts or other hooks make another file,
so a cache is never stale. A damaged file is reported and built again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from workbench import hooks, storage
from workbench.errors import InputError
from workbench.models import Teacher
from workbench.tasks.base import PromptPairs

LOGITS = "logits"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherCache:
    """A teacher's run on the clean prompts: activations by hook name [batch ...] and final logits [batch d_vocab]."""

    activations: dict[str, Tensor]
    logits: Float[Tensor, "batch d_vocab"]
    output_weights: dict[int, Float[Tensor, "head d_head d_model"]]
    """W_O of the layers whose `hook_z` is cached, for alignment of the heads' outputs in the residual stream."""

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        """The teacher's answers: the hard labels of the paper's task loss."""
        return self.logits.argmax(-1)

    def rows(self, index: Int[Tensor, " rows"], names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of some prompts by hook name. Errors: `InputError` for a hook that was not cached."""
        for name in names:
            if name not in self.activations:
                raise InputError(f"hook {name!r} is not in this teacher cache, which holds {sorted(self.activations)}; build it with that name.")
        return {name: self.activations[name][index] for name in names}


def cache_key(teacher_fingerprint: str, pairs: PromptPairs, names: Sequence[str]) -> str:
    """SHA-256 of teacher, prompts and hook names."""
    return hashlib.sha256("|".join([teacher_fingerprint, pairs.fingerprint(), *sorted(names)]).encode()).hexdigest()[:32]


def teacher_cache(teacher: Teacher, pairs: PromptPairs, names: Sequence[str], folder: Path, *, batch: int = 256) -> TeacherCache:
    """Load the cache for this teacher, these prompts and these hooks from `folder`, or compute and keep it."""
    hooks.checked(teacher.model, names)
    path = folder / f"{cache_key(teacher.fingerprint(), pairs, names)}.safetensors"
    if path.exists():
        try:
            tensors, _ = storage.read_tensors(path)
            return TeacherCache(logits=tensors.pop(LOGITS), activations=tensors, output_weights=_output_weights(teacher, names))
        except InputError:
            path.unlink()
    cache = computed(teacher, pairs, names, batch=batch)
    storage.write_tensors(path, {LOGITS: cache.logits, **cache.activations})
    return cache


def computed(teacher: Teacher, pairs: PromptPairs, names: Sequence[str], *, batch: int = 256) -> TeacherCache:
    """Run the teacher on the clean prompts and keep what `teacher_cache` would keep."""
    logits: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in tqdm(list(pairs.batches(batch)), desc="caching the teacher's activations", unit="batch", leave=False):
        final, activations = teacher.activations(part.clean, part.mask, names)
        logits.append(final)
        for name in names:
            found[name].append(activations[name])
    activated = {name: torch.cat(values) for name, values in found.items()}
    return TeacherCache(logits=torch.cat(logits), activations=activated, output_weights=_output_weights(teacher, names))


def _output_weights(teacher: Teacher, names: Sequence[str]) -> dict[int, Tensor]:
    return {layer: teacher.output_weights(layer) for layer in range(teacher.n_layers) if hooks.z(layer) in names}
