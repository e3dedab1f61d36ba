"""The distillation loop: task loss plus lambda times alignment of matched heads (eq 7), on the trained slices only.

Each step's losses go to a JSONL log. A run that was killed resumes from its last checkpoint to the same bits: batches,
dropout, learning rate and lambda are functions of (seed, step), and early stopping reads the log.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench import seeds, storage
from workbench.distillation import schedules
from workbench.distillation.answers import require_own_vocabulary
from workbench.distillation.backward import backward
from workbench.distillation.config import LATER, MANNERS, AlignmentConfig, TrainingConfig, interchanges
from workbench.distillation.losses import DIVERGENCES
from workbench.distillation.masks import TrainedSlices
from workbench.distillation.objective import Objective
from workbench.distillation.processes import Processes, launched, shard
from workbench.distillation.reports import (
    LOG,
    StepReport,
    Validation,
    best_evaluation,
    exhausted,
    read_log,
    require_apart,
    require_whole,
    validated,
)
from workbench.distillation.schedules import alignment_weight, share_of_rate
from workbench.distillation.teacher_cache import TeacherOutputs
from workbench.distillation.top_logits import TopLogits
from workbench.distillation.tracking import require_installed, tracking
from workbench.errors import InputError
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_rows import require_fitting
from workbench.models.fused import attention
from workbench.models.hooked_model import Student
from workbench.patching.progress import progress_bar
from workbench.similarity.measures import checked_options
from workbench.storage import checkpoint
from workbench.tasks.base import PromptPairs
from workbench.tasks.tokenizers import require_same_words


class Distillation:
    """One training run of a student; `run()` goes from the last checkpoint (with `resume`) or from the start to the
    last step."""

    def __init__(
        self,
        student: Student,
        slices: TrainedSlices,
        prompts: PromptPairs,
        teacher: TeacherOutputs,
        pairs: Sequence[AlignedPair],
        config: TrainingConfig,
        *,
        seed: int,
        validation: Validation | None = None,
    ) -> None:
        self.processes = launched(student.device)
        _require_sound(student, prompts, teacher, pairs, config, validation, self.processes)
        require_wide(next((leaf.dtype for leaf in slices.leaves.values()), torch.float32))
        self.student, self.slices, self.prompts, self.config, self.seed = student, slices, prompts, config, seed
        self.pairs, self.validation = tuple(pairs), validation
        self.objective = Objective(student, prompts, teacher, pairs, config)
        self.optimizer = torch.optim.AdamW(
            list(slices.leaves.values()), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self._share_of_rate = share_of_rate(config, self.optimizer)
        self.identity = self._identity()
        if self.processes.shards:
            _require_shardable(config)
            shard(student, self.processes.count)
            slices.onto(student)

    def _identity(self) -> dict[str, str]:
        """Every ingredient of the training by name."""
        apart = self.validation.fingerprint() if isinstance(self.validation, PromptPairs) else ""
        return {
            "configuration": storage.digest(json.dumps(_stated(self.config), sort_keys=True)),
            "seed": str(self.seed),
            "prompts": self.prompts.fingerprint(),
            "student": self.student.fingerprint(),
            "teacher": self.objective.teacher.fingerprint,
            "pairs": storage.digest(*map(repr, self.pairs), *_weights(self.pairs)),
            "trained parts": storage.digest(*self.slices.leaves),
            "validation prompts": apart,
        }

    def run(self, folder: Path, *, resume: bool = False, label: str = "distilling") -> list[StepReport]:
        """Train to the last step, or until patience ends; writes `log.jsonl` and `checkpoint.safetensors` (and
        `best.safetensors`) into `folder`.

        Errors: `InputError` on a loss or weights that are not finite, before anything of that step is written.
        """
        state, best = folder / "checkpoint.safetensors", folder / "best.safetensors"
        reports = self._begun(state, folder / LOG, resume)
        with self._logging(folder, len(reports), label) as log:
            for step in range(len(reports), self.config.steps):
                if exhausted(reports, self.config.patience):
                    break
                reports.append(self._evaluated(self.step(step)))
                files = [
                    *([best] if self._is_best(reports) else []),
                    *([state] if self._is_checkpoint(reports) else []),
                ]
                if files:
                    self._require_finite_loss(step)
                log(reports[-1], bool(files))
                for file in files:
                    self._save(file, step + 1)
        self.processes.wait()
        if self.config.restore_best:
            self.slices.load(
                checkpoint.load(best, leaves=self.slices.leaves, optimizer=self.optimizer, identity=self.identity)[1]
            )
        return reports

    def _is_best(self, reports: Sequence[StepReport]) -> bool:
        return self.config.restore_best and best_evaluation(reports) == (len(reports), reports[-1].accuracy)

    def _is_checkpoint(self, reports: Sequence[StepReport]) -> bool:
        steps = len(reports)
        due = steps % self.config.checkpoint_every == 0 or steps == self.config.steps
        return due or exhausted(reports, self.config.patience)

    def _begun(self, state: Path, log: Path, resume: bool) -> list[StepReport]:
        """Restore the last checkpoint, if wanted and there, and the log up to it."""
        reports: list[StepReport] = []
        if resume and state.exists():
            start, values = checkpoint.load(
                state, leaves=self.slices.leaves, optimizer=self.optimizer, identity=self.identity
            )
            reports = read_log(log, first=start)
            require_whole(log, reports, start, state.name)  # before the student is changed
            self.slices.load(values)
        self.processes.wait()
        if self.processes.is_main:
            storage.write_text(log, "".join(report.line() for report in reports))
        return reports

    @contextmanager
    def _logging(self, folder: Path, start: int, label: str) -> Iterator[Callable[[StepReport, bool], None]]:
        """Gradients on, training mode, and where reports go: the log (to the disk itself where a checkpoint follows),
        the trackers, the progress bar."""
        is_main = self.processes.is_main
        with (
            self.slices.gradients(),
            attention(self.student, self.config.attention),
            self.student.training(),
            (folder / LOG).open("a", buffering=1) if is_main else nullcontext() as file,
            tracking(self.config, folder, label, device=self.student.device) as trackers,
            progress_bar(total=self.config.steps, initial=start, desc=label, unit="step", shown=is_main) as bar,
        ):

            def log(report: StepReport, durable: bool) -> None:
                if file is not None:
                    with storage.writing(folder / LOG):
                        file.write(report.line())
                        if durable:
                            file.flush()
                            os.fsync(file.fileno())
                trackers.log(report)
                bar.update()
                bar.set_postfix(task=report.task_loss, alignment=report.alignment_loss)

            yield log

    def _save(self, path: Path, step: int) -> None:
        if self.processes.is_main:
            checkpoint.save(
                path, step=step, leaves=self.slices.leaves, optimizer=self.optimizer, identity=self.identity
            )

    def _evaluated(self, report: StepReport) -> StepReport:
        every = self.config.evaluate_every
        if self.validation is None or every is None or (report.step + 1) % every:
            return report
        return replace(report, accuracy=validated(self.student, self.validation))

    def step(self, step: int) -> StepReport:
        """One optimizer step on the batch of this step."""
        index, weight = self.batch_index(step), alignment_weight(self.config, step)
        gradients = backward(self.objective, index, weight, self.processes, partial(self._dropout, step))
        if not math.isfinite(gradients.total.item()):
            raise InputError(_not_finite(f"loss is {gradients.total.item()}", step))
        norm = self._gradient_norm()
        rate = self.config.learning_rate * self._share_of_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise InputError(_not_finite("update overflows", step)) from None
        self._require_finite_weights(step)
        self.slices.write_back()
        return StepReport(
            step=step,
            loss=gradients.total.item(),
            task_loss=None if gradients.task is None else gradients.task.item(),
            alignment_loss=None if gradients.alignment is None else gradients.alignment.item(),
            ckas=dict(zip(map(str, self.pairs), gradients.ckas.tolist(), strict=True))
            if self.objective.similar
            else {},
            gradient_norm=norm,
            learning_rate=rate,
            weight=weight,
        )

    def _require_finite_weights(self, step: int) -> None:
        """The update itself may overflow, whatever the loss was before it."""
        sound = torch.stack([leaf.detach().isfinite().all() for leaf in self.slices.leaves.values()])
        if not bool(sound.all()):
            raise InputError(_not_finite("weights are not finite", step))

    @torch.no_grad()
    def _require_finite_loss(self, step: int) -> None:
        """Weights that are finite may still give no finite loss; the next step would say so, after they were saved."""
        piece = self.batch_index(step).chunk(self.processes.count * self.config.accumulate)[0]
        with self._dropout(step):
            task, rows = self.objective.task_and_rows(piece)
        if not all(bool(value.isfinite().all()) for value in (*rows, *([] if task is None else [task]))):
            raise InputError(_not_finite("loss is not finite after the update", step))

    def _gradient_norm(self) -> float:
        """Collect the slices' gradients, sum them over the processes and clip; returns the norm before clipping."""
        self.slices.collect_gradients()
        leaves = [] if self.slices.sharded else [leaf for leaf in self.slices.leaves.values() if leaf.grad is not None]
        for leaf, gradient in zip(
            leaves, self.processes.summed([leaf.grad for leaf in leaves if leaf.grad is not None]), strict=True
        ):
            leaf.grad = gradient
        return float(nn.utils.clip_grad_norm_(list(self.slices.leaves.values()), self.config.clip))

    def _dropout(self, step: int, *piece: int) -> AbstractContextManager[None]:
        return seeds.local(self.seed, "dropout", step, *piece, device=self.student.device)

    def batch_index(self, step: int) -> Int[Tensor, " batch"]:
        """The prompts of a step."""
        return schedules.batch_index(len(self.prompts), self.config.batch, step, seed=self.seed)

    def losses(self, index: Int[Tensor, " batch"]) -> tuple[Tensor | None, Tensor | None, Float[Tensor, " pairs"]]:
        """(task loss, alignment loss, CKA of each pair) of some prompts, in the autograd graph; None for a loss that is
        left out."""
        return self.objective.losses(index)


