"""Recipes: one YAML per experiment, read into frozen, checked values. An unknown key is an error that names the nearest
known one."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from dataclasses import dataclass as plain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from workbench.circuits.config import DiscoveryConfig, ReplacementKind
from workbench.distillation.config import AlignmentConfig, EndpointConfig, TeacherSource, TrainingConfig
from workbench.errors import InputError, nearest
from workbench.experiment.conditions import CONDITIONS, TABLE, Condition, ConditionName
from workbench.experiment.upgrades import SCENES, upgraded_recipe
from workbench.matching.config import MatchingConfig
from workbench.models.names import Attention
from workbench.storage import yaml
from workbench.storage.yaml import Settings, overridden, parse_config
from workbench.tasks.allotment import USES, Use
from workbench.tasks.settings import PromptConfig
from workbench.tasks.stages import Stage, require_stages

__all__ = ["Recipe", "parse_config", "parse_recipe", "read_recipe", "read_yaml", "to_plain", "written_recipe"]

STRICT = ConfigDict(extra="forbid")
Dtype = Literal["float32", "float64", "bfloat16", "float16", "auto"]
RECIPES = Path(__file__).parents[1] / "recipes"
"""The bundled recipes, in folders by what reads them: `runs`, `studies`, `finetunings`."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DataConfig:
    """Which prompts: a task of the workbench, or a file of the user's own pairs."""

    task: str = "entity_tracking"
    """A task by name (an entry point of the group `workbench.tasks`)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task, e.g. `{boxes: 5}`."""
    pairs: str | None = None
    """A JSONL, CSV or Parquet file, or a hub id, with columns clean, corrupt, answer, distractor, positions; replaces
    `task`."""
    reference: Literal["calibration", "corrupt"] = "calibration"
    """Prompts of the ablation's means: calibration prompts of their own, or the corrupt prompts of the pairs (for small
    files of pairs)."""
    skip_bad_rows: bool = False
    """Of `pairs`: leave bad rows out, with their number and reasons in the log, in place of refusing the file."""
    reference_scenes: Annotated[int, Field(ge=1)] | None = None
    """Calibration scenes for the means of the ablation (rows, with `pairs`). None here and below: of a task 40, 20, 10,
    0 and 80; of a file a share of the rows that the chosen sizes leave (`workbench.tasks.allotment`)."""
    discovery_scenes: Annotated[int, Field(ge=1)] | None = None
    """Calibration scenes that circuits are found and heads matched on (rows, with `pairs`)."""
    train_scenes: Annotated[int, Field(ge=1)] | None = None
    validation_scenes: Annotated[int, Field(ge=0)] | None = None
    """Scenes for the evaluations during training (`training.evaluate_every`), apart from training and test (rows, with
    `pairs`)."""
    test_scenes: Annotated[int, Field(ge=0)] | None = None
    seed: int = 0
    """Of the drawn scenes; the training seeds are apart."""
    prompts: PromptConfig = Field(default_factory=PromptConfig)
    """How they are put to the models: chat template, BOS, padding, answers of several tokens."""
    per_position_means: bool = True
    """Means of the ablation position by position (prompts of one length), or over all positions."""

    def __post_init__(self) -> None:
        if self.pairs is None and self.test_scenes == 0:
            raise InputError("a task's results need test scenes; set data.test_scenes above 0.")

    @property
    def named_task(self) -> str | None:
        """The task by name; None for pairs of a file."""
        return self.task if self.pairs is None else None

    @property
    def sizes(self) -> dict[Use, int | None]:
        """Scenes (or rows) of each use; None for a share of a file's rows."""
        chosen: dict[Use, int | None] = {use: getattr(self, f"{use}_scenes") for use in USES}
        if self.pairs is not None:
            return chosen
        return {use: SCENES[use] if size is None else size for use, size in chosen.items()}


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TransferConfig:
    """Another task that trained models are evaluated on: what did training on the recipe's task do to it?"""

    task: str
    """A task by name."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task."""
    scenes: Annotated[int, Field(ge=1)] = 200
    """Test scenes (of entity tracking as many times its boxes prompts)."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """How circuits are evaluated."""

    scope: Literal["positions", "everywhere"] = "positions"
    ablation: ReplacementKind = "mean"
    """What stands in for the heads outside a circuit: their mean over reference prompts (Prakash, the paper), their
    output on a drawn reference prompt (`resampled`), on the prompt's own corrupt counterpart (MIB), which leaves in
    place whatever the two prompts have in common, or `zero`, which alone sees a head whose output is constant over the
    prompts."""
    random_circuits: Annotated[int, Field(ge=1)] = 5
    curve: bool = True
    """After discovery: faithfulness over circuit size on the test prompts, with random rankings beside it; the
    circuit's own report is made either way."""
    curve_scope: Literal["same", "everywhere"] = "same"
    """Where the curve keeps heads: as the report does (`scope`), or at all positions, where all heads are the model."""
    curve_prompts: Annotated[int, Field(ge=1)] = 300
    """The curve is measured on at most so many test prompts, which bounds its cost."""
    edges: Annotated[int, Field(ge=0)] = 0
    """After discovery: on how many discovery prompts exact path effects among the circuit's heads are measured, for its
    graph; 0: not."""
    shared_prefixes: bool = True
    """Prompts that begin alike (the questions of a scene) run as one prefix and its continuations where whole models
    are evaluated and heads are ablated everywhere, in discovery's curve too: the same answers, logits to float32
    rounding. Off: prompt by prompt."""
    attention: Attention = "eager"
    """Of whole models and ablated ones on the test prompts; see `training.attention`."""
    transfer: tuple[TransferConfig, ...] = ()
    """Other tasks that every trained model is evaluated on, full models only."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Recipe:
    """An experiment: models, prompts, discovery, matching, training, evaluation."""

    title: str = "Circuit distillation"
    teacher: str
    """A model to load; with an `endpoint`, the model's name there."""
    student: str | None = None
    endpoint: EndpointConfig | None = None
    """Where the teacher answers, in place of being loaded. It labels and teaches by KL; it has no activations, so
    nothing of it is discovered, matched or aligned: conditions without alignment alone, of the whole student or (with
    `training.heads: circuit`) of the student's own circuit."""
    dtype: Dtype = "float32"
    """`auto`: as each model's weights were saved."""
    teacher_dtype: Dtype | None = None
    """Of the teacher, which never trains; None: `dtype`."""
    teacher_quantisation: Literal["int8", "nf4"] | None = None
    """Hold the teacher's matrices in 8 bits (torchao) or 4 (bitsandbytes), which the student's, that train, can't be.
    A folder of weights that are quantised already needs no setting."""
    teacher_device_map: str | dict[str, str | int] | None = None
    """Where the parts of the teacher lie, as `accelerate` takes it: `auto` or `balanced` spread it over several
    accelerators. None: on `device`, where the student and the prompts are."""
    device: str = "cpu"
    data: DataConfig = Field(default_factory=DataConfig)
    stages: tuple[Stage, ...] | None = None
    """Stages of the backward search in place of the task's own."""
    discovery: DiscoveryConfig = Field(default_factory=DiscoveryConfig)
    matching: MatchingConfig = Field(default_factory=MatchingConfig)
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    save_students: bool = True
    """Keep each trained student as a Hugging Face directory in the run folder."""
    teacher_outputs: TeacherSource = "memory"
    """The teacher's activations and logits for training: a file that memory holds, memory-mapped shards, or the teacher
    run on each batch."""
    teacher_top: Annotated[int, Field(ge=1)] | None = None
    """Of shards: keep the teacher's so many largest logits and the mass of the others, in place of all; the KL and
    Jensen-Shannon losses then see the others as one outcome. None: all."""
    train_kv: bool = True
    """With grouped-query attention: whether a matched head's shared key-value group is trained too."""
    conditions: tuple[ConditionName, ...] = tuple(condition.name for condition in TABLE if condition.usual)
    seeds: tuple[int, ...] = (0,)
    learning_rates: dict[ConditionName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Of conditions that need another one than `training.learning_rate`: what trains everything, for one."""

    def __post_init__(self) -> None:
        if self.training.alignment is not None:
            raise InputError("a recipe has its alignment beside its training; set `alignment`, not training.alignment.")
        if self.teacher_top is not None and self.teacher_outputs != "shards":
            raise InputError("teacher_top is of the teacher's shards; set `teacher_outputs: shards`.")
        require_stages(self.stages or ())
        if self.endpoint is not None:
            self._require_endpoint()

    def _require_endpoint(self) -> None:
        """Refuse what an endpoint's teacher can't do."""
        aligned = [name for name in self.conditions if CONDITIONS[name].aligns]
        if aligned:
            raise InputError(
                f"the conditions {', '.join(aligned)} align activations, and an endpoint gives none; name conditions "
                "without alignment (base, full_ce, full_kl, circuit_ce), or load the teacher."
            )
        if self.training.heads == "matched" and any(CONDITIONS[name].trains == "circuit" for name in self.conditions):
            raise InputError(
                "no heads are matched to a teacher behind an endpoint; set `training.heads: circuit` to train the "
                "student's own circuit, or leave the condition circuit_ce out."
            )
        if self.student is None:
            raise InputError("an endpoint's teacher has nothing to discover; add `student: <directory or hub id>`.")
        own = [self.teacher_dtype, self.teacher_quantisation, self.teacher_device_map, self.teacher_top]
        if any(value is not None for value in own) or self.teacher_outputs != "memory":
            raise InputError(
                "teacher_dtype, teacher_quantisation, teacher_device_map, teacher_outputs and teacher_top are of a "
                "teacher that is loaded; leave them out with an endpoint (endpoint.top is its own)."
            )

    def training_of(self, condition: Condition) -> TrainingConfig:
        """The training with a condition's losses."""
        return replace(
            self.training,
            task_loss=condition.task_loss or self.training.task_loss,
            alignment=self.alignment if condition.aligns else None,
            learning_rate=self.learning_rates.get(condition.name, self.training.learning_rate),
        )


def read_recipe(source: str | Path, *, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file or the name of a bundled one, with top-level or dotted overrides (`{"training.steps":
    20}`).

    Errors: `InputError` naming the key and the nearest known one.
    """
    return parse_recipe(read_yaml(source), overrides=overrides)


Kind = Literal["run", "study", "finetuning"]
FOLDERS: Mapping[str, Kind] = {"runs": "run", "studies": "study", "finetunings": "finetuning"}
"""Folder of the bundled recipes -> what they are."""


@plain(frozen=True, slots=True, kw_only=True)
class BundledRecipe:
    """A recipe that comes with the workbench."""

    name: str
    kind: Kind
    file: Path

    @property
    def title(self) -> str:
        """What it says of itself, or what it makes of which model."""
        value = yaml.read_yaml(self.file)
        return value.get("title") or f"{value['model']} on {value.get('rows', value.get('task', 'entity_tracking'))}"


def bundled_recipes() -> list[BundledRecipe]:
    """All bundled recipes: runs, studies and fine-tunings, each kind by name."""
    return [
        BundledRecipe(name=file.stem, kind=kind, file=file)
        for folder, kind in FOLDERS.items()
        for file in sorted((RECIPES / folder).glob("*.yaml"))
    ]


def read_yaml(source: str | Path) -> Settings:
    """The plain values of a YAML file, or of a bundled recipe by its name. Errors: `InputError` for no such file, or no
    mapping."""
    bundled = {each.name: each.file for each in bundled_recipes()}
    path = yaml.existing(source) or bundled.get(str(source))
    if path is None:
        raise InputError(
            f"no recipe {str(source)!r}: neither a file nor a bundled recipe; {nearest(str(source), bundled)}"
        )
    return yaml.read_yaml(path)


def parse_recipe(value: Mapping[str, Any], *, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from plain values, in the form of today or of before (`workbench.experiment.upgrades`). Errors:
    `InputError` naming the key and the nearest known one."""
    plain = Settings(upgraded_recipe(value), file=getattr(value, "file", ""), lines=getattr(value, "lines", {}))
    given = overridden(plain, overrides)
    settings = Settings(upgraded_recipe(given, set_last=True), file=given.file, lines=given.lines)
    recipe = parse_config(Recipe, settings)
    if recipe.data.pairs is None:
        _require_task(recipe.data, yaml.located(("data",), settings.lines, settings.file))
    _require_options(recipe.discovery, yaml.located(("discovery", "options"), settings.lines, settings.file))
    return recipe


def _require_options(discovery: DiscoveryConfig, where: str) -> None:
    """Refuse options that the method of discovery does not take: last, because a method loads torch."""
    if not discovery.options:
        return
    from workbench.circuits.methods.registry import method_named

    try:
        method_named(discovery.method, discovery.options)
    except InputError as error:
        raise InputError(f"{where}recipe key discovery.options: {error}") from None


def _require_task(data: DataConfig, where: str) -> None:
    """Refuse a task that is not there, or that does not take these options: last, because a task loads torch."""
    from workbench.tasks.registry import task_named

    try:
        task_named(data.task, data.options)
    except InputError as error:
        raise InputError(f"{where}recipe key data: {error}") from None


def written_recipe(value: Mapping[str, Any]) -> Recipe:
    """The recipe that a run has written into its `run.json`, now or before."""
    return parse_config(Recipe, upgraded_recipe(overridden(value, None), written=True))


def to_plain(config: Any) -> dict[str, Any]:
    """A recipe, or any other configuration, as plain JSON values."""
    return json.loads(json.dumps(asdict(config)))
