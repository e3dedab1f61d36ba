"""The teacher's activations by hook name, its logits and its labels: from one file, held in memory, or from the teacher
as it runs.

A set that does not fit in memory goes to `teacher_shards`. The key is the content: the teacher's weights, the prompts,
the hook names. Another teacher, other prompts or other hooks make another file, so a cache is never stale. A damaged
file is reported and built again. The teacher runs on its own reading of the prompts (`PromptPairs.for_teacher`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import storage
from workbench.distillation.top_logits import TopLogits
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.progress import progress_bar
from workbench.tasks.base import PromptPairs
from workbench.tasks.forcing import answer_columns

LOGITS = "logits"


@runtime_checkable
class TeacherOutputs(Protocol):
    """What distillation asks of a teacher: its outputs on the training prompts, by their place in the training set."""

    @property
    def output_weights(self) -> Mapping[int, Float[Tensor, "head d_head d_model"]]: ...

    @property
    def fingerprint(self) -> str:
        """Of what they were computed from: the teacher's weights and the prompts. It is part of a training's
        identity."""
        ...

    def __len__(self) -> int: ...

    def logits_of(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows *token d_vocab"] | TopLogits: ...

    def labels_of(self, index: Int[Tensor, " rows"]) -> Int[Tensor, "rows *token"]: ...

    def rows(self, index: Int[Tensor, " rows"], names: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherCache:
    """A teacher's run on the clean prompts: activations by hook name [batch ...] and final logits [batch d_vocab]; of
    prompts with whole answers after them (`workbench.tasks.forcing`) the logits of each answer token."""

    activations: dict[str, Tensor]
    logits: Float[Tensor, "batch *token d_vocab"]
    output_weights: dict[int, Float[Tensor, "head d_head d_model"]]
    """W_O of the layers whose `hook_z` is cached, for alignment of the heads' outputs in the residual stream."""
    fingerprint: str
    """`outputs_fingerprint` of the teacher and the prompts."""

    @property
    def labels(self) -> Int[Tensor, "batch *token"]:
        """The teacher's answers: the hard labels of the paper's task loss."""
        return self.logits.argmax(-1)

    def __len__(self) -> int:
        return len(self.logits)

    def logits_of(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows *token d_vocab"]:
        """Logits of some prompts."""
        return self.logits[index]

    def labels_of(self, index: Int[Tensor, " rows"]) -> Int[Tensor, "rows *token"]:
        """Answers of some prompts."""
        return self.logits[index].argmax(-1)

    def rows(self, index: Int[Tensor, " rows"], names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of some prompts by hook name. Errors: `InputError` for a hook that was not cached."""
        require_cached(names, self.activations)
        return {name: self.activations[name][index] for name in names}


class LiveTeacher:
    """The teacher itself, run on each batch: one forward for all that a step asks. No cache, but a resident teacher."""

    def __init__(self, teacher: Teacher, prompts: PromptPairs, names: Sequence[str]) -> None:
        self._teacher, self._prompts, self._names = teacher, prompts.for_teacher, hooks.checked(teacher.model, names)
        self.output_weights = output_weights(teacher, names)
        self.fingerprint = outputs_fingerprint(teacher.fingerprint(), prompts)
        self._index: Int[Tensor, " _"] = torch.empty(0, dtype=torch.long)
        self._last: tuple[Tensor, dict[str, Tensor]] = torch.empty(0), {}

    def __len__(self) -> int:
        return len(self._prompts)

    def _run(self, index: Int[Tensor, " rows"]) -> tuple[Float[Tensor, "rows *token d_vocab"], dict[str, Tensor]]:
        """Of the last forward, where it held these prompts (a step's pieces after the whole), else of a new one."""
        if not torch.isin(index, self._index).all():
            prompts = self._prompts.rows(index)
            self._index = index.clone()
            self._last = self._teacher.activations(
                prompts.clean, prompts.mask, self._names, columns=answer_columns(prompts)
            )
        places = (self._index[None] == index[:, None]).int().argmax(1)
        return self._last[0][places], {name: value[places] for name, value in self._last[1].items()}

    def logits_of(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows *token d_vocab"]:
        """Logits of some prompts."""
        return self._run(index)[0]

    def labels_of(self, index: Int[Tensor, " rows"]) -> Int[Tensor, "rows *token"]:
        """Answers of some prompts."""
        return self._run(index)[0].argmax(-1)

    def rows(self, index: Int[Tensor, " rows"], names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of some prompts by hook name. Errors: `InputError` for a hook that is not captured."""
        require_cached(names, self._names)
        outputs = self._run(index)[1]
        return {name: outputs[name] for name in names}


def require_cached(names: Sequence[str], held: Collection[str]) -> None:
    """Errors: `InputError` for a hook that was not cached."""
    for name in names:
        if name not in held:
            raise InputError(
                f"hook {name!r} is not in this teacher cache, which holds {sorted(held)}; build it with that name."
            )


def cache_key(teacher_fingerprint: str, pairs: PromptPairs, names: Sequence[str]) -> str:
    """SHA-256 of teacher, prompts and hook names."""
    return storage.digest(teacher_fingerprint, pairs.for_teacher.fingerprint(), *sorted(names))[:32]


def outputs_fingerprint(teacher_fingerprint: str, pairs: PromptPairs) -> str:
    """Of a teacher's outputs on some prompts, wherever they are kept."""
    return storage.digest(teacher_fingerprint, pairs.for_teacher.fingerprint())


def teacher_cache(
    teacher: Teacher, pairs: PromptPairs, names: Sequence[str], folder: Path, *, batch: int = 256
) -> TeacherCache:
    """Load the cache for this teacher, these prompts and these hooks from `folder`, or compute and keep it."""
    hooks.checked(teacher.model, names)
    weights = teacher.fingerprint()
    path = folder / f"{cache_key(weights, pairs, names)}.safetensors"
    if path.exists():
        try:
            tensors, _ = storage.read_tensors(path)
            return TeacherCache(
                logits=tensors.pop(LOGITS),
                activations=tensors,
                output_weights=output_weights(teacher, names),
                fingerprint=outputs_fingerprint(weights, pairs),
            )
        except InputError:
            path.unlink()
    cache = computed(teacher, pairs, names, batch=batch)
    storage.write_tensors(path, {LOGITS: cache.logits, **cache.activations})
    return cache


def computed(teacher: Teacher, pairs: PromptPairs, names: Sequence[str], *, batch: int = 256) -> TeacherCache:
    """Run the teacher on the clean prompts and keep what `teacher_cache` would keep."""
    logits: list[Tensor] = []
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in progress_bar(
        list(pairs.for_teacher.batches(batch)), desc="caching the teacher's activations", unit="batch"
    ):
        final, activations = teacher.activations(part.clean, part.mask, names, columns=answer_columns(part))
        logits.append(final)
        for name in names:
            outputs[name].append(activations[name])
    activated = {name: torch.cat(values) for name, values in outputs.items()}
    return TeacherCache(
        logits=torch.cat(logits),
        activations=activated,
        output_weights=output_weights(teacher, names),
        fingerprint=outputs_fingerprint(teacher.fingerprint(), pairs),
    )


def output_weights(teacher: Teacher, names: Sequence[str]) -> dict[int, Tensor]:
    """W_O of the layers whose `hook_z` is named."""
    return {layer: teacher.output_weights(layer) for layer in range(teacher.n_layers) if hooks.z(layer) in names}