def _stated(config: TrainingConfig) -> dict[str, Any]:
    """The settings by which a training is known: later ones, its alignment's too, only where they are set, so that a
    checkpoint from before there was a choice goes on; without the manner of computing the same."""
    settings = {name: value for name, value in asdict(config).items() if name not in MANNERS}
    for name, before in (("attention", "eager"), ("answers", "whole")):
        if settings[name] == before:
            del settings[name]
    if settings["alignment"] is not None:
        settings["alignment"] = {
            name: value for name, value in settings["alignment"].items() if name not in LATER or value != LATER[name]
        }
    return settings


def _weights(pairs: Sequence[AlignedPair]) -> list[str]:
    weights = [pair.weight for pair in pairs]
    return [repr(weights)] if any(weight != 1 for weight in weights) else []


def _not_finite(what: str, step: int) -> str:
    return f"the {what} at step {step}: lower `learning_rate` or `weight`; the last checkpoint is kept."


def _require_sound(
    student: Student,
    prompts: PromptPairs,
    teacher: TeacherOutputs,
    pairs: Sequence[AlignedPair],
    config: TrainingConfig,
    validation: Validation | None,
    processes: Processes,
) -> None:
    """Refuse, before anything is trained, what cannot be trained as it is configured."""
    if config.weight > 0 and not pairs:
        raise InputError("lambda is above 0 but no heads are matched; match heads first, or set `weight: 0`.")
    require_settings(config, prompts, validation, processes=processes.count)
    for pair in pairs:
        require_same_words(prompts, pair.student_positions, pair.teacher_positions)
    compares = config.task_loss in DIVERGENCES or interchanges(config)
    if compares and prompts.teacher is None:
        logits = teacher.logits_of(torch.zeros(1, dtype=torch.long))
        _require_width(logits.d_vocab if isinstance(logits, TopLogits) else logits.shape[-1], student.d_vocab)
    if len(teacher) != len(prompts):
        raise InputError(
            f"the teacher cache holds {len(teacher)} prompts, the training set {len(prompts)}; build it for these "
            "prompts."
        )


