"""How a sweep is carried out, apart from what it measures: with which engine, in how much memory, and where its scores
are kept.

None of it changes a number beyond rounding, so none of it is part of a sweep's identity.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.chunks import memory_on
from workbench.patching.engine.replay import Replay, replay_of
from workbench.tasks.base import PromptPairs

Engine = Literal["replay", "hooks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a sweep is carried out; every public sweep takes one."""

    engine: Engine | None = None
    """`replay` (fast, exact), or `hooks` (hooked forwards of the whole model, slow); None takes the replay wherever it
    agrees with the hooked forward."""
    memory: int | None = None
    """Bytes that one chunk of variants may take; None: 64 MiB on a processor, whose cache larger chunks would leave,
    and a sixteenth of an accelerator's memory."""
    batch: int | None = None
    """Prompts in one forward; None: what suits the sweep (128; 256 for ablation, 32 for gradients)."""
    progress: bool = True
    """Whether a bar shows how far the sweep is."""
    file: str | Path | None = None
    """Where the scores are kept: they are read if they are there; what is found so far stands beside it, and an
    interrupted sweep resumes from that."""

    def __post_init__(self) -> None:
        if self.engine not in (None, "replay", "hooks"):
            raise InputError(f"no engine {self.engine!r}; leave it out, or say 'replay' or 'hooks'.")
        if (self.memory is not None and self.memory < 1) or (self.batch is not None and self.batch < 1):
            raise InputError(f"a sweep needs memory and prompts: memory={self.memory}, batch={self.batch}.")

    @property
    def path(self) -> Path | None:
        """The file as a path."""
        return None if self.file is None else Path(self.file)

    def memory_on(self, device: torch.device) -> int:
        """Bytes that one chunk of variants may take on a device."""
        return memory_on(device) if self.memory is None else self.memory

    def batch_of(self, default: int) -> int:
        """Prompts in one forward."""
        return default if self.batch is None else self.batch

    def replay(self, model: HookedModel, pairs: PromptPairs) -> Replay | None:
        """The replay of the clean prompts, or None where hooked forwards take its place.

        Errors: `InputError` where `replay` is asked for and not to be had.
        """
        replay = None if self.engine == "hooks" else replay_of(model, pairs)
        if replay is None and self.engine == "replay":
            raise InputError(
                f"{model.name} can't be replayed exactly (its blocks do more than the replay knows); leave `engine` "
                "out to go through hooks."
            )
        return replay
