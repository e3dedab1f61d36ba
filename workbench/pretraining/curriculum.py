"""A model in training on batches from easy to hard, resumable to the bit: what all bundled models' trainings share.

Plain training stalls at "some word of the context": moving things together, moving the question to the last token, and
matching the two must appear together. Temporary linear probes on the residual stream get past it (they are no part of a
saved model), and levels from easy to hard. Every batch is a function of (seed, step, levels) alone, so an interrupted
training resumes to the same bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from workbench import seeds, storage
from workbench.errors import InputError
from workbench.patching.progress import progress_bar
from workbench.pretraining.config import CurriculumConfig
from workbench.storage import checkpoint


class Curriculum(ABC):
    """A model, its probes and its optimizer. What a step's batches are and when it gets harder, a subclass says."""

    def __init__(self, model: LlamaForCausalLM, probes: nn.ModuleDict, config: CurriculumConfig, *, label: str) -> None:
        self.model, self.probes, self.label, self._config = model, probes, label, config
        self.leaves = {
            f"{part}.{name}": p
            for part, module in (("model", model), ("probes", probes))
            for name, p in module.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self.leaves.values(), lr=config.learning_rate, betas=(0.9, 0.98))
        self.step = 0
        self.log: list[dict[str, float]] = []

    @abstractmethod
    def backward(self) -> dict[str, float]:
        """Gradients of this step's batches; returns the step's row of the log."""

    @abstractmethod
    def standing(self) -> dict[str, str]:
        """Levels and accuracies, for the progress bar."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights, optimizer and log, as JSON."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""

    @abstractmethod
    def identity(self) -> str:
        """All that the training depends on; a checkpoint of another identity is refused."""

    def rate(self) -> float:
        """The learning rate of this step."""
        return self._config.rate(self.step)

    def advance(self) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        row = self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip)
        self.optimizer.step()
        self.log.append(row)
        self.step += 1

    def steps(self, folder: Path) -> Iterator[None]:
        """Step after step with a progress bar, checkpoints in `folder`; the caller ends it. Errors: `InputError` when
        `max_steps` are used up."""
        config = self._config
        with progress_bar(
            total=config.max_steps, initial=self.step, desc=f"training the {self.label}", unit="step"
        ) as bar:
            while self.step < config.max_steps:
                self.advance()
                bar.update()
                bar.set_postfix(self.standing())
                yield
                if self.step % config.checkpoint_every == 0:
                    self.save(folder)
        raise InputError(
            f"the {self.label} did not get there in {config.max_steps} steps; change seed, learning_rate or max_steps."
        )

    def save(self, folder: Path) -> None:
        """Write an exact checkpoint."""
        storage.write_json(folder / f"state-{self.step}.json", self.state() | {"log": self.log})
        checkpoint.save(
            folder / "checkpoint.safetensors",
            step=self.step,
            leaves=self.leaves,
            optimizer=self.optimizer,
            identity=self.identity(),
        )
        for old in folder.glob("state-*.json"):
            if old.name != f"state-{self.step}.json":
                old.unlink()

    def resume(self, folder: Path) -> None:
        """Go on from the last checkpoint, if there is one."""
        file = folder / "checkpoint.safetensors"
        if not file.exists():
            return
        self.step, values = checkpoint.load(
            file, leaves=self.leaves, optimizer=self.optimizer, identity=self.identity()
        )
        state = storage.read_json(folder / f"state-{self.step}.json")
        self.log = state.pop("log")
        self.restore(state)
        with torch.no_grad():
            for key, leaf in self.leaves.items():
                leaf.copy_(values[key])


def linear_probes(model: LlamaForCausalLM, names: Iterable[str], *, outputs: int, seed: int) -> nn.ModuleDict:
    """A linear map from the residual stream to words for each name; the global random state is left as it was."""
    with seeds.local(seed, "probes"):
        return nn.ModuleDict({name: nn.Linear(model.config.hidden_size, outputs) for name in names})