def _require_width(teacher: int, student: int) -> None:
    if teacher != student:
        raise InputError(
            f"the teacher has {teacher} logits and the student {student}, so a divergence can't compare them; use task "
            "loss ce_teacher or ce_truth."
        )


def require_settings(
    config: TrainingConfig, prompts: PromptPairs, validation: Validation | None, *, processes: int = 1
) -> None:
    """Refuse a training's settings that contradict each other or its prompts; known before a teacher has run or heads
    are matched."""
    if config.weight == 0 and config.task_loss == "none":
        raise InputError("this run has neither a task loss nor an alignment loss; set one of `task_loss` and `weight`.")
    if config.alignment is not None:
        alignment = config.alignment
        require_fitting(alignment.measure, alignment.activation, prompts, alignment.compared)
        if config.attention == "sdpa" and config.activation == "pattern" and config.weight > 0:
            raise InputError("sdpa shows no attention probabilities to align; set `attention: eager`.")
        checked_options(alignment.measure, alignment.options)
        _require_interchangeable(config, alignment, prompts, pieces=processes * config.accumulate)
    require_own_vocabulary(config.task_loss, prompts)
    if len(prompts) < config.batch:
        raise InputError(
            f"{len(prompts)} training prompts are fewer than a batch of {config.batch}; lower `batch` or use more "
            "scenes."
        )
    schedules.require_divisible(config.batch, accumulate=config.accumulate, processes=processes)
    require_installed(config.trackers)
    _require_evaluations(config, prompts, validation)


