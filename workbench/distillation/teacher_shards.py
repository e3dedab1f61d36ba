"""The teacher's outputs on disk, in shards that are memory-mapped: for sets that memory does not hold, and training
without a resident teacher.

    FOLDER/<key>/index.json          what was cached, and each shard's rows and SHA-256
    FOLDER/<key>/00000.safetensors   activations by hook name, logits (all, or the largest) and labels of some prompts
    FOLDER/<key>/weights.safetensors W_O of the cached layers

A shard enters the index after it has been written, so an interrupted build goes on at the next one. Every shard is
verified when the cache is opened: a build makes a damaged one again, `TeacherShards.open` (which has no teacher)
refuses it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import storage
from workbench.distillation.teacher_cache import (
    LOGITS,
    TeacherCache,
    cache_key,
    computed,
    output_weights,
    outputs_fingerprint,
    require_cached,
)
from workbench.distillation.top_logits import TopLogits, top_logits
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import Teacher
from workbench.patching.progress import progress_bar
from workbench.tasks.base import PromptPairs

LABELS = "labels"
TOKENS, REST = "logits.tokens", "logits.rest"
"""Of the largest logits: whose they are, and the mass of the others (`TopLogits`)."""
INDEX = "index.json"
WEIGHTS = "weights.safetensors"


class TeacherShards:
    """A complete cache on disk; rows are read where they are asked for."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self._index = folder, index
        self._shards = [storage.map_tensors(folder / shard["file"]) for shard in index["shards"]]
        self._starts = torch.tensor([shard["start"] for shard in index["shards"]])
        self._labels = torch.cat([shard[LABELS] for shard in self._shards])
        weights = storage.read_tensors(folder / WEIGHTS)[0] if index["weights"] else {}
        self.output_weights = {int(layer): value for layer, value in weights.items()}
        content = storage.digest(*(shard["sha256"] for shard in index["shards"]))
        self.fingerprint: str = index.get("fingerprint", content)
        """Of teacher and prompts; of the shards' content where their index is from before it said so."""

    @classmethod
    def open(cls, folder: Path, prompts: PromptPairs) -> "TeacherShards":
        """The cache in a folder (the one that holds `index.json`), without a teacher.

        Errors: `InputError` when it is incomplete, damaged, or of other prompts.
        """
        index = storage.read_json(folder / INDEX)
        if index["prompts"] != prompts.for_teacher.fingerprint():
            raise InputError(
                f"{folder} holds the teacher's outputs on other prompts; build a cache for these with `teacher_shards`."
            )
        held = sum(shard["stop"] - shard["start"] for shard in index["shards"])
        if held < index["count"]:
            raise InputError(
                f"{folder} holds {held} of {index['count']} prompts: its build was interrupted; go on with "
                "`teacher_shards`."
            )
        damaged = [
            entry["file"]
            for entry in [*index["shards"], *filter(None, [index["weights"]])]
            if not _is_sound(folder, entry)
        ]
        if damaged:
            raise InputError(
                f"{', '.join(damaged)} in {folder} is missing or damaged; make it again with `teacher_shards`, which "
                "needs the teacher."
            )
        return cls(folder, index)

    def __len__(self) -> int:
        return self._index["count"]

    def labels_of(self, index: Int[Tensor, " rows"]) -> Int[Tensor, "rows *token"]:
        """Answers of some prompts."""
        return self._labels[index]

    def logits_of(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows *token d_vocab"] | TopLogits:
        """Logits of some prompts, or the largest of them."""
        top = self._index.get("top")
        logits = self._gathered(LOGITS, index)
        if top is None:
            return logits
        return TopLogits(
            tokens=self._gathered(TOKENS, index),
            logits=logits,
            rest=self._gathered(REST, index),
            d_vocab=top["d_vocab"],
            temperature=top["temperature"],
        )

    def rows(self, index: Int[Tensor, " rows"], names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of some prompts by hook name. Errors: `InputError` for a hook that was not cached."""
        require_cached(names, self._index["names"])
        return {name: self._gathered(name, index) for name in names}

    def _gathered(self, name: str, index: Int[Tensor, " rows"]) -> Tensor:
        owner = torch.bucketize(index, self._starts, right=True) - 1
        first = self._shards[0][name]
        gathered = first.new_empty(len(index), *first.shape[1:])
        for shard in owner.unique().tolist():
            here = owner == shard
            gathered[here] = self._shards[shard][name][index[here] - self._starts[shard]]
        return gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """How many of a teacher's logits are kept, and the temperature at which the others are summed."""

    k: int
    temperature: float = 1.0

    def __str__(self) -> str:
        return f"the {self.k} largest logits at temperature {self.temperature:g}"


def teacher_shards(
    teacher: Teacher,
    pairs: PromptPairs,
    names: Sequence[str],
    folder: Path,
    *,
    shard: int = 1024,
    batch: int = 256,
    top: Top | None = None,
) -> TeacherShards:
    """Open the cache for this teacher, these prompts and these hooks in `folder`, after building what of it is missing
    or damaged.

    `shard`: prompts in a file. `batch`: prompts in a forward; where it divides `shard`, the numbers are those of
    `teacher_cache`. `top`: only so many logits are kept, in a cache of its own; None: all.
    """
    hooks.checked(teacher.model, names)
    weights = teacher.fingerprint()
    own = () if top is None else (str(top),)
    place = folder / cache_key(weights, pairs, [*names, *own])
    fingerprint = outputs_fingerprint(weights, pairs)
    index = {
        **_begun(place, pairs, names, shard),
        "fingerprint": fingerprint if top is None else storage.digest(fingerprint, *own),
    }
    if top is not None:
        index["top"] = {**asdict(top), "d_vocab": teacher.d_vocab}
    _keep_weights(place, index, teacher, names)
    starts = range(0, len(pairs), index["shard"])
    for number, start in enumerate(progress_bar(starts, desc="caching the teacher's activations", unit="shard")):
        if number < len(index["shards"]) and _is_sound(place, index["shards"][number]):
            continue
        part = pairs.rows(slice(start, start + index["shard"]))
        written = _written(place / f"{number:05d}.safetensors", computed(teacher, part, names, batch=batch), top)
        index["shards"][number:] = [
            {**written, "start": start, "stop": start + len(part)},
            *index["shards"][number + 1 :],
        ]
        storage.write_json(place / INDEX, index)
    return TeacherShards(place, index)


def _begun(place: Path, pairs: PromptPairs, names: Sequence[str], shard: int) -> dict[str, Any]:
    """The index of an earlier build, or a new one where there is none or it is damaged."""
    try:
        return storage.read_json(place / INDEX)
    except InputError:
        return {
            "prompts": pairs.for_teacher.fingerprint(),
            "count": len(pairs),
            "names": sorted(names),
            "shard": shard,
            "weights": {},
            "shards": [],
        }


def _keep_weights(place: Path, index: dict[str, Any], teacher: Teacher, names: Sequence[str]) -> None:
    weights = {str(layer): value for layer, value in output_weights(teacher, names).items()}
    if not weights or (index["weights"] and _is_sound(place, index["weights"])):
        return  # nothing is aligned, or only patterns are: safetensors can't read a file of no tensors
    storage.write_tensors(place / WEIGHTS, weights)
    index["weights"] = {"file": WEIGHTS, "sha256": storage.sha256(place / WEIGHTS)}
    storage.write_json(place / INDEX, index)


def _written(path: Path, cache: TeacherCache, top: Top | None) -> dict[str, str]:
    storage.write_tensors(path, {**_logits(cache.logits, top), LABELS: cache.labels, **cache.activations})
    return {"file": path.name, "sha256": storage.sha256(path)}


def _logits(logits: Float[Tensor, "batch *token d_vocab"], top: Top | None) -> dict[str, Tensor]:
    if top is None:
        return {LOGITS: logits}
    largest = top_logits(logits, top.k, temperature=top.temperature)
    return {LOGITS: largest.logits, TOKENS: largest.tokens, REST: largest.rest}


def _is_sound(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.exists() and storage.sha256(path) == entry["sha256"]
