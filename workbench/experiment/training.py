"""The last stage: a fresh student trained under a condition, and evaluated."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from workbench.distillation.answers import require_own_vocabulary
from workbench.distillation.assembly import teacher_outputs, trained_slices
from workbench.distillation.config import TrainingConfig
from workbench.distillation.loop import Distillation
from workbench.distillation.masks import TrainedSlices
from workbench.distillation.processes import launched
from workbench.experiment.conditions import CONDITIONS, ConditionSpec
from workbench.experiment.matching import Matching
from workbench.matching.head_rows import hook_names
from workbench.models import sources
from workbench.models.hooked_model import Student
from workbench.values.refs import Head

log = logging.getLogger("workbench")


class Experiment(Matching):
    """A recipe at work in a run folder: every stage of the road."""

    def training_config(self, spec: ConditionSpec) -> TrainingConfig:
        """The recipe's training with a condition's losses."""
        alignment = self.recipe.alignment
        return replace(
            self.recipe.training,
            task_loss=spec.task_loss or self.recipe.training.task_loss,
            weight=alignment.weight if spec.aligns else 0.0,
            estimator=alignment.estimator,
            measure=alignment.measure,
            measure_options=alignment.options,
            pairs=alignment.pairs,
            activation=alignment.activation,
        )

    def require_trainable(self, conditions: Iterable[str]) -> None:
        """Refuse, before anything is searched, conditions whose task loss compares what different tokenizers don't
        share."""
        for spec in (CONDITIONS[name] for name in conditions):
            if spec.trains is not None:
                require_own_vocabulary(self.training_config(spec).task_loss, self.prompts.train)

    def distill(self, condition: str, seed: int, *, resume: bool) -> tuple[Student, TrainedSlices]:
        """Train a fresh student under a condition; writes its log, checkpoints and (if wanted) the student itself."""
        spec, student = CONDITIONS[condition], self.fresh_student()
        if spec.trains is None:
            return student, TrainedSlices(student, [])
        config, pairs = self.training_config(spec), self.aligned(self.head_map_of(spec, seed)) if spec.aligns else ()
        heads = None if spec.trains == "all" else self.trained_heads()
        slices = trained_slices(student, heads, config, train_kv=self.recipe.train_kv, seed=seed)
        log.info(
            "  %s of %s parameters train (%.1f %%)", f"{slices.count:,}", f"{slices.total:,}", 100 * slices.fraction
        )
        names, processes = hook_names([pair.teacher for pair in pairs], config.activation), launched(student.device)
        with processes.main_first():
            outputs = teacher_outputs(
                self.recipe.teacher_outputs, self.teacher, self.prompts.train, names, sources.cache_root() / "teacher"
            )
        run = Distillation(
            student,
            slices,
            self.prompts.train,
            outputs,
            pairs,
            config,
            seed=seed,
            validation=self.prompts.validation,
            processes=processes,
        )
        folder = self.folder.condition(condition, seed)
        run.run(folder, resume=resume, label=f"{condition}, seed {seed}")
        if slices.sharded:  # one process evaluates and saves, which takes a whole student
            student = self.fresh_student()
            slices.onto(student)
        if self.recipe.save_students and processes.is_main:
            student.save(folder / "student")
        return student, slices

    @property
    def trainable_heads(self) -> list[Head]:
        """The student's heads of which `training.most` train: the matched ones, or its circuit."""
        if self.recipe.training.heads == "circuit":
            return list(self.folder.circuit("student").heads)
        return [ours for ours, _ in self.folder.head_map().pairs]

    def trained_heads(self) -> list[Head]:
        """The student's heads that train where a condition trains heads: those that matter most."""
        heads, most = self.trainable_heads, self.recipe.training.most
        if most is None or most >= len(heads):
            return heads
        impacts = self.folder.scores("student")[f"ablation-{self.recipe.matching.metric}"].mean()
        return sorted(heads, key=lambda head: float(impacts[head.layer, head.index]), reverse=True)[:most]
