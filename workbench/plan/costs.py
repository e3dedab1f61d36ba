"""What is planned: a stage's cost, the models' sizes, and all of it as JSON or a table."""

from dataclasses import asdict, dataclass
from typing import Any

from workbench.experiment.results import in_columns

FLOPS = 312e12
"""Default peak rate of an accelerator: 16-bit matrix products of an A100 (its data sheet's figure, without
sparsity)."""
UTILISATION = 0.3
"""Default share of the peak rate that is reached; many small products reach less, so measure one stage and set it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What a stage costs, all its repeats together."""

    name: str
    what: str
    """Of what and how often, in words."""
    operations: int
    forwards: float
    """Operations in plain forwards of the same model over the same prompts."""
    memory: int
    """Bytes at the peak, weights of the resident models included."""
    disk: int = 0
    """Bytes that are written and stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A model's size."""

    role: str
    name: str
    parameters: int
    weight_bytes: int
    heads: int
    trained_heads: int | None = None
    """At most so many heads train where a condition trains heads."""
    trained_parameters: int | None = None
    """At most so many scalars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run or a study, stage by stage."""

    title: str
    models: tuple[ModelCost, ...]
    stages: tuple[StageCost, ...]
    flops: float
    utilisation: float
    notes: tuple[str, ...] = ()

    def hours(self, operations: int) -> float:
        """operations / (rate x utilisation)."""
        return operations / (self.flops * self.utilisation) / 3600

    @property
    def operations(self) -> int:
        """Of all stages."""
        return sum(stage.operations for stage in self.stages)

    @property
    def memory(self) -> int:
        """Bytes at the highest stage's peak."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes of all stages."""
        return sum(stage.disk for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, totals and hours included."""
        stages = [{**asdict(stage), "hours": self.hours(stage.operations)} for stage in self.stages]
        totals = {
            "operations": self.operations,
            "hours": self.hours(self.operations),
            "memory": self.memory,
            "disk": self.disk,
        }
        return {**asdict(self), "stages": stages, "total": totals}

    def text(self) -> str:
        """Two tables: models, and stages with their total."""
        models = [
            ("model", "parameters", "weights", "heads", "train at most"),
            *(_model_cells(model) for model in self.models),
        ]
        stages = [
            ("stage", "what", "forwards", "operations", "hours", "peak memory", "disk"),
            *(self._cells(stage) for stage in self.stages),
        ]
        total = (
            "total",
            "",
            "",
            f"{self.operations:.2e}",
            _hours(self.hours(self.operations)),
            _bytes(self.memory),
            _bytes(self.disk),
        )
        rate = (
            f"hours at {self.flops:.3g} operations a second, {self.utilisation:.0%} of them reached (--flops, "
            "--utilisation)"
        )
        return "\n".join([self.title, "", in_columns(models), "", in_columns([*stages, total]), "", rate, *self.notes])

    def _cells(self, stage: StageCost) -> tuple[str, ...]:
        memory, disk = _bytes(stage.memory), _bytes(stage.disk) if stage.disk else "-"
        return (
            stage.name,
            stage.what,
            f"{stage.forwards:,.1f}",
            f"{stage.operations:.2e}",
            _hours(self.hours(stage.operations)),
            memory,
            disk,
        )


def _model_cells(model: ModelCost) -> tuple[str, ...]:
    train = "-"
    if model.trained_parameters is not None:
        share = model.trained_parameters / model.parameters
        train = f"{model.trained_heads} heads, {model.trained_parameters:,} parameters ({share:.1%})"
    return f"{model.role} {model.name}", f"{model.parameters:,}", _bytes(model.weight_bytes), str(model.heads), train


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours >= 0.01 else f"{hours:.1e}"


def _bytes(count: int) -> str:
    """In the unit that leaves one to three digits before the point."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    value, step = float(count), 0
    while value >= 1000 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {units[step]}"
