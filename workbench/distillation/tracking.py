"""The training log in TensorBoard, Weights & Biases or trackio, through accelerate's trackers; the JSONL file is
written in any case."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from workbench.distillation.config import TrainingConfig
from workbench.distillation.reports import StepReport
from workbench.errors import InputError


class Tracking:
    """Open trackers; without any, it does nothing."""

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator

    def log(self, report: StepReport) -> None:
        """A step's numbers, by name; each pair's CKA under `cka/`."""
        if self._accelerator is not None:
            self._accelerator.log(scalars(report), step=report.step)


def scalars(report: StepReport) -> dict[str, float]:
    """A report's numbers by name, without the losses that the run leaves out."""
    plain = {
        name: value for name, value in asdict(report).items() if name not in ("step", "ckas") and value is not None
    }
    return {**plain, **{f"cka/{pair}": value for pair, value in report.ckas.items()}}


@contextmanager
def tracking(config: TrainingConfig, folder: Path, label: str, *, device: torch.device) -> Iterator[Tracking]:
    """The trackers that the configuration names, in `folder`, closed at the end. Errors: `InputError` for one whose
    package is missing."""
    if not config.trackers:
        yield Tracking()
        return
    require_installed(config.trackers)
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(config.trackers), project_dir=folder, cpu=device.type == "cpu")
    accelerator.init_trackers(
        "circuit-distillation", config=_flat(asdict(config)), init_kwargs=_options(config.trackers, folder, label)
    )
    try:
        yield Tracking(accelerator)
    finally:
        for tracker in accelerator.trackers:  # `end_training` would also end the process group of the next run
            tracker.finish()


def require_installed(trackers: Sequence[str]) -> None:
    """Refuse a tracker whose package is missing, before anything is trained."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f'the tracker {name!r} needs its package: pip install "circuit-distillation-workbench[trackers]", or '
                f"pip install {name}."
            )


def _options(trackers: Sequence[str], folder: Path, label: str) -> dict[str, dict[str, Any]]:
    known = {"wandb": {"name": label, "dir": str(folder)}, "trackio": {"name": label}}
    return {name: known[name] for name in trackers if name in known}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in config.items()
    }
