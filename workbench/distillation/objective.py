"""Task loss and alignment loss of some prompts (eq 6, 7), in the autograd graph.

The student's activations come from the live pass; the teacher's from its cache (or its own pass), by hook name. An
alignment that compares differences, or that interchanges heads, runs the student on the corrupt prompts as well; the
gradient reaches it through these runs too, source values of an interchange included.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.distillation import losses
from workbench.distillation.answers import answer_words
from workbench.distillation.config import AlignmentConfig, TrainingConfig
from workbench.distillation.counterfactual import counterfactuals_of, sites_of
from workbench.distillation.processes import is_sharded
from workbench.distillation.teacher_cache import TeacherOutputs
from workbench.distillation.top_logits import TopLogits
from workbench.errors import InputError
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_rows import difference, hook_names, output_weights, place, rows_at
from workbench.models.hooked_model import Student
from workbench.patching.counterfactual import corrupt_activations
from workbench.patching.interchange import interchanged_logits
from workbench.patching.shared import rows_agree, shared_activations
from workbench.tasks.base import PromptPairs
from workbench.tasks.forcing import answer_columns, per_token

Index = Int[Tensor, " batch"]


class Objective:
    """The two losses of a student against a teacher's outputs, by place in the training set.

    Prompts by themselves are read at their last token (of an answer of several tokens, the loss is of the first);
    prompts with their answers after them (`answered`) at every token that predicts one of the answer's.
    """

    def __init__(
        self,
        student: Student,
        prompts: PromptPairs,
        teacher: TeacherOutputs,
        pairs: Sequence[AlignedPair],
        config: TrainingConfig,
    ) -> None:
        self.student, self.prompts, self.teacher, self.pairs, self.config = (
            student,
            prompts,
            teacher,
            tuple(pairs),
            config,
        )
        self.aligned = config.weight > 0
        """Whether there is an alignment loss."""
        self.settings = config.alignment or AlignmentConfig()
        self.similar = self.aligned and self.settings.similar
        """Whether rows of the pairs are compared."""
        self.interchanges = self.aligned and self.settings.interchanges
        self._names = hook_names([pair.student for pair in pairs], config.activation) if self.aligned else []
        if not self.similar:
            self._names = []
        self._sources = hook_names([pair.student for pair in pairs]) if self.interchanges else []
        if self.aligned and (self.settings.differs or self.interchanges):
            self._counterfactual = counterfactuals_of(teacher)
        self._words = (
            answer_words(prompts) if prompts.teacher is not None and config.task_loss == "ce_teacher" else None
        )
        self._teacher_names = hook_names([pair.teacher for pair in pairs], config.activation) if self.aligned else []
        self._shares = self._can_share()

    def _can_share(self) -> bool:
        """Whether prompts that begin alike can run as rows."""
        config = self.config
        if not config.shared_prefixes or config.precision != "full" or answer_columns(self.prompts) is not None:
            return False
        if self.similar and config.activation == "pattern":
            return False
        with self.student.training():
            return rows_agree(self.student, self.prompts)

    def losses(self, index: Index) -> tuple[Tensor | None, Tensor | None, Float[Tensor, " pairs"]]:
        """(task loss, alignment loss, CKA of each pair) of some prompts; None for a loss that is left out."""
        prompts = self.prompts.rows(index)
        corrupt = self._corrupt(prompts) if self.interchanges else None
        task, rows = self._task_and_rows(index, prompts, corrupt)
        if not self.aligned:
            return task, None, torch.zeros(0)
        alignment, ckas = self.alignment(rows, self.teacher_rows(index)) if self.similar else (None, torch.zeros(0))
        if corrupt is not None:
            share = self.settings.interchange_weight if self.settings.loss == "both" else 1.0
            interchange = share * self.interchange_loss(index, corrupt)
            alignment = interchange if alignment is None else alignment + interchange
        return task, alignment, ckas

    def task_and_rows(self, index: Index) -> tuple[Tensor | None, list[Float[Tensor, "_ _"]]]:
        """(task loss, the student's rows of each pair) of some prompts, from one forward (and one on the corrupt
        prompts, where differences are compared)."""
        return self._task_and_rows(index, self.prompts.rows(index), None)

    def _task_and_rows(
        self, index: Index, prompts: PromptPairs, corrupt: Mapping[str, Tensor] | None
    ) -> tuple[Tensor | None, list[Float[Tensor, "_ _"]]]:
        logits, activations = self._live(prompts)
        if self.similar and self.settings.differs:
            activations = difference(activations, self._corrupt(prompts) if corrupt is None else corrupt)
        return self._task_loss(logits, index, prompts), self._student_rows(prompts, activations)

    def _live(self, prompts: PromptPairs) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits and activations on clean prompts, in the graph."""
        if self._shares and not is_sharded(next(iter(self.student.parameters().values()))):
            found = shared_activations(self.student, prompts, self._names, gradients=True)
            if found is not None:
                return found
        with self._autocast():
            return self.student.activations(
                prompts.clean, prompts.mask, self._names, gradients=True, columns=answer_columns(prompts)
            )

    def _corrupt(self, prompts: PromptPairs) -> dict[str, Tensor]:
        """The student's activations on the corrupt prompts, in the graph, as differences and interchanges need them."""
        names = [*self._sources, *(self._names if self.settings.differs else [])]
        with self._autocast():
            return corrupt_activations(
                self.student, prompts, list(dict.fromkeys(names)), gradients=torch.is_grad_enabled()
            )[1]

    def interchange_loss(self, index: Index, source: Mapping[str, Tensor] | None = None) -> Tensor:
        """KL(teacher || student) of some prompts while the matched heads of both take their values on the corrupt
        prompts (DIITO), in nats. `source`: the student's, by hook name; None runs it."""
        prompts = self.prompts.rows(index)
        theirs = self._counterfactual.interchanged
        assert theirs is not None, "made with this loss"
        with self._autocast():
            logits = interchanged_logits(
                self.student,
                prompts,
                sites_of(self.pairs, "student", prompts, index, self.settings),
                source=self._corrupt(prompts) if source is None else source,
                gradients=torch.is_grad_enabled(),
            )
        return losses.kl_to_teacher(logits, theirs[index].to(logits.device))

    @torch.no_grad()
    def rows_alone(self, index: Index) -> list[Float[Tensor, "_ _"]]:
        """The student's rows of each pair without a graph, from a forward that ends at the last aligned layer (a
        sharded student's can't end early)."""
        prompts = self.prompts.rows(index)
        sharded = is_sharded(next(iter(self.student.parameters().values())))
        with self._autocast():
            if sharded:
                _, activations = self.student.activations(prompts.clean, prompts.mask, self._names)
            else:
                activations = self.student.early_activations(prompts.clean, prompts.mask, self._names)
            if self.settings.differs:
                activations = difference(activations, self._corrupt(prompts))
        return self._student_rows(prompts, activations)

    def teacher_rows(self, index: Index) -> list[Float[Tensor, "_ _"]]:
        """The teacher's rows of each pair, prompt by prompt."""
        prompts, weights = (
            self.prompts.rows(index).for_teacher,
            self.teacher.output_weights if self.config.activation == "result" else None,
        )
        found = self.teacher.rows(index, self._teacher_names)
        if self.settings.differs:
            other = self._counterfactual.corrupt
            assert other is not None, "made with this comparison"
            theirs = other.rows(index, self._teacher_names)
            found = difference(found, {name: prompts.aligned(value) for name, value in theirs.items()})
        outputs = {name: value.to(self.student.device) for name, value in found.items()}
        return rows_at(weights, outputs, ((pair.teacher, pair.teacher_positions) for pair in self.pairs), prompts)

    def row_counts(self, index: Index) -> list[int]:
        """How many rows each pair has on some prompts (m of these prompts)."""
        prompts = self.prompts.rows(index)
        return [int(place(prompts, pair.student_positions).sum()) for pair in self.pairs]

    def alignment(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Tensor, Float[Tensor, " pairs"]]:
        """(SUM or mean over pairs of 1 - similarity, similarity of each pair) from the rows of both sides."""
        assert self.config.alignment is not None
        config, rows = self.config.alignment, list(zip(student, teacher, strict=True))
        return losses.alignment_loss(
            rows,
            estimator=config.estimator,
            measure=config.measure,
            options=config.options,
            pairs=config.pairs,
            weights=[pair.weight for pair in self.pairs],
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.student.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _student_rows(self, prompts: PromptPairs, activations: Mapping[str, Tensor]) -> list[Tensor]:
        """Outside autocast and in the weights' dtype: bfloat16 has too few digits for Gram matrices."""
        if not self.similar:
            return []
        dtype = next(iter(self.student.parameters().values())).dtype
        outputs = {name: value.to(dtype) for name, value in activations.items()}
        weights = output_weights(self.student, [pair.student for pair in self.pairs], self.config.activation)
        return rows_at(weights, outputs, ((pair.student, pair.student_positions) for pair in self.pairs), prompts)

    def _labels(self, index: Index) -> Index:
        """The teacher's answers in the student's tokens."""
        if self._words is not None:
            logits = self.teacher.logits_of(index)
            assert isinstance(logits, Tensor), "refused where the outputs are made"
            return self._words.labels(logits)
        labels = self.teacher.labels_of(index)
        if int(labels.max()) >= self.student.d_vocab:
            raise InputError(
                f"the teacher answers with token {int(labels.max())}, which the student (of {self.student.d_vocab}) "
                "does not have; use task loss ce_truth, or models of one vocabulary."
            )
        return labels

    def _whole_answers(
        self, logits: Float[Tensor, "batch token d_vocab"], index: Index, prompts: PromptPairs
    ) -> Tensor | None:
        """The task loss over all tokens of the answers that stand after the prompts: the right ones, or the teacher's
        (`answered`)."""
        name = self.config.task_loss
        if name == "none":
            return None
        assert prompts.answer_tokens is not None
        real, weights = per_token(prompts)
        if name in ("ce_truth", "ce_teacher"):
            return losses.cross_entropy(logits[real], prompts.answer_tokens[real], weights)
        target = self.teacher.logits_of(index).to(logits.device)
        target = target.rows(real) if isinstance(target, TopLogits) else target[real]
        return losses.DIVERGENCES[name](logits[real], target, temperature=self.config.temperature, weights=weights)

    def _task_loss(
        self, logits: Float[Tensor, "batch *token d_vocab"], index: Index, prompts: PromptPairs
    ) -> Tensor | None:
        if logits.ndim == 3:
            return self._whole_answers(logits, index, prompts)
        match self.config.task_loss:
            case "none":
                return None
            case "ce_truth":
                return losses.cross_entropy_of_sets(logits, prompts.answers)
            case "ce_teacher":
                return losses.cross_entropy(logits, self._labels(index).to(logits.device))
            case name:
                target = self.teacher.logits_of(index).to(logits.device)
                return losses.DIVERGENCES[name](logits, target, temperature=self.config.temperature)
