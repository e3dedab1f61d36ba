"""A recipe's road as costs: which stage runs what, how often, on which prompts. It follows `experiment/` and `study/`
call by call."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workbench.circuits.curves import default_sizes
from workbench.circuits.discovery import receiver_position
from workbench.circuits.methods.registry import method_named
from workbench.experiment import CONDITIONS, Prompts
from workbench.experiment.recipe import Recipe
from workbench.matching.aligned_pairs import is_own
from workbench.patching import ablation as ablating
from workbench.patching import path
from workbench.plan import memory, sweeps
from workbench.plan.arithmetic import forward
from workbench.plan.costs import ModelCost, StageCost
from workbench.plan.shapes import ModelShape
from workbench.plan.steps import Step, Trained, cache_bytes
from workbench.tasks.base import PromptPairs

WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
COUNTED = ("mean_ablation", "eap", "eap_ig", "relp", "gim")
"""Methods that take `discovery.heads` heads in all."""
HALF = 2
"""Bytes of a bfloat16, in which autocast computes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Road:
    """A recipe with the shapes of its models and its prompts."""

    recipe: Recipe
    teacher: ModelShape
    student: ModelShape | None
    prompts: Prompts

    @property
    def width(self) -> int:
        """Bytes of a student's weight."""
        assert self.student is not None
        return _width(self.recipe.dtype, self.student)

    def width_of(self, shape: ModelShape) -> int:
        """Bytes of a number that a model computes with: a weight, where it is not quantised, and an activation."""
        theirs = self.recipe.teacher_dtype or self.recipe.dtype
        return _width(theirs if shape is self.teacher else self.recipe.dtype, shape)

    def read_by(self, shape: ModelShape, prompts: PromptPairs) -> PromptPairs:
        """Prompts in the tokens of a model."""
        return prompts.for_teacher if shape is self.teacher else prompts

    def weight_bytes(self, shape: ModelShape) -> int:
        """Bytes of a model's weights, of which a teacher's may be quantised."""
        return shape.weight_bytes(
            self.width_of(shape), self.recipe.teacher_quantisation if shape is self.teacher else None
        )

    @property
    def resident(self) -> int:
        """Bytes of both models' weights."""
        return sum(self.weight_bytes(shape) for shape in (self.teacher, self.student) if shape is not None)

    def circuit_heads(self, shape: ModelShape) -> int:
        """At most so many heads has a circuit: `discovery.heads` for each stage of a search, or in all; with a target
        to keep, every head."""
        config, total = self.recipe.discovery, shape.layers * shape.heads
        if config.method not in (*COUNTED, "path_patching"):
            return total
        stages = len(self.prompts.stages) if config.method == "path_patching" else 1
        return min(total, stages * config.heads)

    @property
    def matched_heads(self) -> int:
        """At most so many heads of the student are matched; one to one there are no more than the teacher's circuit
        has."""
        assert self.student is not None
        theirs = (
            self.circuit_heads(self.teacher) if self.recipe.matching.one_to_one else self.circuit_heads(self.student)
        )
        return min(self.circuit_heads(self.student), theirs)

    @property
    def trained_heads(self) -> int:
        """At most so many heads of the student train where a condition trains heads."""
        return min(self.matched_heads, self.recipe.training.most or self.matched_heads)

    def models(self) -> Iterator[ModelCost]:
        """Sizes of teacher and student."""
        for role, shape in (("teacher", self.teacher), ("student", self.student)):
            if shape is not None:
                heads = self.trained_heads if role == "student" else None
                trained = None if heads is None else self.trained("circuit").parameters
                size = self.weight_bytes(shape)
                yield ModelCost(
                    role=role,
                    name=shape.name,
                    parameters=shape.parameters,
                    weight_bytes=size,
                    heads=shape.layers * shape.heads,
                    trained_heads=heads,
                    trained_parameters=trained,
                )

    def trained(self, what: str) -> Trained:
        """What trains, at most."""
        assert self.student is not None
        if what == "all":
            return Trained.everything(self.student)
        return Trained.heads(
            self.student, self.trained_heads, train_kv=self.recipe.train_kv, lora_rank=self.recipe.training.lora_rank
        )

    def cost(
        self,
        name: str,
        what: str,
        operations: int,
        shape: ModelShape,
        prompts: PromptPairs,
        beyond: int,
        *,
        disk: int = 0,
    ) -> StageCost:
        """A stage whose memory is `beyond` the resident weights."""
        plain = forward(shape, *prompts.clean.shape)
        return StageCost(
            name=name,
            what=what,
            operations=operations,
            forwards=operations / plain,
            memory=self.resident + beyond,
            disk=disk,
        )

    def discovery(self, role: str, shape: ModelShape, *, title: str | None = None) -> Iterator[StageCost]:
        """Ablation of every head, the search stage by stage, and the circuit on test prompts."""
        name, pairs = title or role, self.read_by(shape, self.prompts.discovery)
        reference = self.read_by(shape, self.prompts.reference)
        (count, tokens), searched = pairs.clean.shape, self.recipe.discovery.method == "path_patching"
        ablated = self.recipe.discovery.method == "mean_ablation"
        if self.student is not None or ablated:
            swept = (
                sweeps.ablation(shape, pairs, batch=ablating.BATCH)
                + forward(shape, *reference.clean.shape)
                + forward(shape, count, tokens)
            )
            peak = max(
                memory.ablation_bytes(shape, count, tokens, self.width_of(shape), batch=ablating.BATCH),
                memory.means_bytes(shape, min(ablating.BATCH, len(reference)), tokens, self.width_of(shape)),
            )
            yield self.cost(
                f"discover {name}: ablation",
                f"{shape.layers * shape.heads} heads x {count} prompts",
                swept,
                shape,
                pairs,
                peak,
            )
        if searched:
            yield from self.search(name, shape)
        elif not ablated:
            yield self.by_method(name, shape)
        if self.recipe.data.pairs is None or self.prompts.has_test:
            yield self.examined(name, shape)

    def by_method(self, name: str, shape: ModelShape) -> StageCost:
        """A method of discovery, by the most runs that it says it takes."""
        pairs, config = self.read_by(shape, self.prompts.discovery), self.recipe.discovery
        reference = self.read_by(shape, self.prompts.reference)
        (count, tokens), width = pairs.clean.shape, self.width_of(shape)
        runs = method_named(config.method, config.options).runs(shape.layers * shape.heads, shape.layers)
        return self.cost(
            f"discover {name}: {config.method}",
            f"at most {runs} runs of {count} prompts",
            runs * forward(shape, count, tokens) + forward(shape, *reference.clean.shape),
            shape,
            pairs,
            memory.patching_bytes(shape, count, tokens, width, batch=path.BATCH),
        )

    def search(self, name: str, shape: ModelShape, *, repeats: int = 1) -> Iterator[StageCost]:
        """The stages of a backward search; the first carries the clean and corrupt runs that all share."""
        pairs = self.read_by(shape, self.prompts.discovery)
        positions = {stage.name: stage.position for stage in self.prompts.stages}
        (count, tokens), heads = pairs.clean.shape, self.recipe.discovery.heads
        shared = sweeps.clean_and_corrupt(shape, pairs, batch=path.BATCH)
        peak = memory.patching_bytes(shape, count, tokens, self.width_of(shape), batch=path.BATCH)
        for stage in self.prompts.stages:
            if stage.into is None or stage.composition is None:
                sweep, target = sweeps.to_logits(shape, pairs, batch=path.BATCH), "logits"
            else:
                everywhere = sweeps.receivers_everywhere(shape, heads, stage.composition)
                sweep = sweeps.into_heads(
                    shape, pairs, everywhere, stage.position, receiver_position(stage, positions), batch=path.BATCH
                )
                target = f"{stage.into}'s {stage.composition}, at most"
            times = f", {repeats} times" if repeats > 1 else ""
            yield self.cost(
                f"discover {name}: path {stage.name}",
                f"{stage.position} -> {target}, {count} prompts{times}",
                repeats * (sweep + shared),
                shape,
                pairs,
                peak,
            )
            shared = 0

    def examined(self, name: str, shape: ModelShape) -> StageCost:
        """A circuit's report and its curve of faithfulness over size, random ones beside it."""
        test, draws = self.read_by(shape, self.prompts.test), self.recipe.evaluation.random_circuits
        sizes = len(default_sizes(shape.layers * shape.heads)) - 1
        sets = 2 + 2 * (1 + draws) * sizes - 2 * draws if self.recipe.evaluation.curve else 0
        count = min(len(test), self.recipe.evaluation.curve_prompts)
        operations = (2 if sets else 1) * self.outside(shape)
        operations += self.report_runs * forward(shape, *test.clean.shape)
        operations += sets * forward(shape, count, test.clean.shape[1])
        return self.cost(
            f"discover {name}: test",
            f"{self.report_runs + sets} ablated forwards",
            operations,
            shape,
            test,
            self.evaluation_bytes(shape),
        )

    @property
    def report_runs(self) -> int:
        """Forwards of a circuit's report: full, circuit, random ones, empty; and full and circuit again, prompt by
        prompt."""
        return 5 + self.recipe.evaluation.random_circuits

    def outside(self, shape: ModelShape) -> int:
        """What stands in for ablated heads: a forward over reference prompts, or over the corrupt test prompts."""
        kind = self.recipe.evaluation.ablation
        prompts = self.prompts.test if kind == "counterfactual" else self.prompts.reference
        return 0 if kind == "zero" else forward(shape, *self.read_by(shape, prompts).clean.shape)

    def evaluation_bytes(self, shape: ModelShape) -> int:
        """A batch's forward; with counterfactual ablation every head's output on all test prompts."""
        count, tokens = self.read_by(shape, self.prompts.test).clean.shape
        batch = min(ablating.BATCH, count)
        held = (
            0
            if self.recipe.evaluation.ablation != "counterfactual"
            else count * tokens * memory.captured_z(shape) * self.width_of(shape)
        )
        return memory.means_bytes(shape, batch, tokens, self.width_of(shape)) + held

    def match(self, *, title: str = "match") -> StageCost:
        """Similarities and CKA of the pairs on the discovery prompts, impacts read again (each time with the reference
        means)."""
        assert self.student is not None
        runs, operations, peak = 1 + ("similarity" in self.recipe.matching.distances), 0, 0
        pairs = self.read_by(self.teacher, self.prompts.discovery)
        for shape in (self.teacher, self.student):
            read = self.read_by(shape, self.prompts.discovery).clean.shape
            reference = self.read_by(shape, self.prompts.reference).clean.shape
            operations += runs * forward(shape, *read) + 2 * forward(shape, *reference)
            peak = max(peak, memory.means_bytes(shape, read[0], read[1], self.width_of(shape)))
        return self.cost(title, f"{len(pairs)} prompts, both models", operations, self.teacher, pairs, peak)

    def caches(self, conditions: Sequence[str], seeds: int, *, title: str = "teacher outputs") -> Iterator[StageCost]:
        """The teacher's outputs on the training prompts, once for each set of layers that is read."""
        if self.recipe.teacher_outputs == "live":
            return
        kinds = sorted(
            {CONDITIONS[name].aligns or "" for name in conditions if CONDITIONS[name].trains},
            key=lambda kind: (kind != "", kind),
        )
        train, shards = self.read_by(self.teacher, self.prompts.train), self.recipe.teacher_outputs == "shards"
        count, tokens = train.clean.shape
        for kind in kinds:
            times = seeds if kind in ("random", "shuffled") else 1
            layers = min(self.teacher.layers, self.matched_heads) if kind else 0
            size = times * cache_bytes(
                self.teacher,
                count,
                tokens,
                layers,
                width=self.width_of(self.teacher),
                shards=shards,
                activation=self.recipe.alignment.activation,
                top=self.recipe.teacher_top,
            )
            peak = memory.forward_bytes(
                self.teacher,
                min(ablating.BATCH, count),
                tokens,
                self.width_of(self.teacher),
                captured=layers * self.teacher.heads * self.teacher.d_head,
            ) + (0 if shards else size // times)
            what = (
                f"{count} prompts, "
                f"{f'at most {layers} layers' if kind else 'logits'}{f', {times} times' if times > 1 else ''}"
            )
            if kind and self.recipe.alignment.differs:  # the corrupt prompts' outputs beside the clean ones'
                times, size, peak = 2 * times, 2 * size, peak + (0 if shards else size // times)
            operations = times * forward(self.teacher, count, tokens)
            yield self.cost(
                f"{title} ({kind or 'no alignment'})",
                what,
                operations,
                self.teacher,
                train,
                peak,
                disk=size,
            )

    def training(self, condition: str, runs: int, *, title: str | None = None) -> StageCost | None:
        """So many trainings under a condition, with their evaluations on validation prompts; None for one that trains
        nothing."""
        spec, config = CONDITIONS[condition], self.recipe.training
        if spec.trains is None or self.student is None:
            return None
        trained, tokens = self.trained(spec.trains), self.prompts.train.clean.shape[1]
        step = Step(
            student=self.student,
            teacher=self.teacher,
            batch=config.batch,
            tokens=tokens,
            trained=trained,
            pairs=self.matched_heads if spec.aligns else 0,
            rows=config.batch * self.aligned_tokens(),
            accumulate=config.accumulate,
            whole=config.alignment_batch == "whole",
            live=self.recipe.teacher_outputs == "live",
            runs=self.runs(condition),
        )
        operations = config.steps * step.operations() + self.validations()
        saved = self.width * (3 * trained.parameters + (self.student.parameters if self.recipe.save_students else 0))
        plain = forward(self.student, config.batch, tokens)
        return StageCost(
            name=title or f"train {condition}",
            what=f"{runs} x {config.steps} steps of {config.batch} prompts",
            operations=runs * operations,
            forwards=runs * operations / plain,
            memory=self.training_bytes(trained, tokens, runs=self.runs(condition)),
            disk=runs * saved,
        )

    def runs(self, condition: str) -> int:
        """The student's forwards in a step under a condition."""
        return self.recipe.alignment.runs if CONDITIONS[condition].aligns else 1

    def training_bytes(self, trained: Trained, tokens: int, *, runs: int = 1) -> int:
        """Teacher, untrained student, the student that trains, its gradients, leaves and AdamW's state, and a step's
        activations."""
        assert self.student is not None
        config, half = self.recipe.training, self.recipe.training.precision == "bf16"
        micro = -(-config.batch // config.accumulate)
        cast = HALF * (self.student.parameters if trained.touched is None else trained.touched) if half else 0
        state = trained.gradient_and_optimizer_bytes(self.student, self.width) + cast
        step = memory.step_bytes(self.student, micro, tokens, HALF if half else self.width)
        return self.resident + self.width * self.student.parameters + state + runs * step

    def aligned_tokens(self) -> int:
        """Tokens of each prompt at which a pair is aligned: those of one position, or at most those of any stage's."""
        train, positions = self.prompts.train, self.recipe.alignment.positions
        config = self.recipe.discovery
        own = method_named(config.method, config.options).acts_at(self.prompts.stages)
        beside = "".join(f"+{name}" for name in positions.split("+")[1:])
        names = [f"{name}{beside}" for name in own] if is_own(positions) else [positions]
        return max(int(train.position(name).sum(1).max()) for name in names)

    def validations(self) -> int:
        """Forwards over the validation prompts in one training."""
        every, validation = self.recipe.training.evaluate_every, self.prompts.validation
        if every is None or validation is None or self.student is None:
            return 0
        return self.recipe.training.steps // every * forward(self.student, *validation.clean.shape)

    def evaluation(self, runs: int, *, title: str = "evaluate", teacher: bool = True) -> StageCost:
        """So many trained students, and the teacher once, on the test prompts: circuits, and CKA of the pairs (which
        the teacher runs for)."""
        assert self.student is not None
        test, theirs = self.prompts.test, self.read_by(self.teacher, self.prompts.test).clean.shape
        plain = {self.student.name: forward(self.student, *test.clean.shape)}
        plain[self.teacher.name] = forward(self.teacher, *theirs)
        each = self.outside(self.student) + (self.report_runs + 1) * plain[self.student.name] + plain[self.teacher.name]
        once = self.outside(self.teacher) + self.report_runs * plain[self.teacher.name] if teacher else 0
        peak = max(
            self.evaluation_bytes(self.student),
            memory.means_bytes(self.teacher, theirs[0], theirs[1], self.width_of(self.teacher)),
        )
        what = f"{runs} students{' and the teacher' if teacher else ''}, {len(test)} prompts"
        beyond = self.width * self.student.parameters + peak
        return self.cost(title, what, runs * each + once, self.student, test, beyond)


def _width(dtype: str, shape: ModelShape) -> int:
    return WIDTHS.get(shape.dtype if dtype == "auto" else dtype, 4)