def _require_interchangeable(
    config: TrainingConfig, alignment: AlignmentConfig, prompts: PromptPairs, *, pieces: int
) -> None:
    if not alignment.interchanges:
        return
    if prompts.teacher is not None:
        raise InputError(
            "interchanges compare the models' outputs, which two tokenizers make incomparable; set alignment.loss: "
            "similarity."
        )
    if alignment.loss == "both" and pieces > 1 and config.alignment_batch == "whole":
        raise InputError(
            "a batch in pieces aligns the whole one for similarity alone; set `alignment_batch: micro`, `accumulate: "
            "1` on one process, or alignment.loss: interchange."
        )


def require_wide(dtype: torch.dtype) -> None:
    """Refuse training in float16, whose range gradients and AdamW's squares leave."""
    if dtype == torch.float16:
        raise InputError(
            "a student in float16 can't be trained: its gradients and AdamW's squares overflow or vanish. Set `dtype: "
            "float32` (with `training.precision: bf16` for speed) or `dtype: bfloat16`; the teacher may stay in "
            "float16 (`teacher_dtype`)."
        )


def _require_shardable(config: TrainingConfig) -> None:
    if config.task_loss == "none":
        raise InputError(
            "without a task loss nothing that a block puts out is in the loss, and FSDP then does not gather its "
            "weights for the backward pass; "
            "launch this condition with --multi_gpu."
        )
    if config.activation == "result":
        raise InputError(
            "activation `result` needs W_O outside the forward, which FSDP has sharded then; align `z`, or launch with "
            "--multi_gpu."
        )


def _require_evaluations(config: TrainingConfig, prompts: PromptPairs, validation: Validation | None) -> None:
    if config.evaluate_every is None:
        if config.patience is not None or config.restore_best:
            raise InputError(
                "`patience` and `restore_best` need evaluations; set `evaluate_every` and give validation prompts."
            )
        return
    if config.evaluate_every > config.steps:
        raise InputError(f"`evaluate_every` is {config.evaluate_every}, but there are {config.steps} steps; lower it.")
    if validation is None:
        raise InputError(
            "`evaluate_every` is set but there are no validation prompts; give some that are neither trained nor "
            "tested on."
        )
    require_apart(validation, prompts)
