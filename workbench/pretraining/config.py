"""Settings of the bundled models, and of fine-tuning a model of one's own."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class SizeConfig:
    """The size of a Llama-style model: grouped-query attention, RMSNorm, rotary positions, untied embeddings."""

    layers: Annotated[int, Field(ge=1)] = 6
    heads: Annotated[int, Field(ge=1)] = 8
    kv_heads: Annotated[int, Field(ge=1)] = 4
    d_head: Annotated[int, Field(ge=2)] = 16
    d_model: Annotated[int, Field(ge=8)] = 64
    d_mlp: Annotated[int, Field(ge=8)] = 128
    init_std: float = 0.06
    embedding_std: float | None = None
    """Of the token embeddings, where it is to be another than `init_std`: a word must not drown in what the first layer
    writes over it."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CurriculumConfig:
    """What the trainings of all bundled models share."""

    seed: int = 1
    learning_rate: float = 3e-3
    warmup: int = 50
    clip: float = 1.0
    probe_weight: float = 0.5
    """Weight of the temporary probes; they are dropped once what they are there for is solved."""
    max_steps: int = 4000
    checkpoint_every: int = 50

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CourseConfig(CurriculumConfig):
    """How a model is trained on lessons."""

    tokens: Annotated[int, Field(ge=2)] = 1400
    """Tokens of each lesson in a step, so that every lesson costs the same; half of them once the lesson is solved."""
    rows: Annotated[int, Field(ge=2)] = 64
    """Most exercises of a lesson in a step, however short they are."""
    at_level: float = 0.6
    """Share of a lesson's batches at its level at work; the others are drawn from all levels up to it."""
    forgetting: float = 0.1
    """Share of the newest batch in the running accuracy."""
    passed: float = 0.9
    """Running accuracy on first questions that leads to the next level."""
    stop_at: float = 0.97
    """The same at the last level: the lesson is solved."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class FinetuningConfig:
    """How a model is fine-tuned on a task, or on rows of text."""

    model: str
    """A directory, hub id or GGUF file."""
    task: str = "entity_tracking"
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task, e.g. `{boxes: 3}`."""
    rows: str | None = None
    """A JSONL, CSV or Parquet file, or a data set's hub id, in place of `task`: a scene is then a row. Rows are split
    by the hash of their prompts: 8 in 10 train, 1 for the accuracy during training, 1 for the last."""
    prompt: tuple[str, ...] = ("{prompt}",)
    """Of `rows`: the prompt with the names of columns in braces; of several, the first whose columns are all filled
    (Alpaca's with and without an input)."""
    answer: str = "{answer}"
    """Of `rows`: what follows the prompt, and is trained on; the end-of-text token is added."""
    longest: Annotated[int, Field(ge=2)] = 512
    """Of `rows`: most tokens of a prompt and its answer; longer rows are left out, with their number in the log."""
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Only these layers of the model, in this order: a shallower model of its lineage, which training then heals."""
    trains: Literal["blocks", "all"] = "blocks"
    """Everything but the embeddings, or everything."""
    seed: int = 0
    scenes: Annotated[int, Field(ge=1)] = 8
    """Training scenes of a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up, to 0 at `steps`: the schedules of `transformers`."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["full", "bf16"] = "full"
    """`bf16`: forwards under autocast to bfloat16; weights, losses and the optimizer stay in float32."""
    steps: Annotated[int, Field(ge=1)] = 400
    """At most."""
    evaluate_every: Annotated[int, Field(ge=1)] = 20
    evaluation_scenes: Annotated[int, Field(ge=1)] = 40
    """Scenes of the calibration split that accuracy is taken on during training; the last one is taken on as many of
    the test split."""
    stop_at: Annotated[float, Field(gt=0, le=1)] | None = None
    """Accuracy on the calibration scenes that ends the training; None: all steps."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    device: str = "cpu"
    """Where the model trains."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights, losses and optimizer. Half precision is for forwards alone: `precision: bf16`."""

    def described(self) -> dict[str, Any]:
        """What the training depends on: all but the device, and what came later only where it is not the usual one
        (files from before there was a choice say nothing of it)."""
        values = asdict(self)
        return {
            name: value
            for name, value in values.items()
            if name != "device" and not (name in LATER and value == LATER[name])
        }


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GenerationConfig:
    """Rows of text that a model writes itself, after beginnings of a task's train prompts."""

    model: str
    """A directory, hub id or GGUF file."""
    task: str = "entity_tracking"
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task."""
    rows: Annotated[int, Field(ge=1)] = 1000
    tokens: Annotated[int, Field(ge=1)] = 48
    """At most, of each row's continuation; it ends before where the model ends its text."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: always the likeliest token."""
    batch: Annotated[int, Field(ge=1)] = 50
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"

    def described(self) -> dict[str, Any]:
        """What the rows depend on."""
        return {name: value for name, value in asdict(self).items() if name != "device"}


LATER: dict[str, Any] = {
    "dtype": "float32",
    "rows": None,
    "prompt": ("{prompt}",),
    "answer": "{answer}",
    "longest": 512,
    "schedule": "constant",
}
"""Settings that came later, at what they were before there was a choice."""
