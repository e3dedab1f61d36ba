"""The distillation loop: task loss plus lambda times alignment of matched heads (eq 7), on the trained slices only.

The student's activations come from the live pass, in the autograd graph; the teacher's from a cache, by hook name. Each step's losses go to a
JSONL log. A run that was killed resumes from its last checkpoint to the same bits.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from workbench import seeds, storage
from workbench.alignment import Activation, AlignedPair, head_rows, hook_names, output_weights, place, require_fitting
from workbench.distillation import checkpoint, losses
from workbench.distillation.losses import Pairs, TaskLoss
from workbench.distillation.masks import TrainedSlices
from workbench.distillation.teacher_cache import TeacherCache
from workbench.errors import InputError
from workbench.models import Student
from workbench.similarity.cka import Estimator
from workbench.similarity.measures import Measure, checked_options
from workbench.tasks.base import PromptPairs


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrainingConfig:
    """One training run. The paper leaves most of these open; each is a setting with its default stated here."""

    task_loss: TaskLoss = "ce_teacher"
    """Cross-entropy on the teacher's labels (the paper) or on the ground truth, KL to the teacher's distribution, or none."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the KL loss."""
    weight: Annotated[float, Field(ge=0)] = 0.0
    """lambda of eq 7; 0 leaves the alignment out."""
    estimator: Estimator = "biased"
    """Of CKA in the loss; the paper's is the biased one."""
    measure: Measure = "linear_cka"
    """What alignment is measured by; the paper's is linear CKA. `attention_kl` needs activation `pattern`."""
    measure_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the measure by name (see `workbench.similarity.measures`), e.g. `{fraction: 0.2}` of rbf_cka."""
    pairs: Pairs = "sum"
    """Whether the loss is the sum over pairs (the paper) or their mean, which makes lambda independent of how many there are."""
    activation: Activation = "z"
    """What of a head is aligned: `hook_z`, its output in the residual stream (`result`), or its attention probabilities (`pattern`)."""
    steps: Annotated[int, Field(ge=1)] = 150
    batch: Annotated[int, Field(ge=4)] = 64
    """Prompts in a step; with CKA also the number of examples m at a single position."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient of the trained slices."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One line of the training log."""

    step: int
    loss: float
    task_loss: float | None
    alignment_loss: float | None
    """SUM (or mean) over pairs of (1 - similarity), without lambda; None where it is no part of the loss."""
    ckas: dict[str, float]
    """Each pair's similarity by the run's measure, CKA unless it says otherwise."""
    gradient_norm: float
    learning_rate: float


class Distillation:
    """One training run of a student; `run()` goes from the last checkpoint (with `resume`) or from the start to the last step."""

    def __init__(
        self,
        student: Student,
        slices: TrainedSlices,
        prompts: PromptPairs,
        teacher: TeacherCache,
        pairs: Sequence[AlignedPair],
        config: TrainingConfig,
        *,
        seed: int,
    ) -> None:
        if config.weight > 0 and not pairs:
            raise InputError("lambda is above 0 but no heads are matched; match heads first, or set `weight: 0`.")
        if config.weight == 0 and config.task_loss == "none":
            raise InputError("this run has neither a task loss nor an alignment loss; set one of `task_loss` and `weight`.")
        require_fitting(config.measure, config.activation)
        checked_options(config.measure, config.measure_options)
        if len(prompts) < config.batch:
            raise InputError(f"{len(prompts)} training prompts are fewer than a batch of {config.batch}; lower `batch` or use more scenes.")
        if len(teacher.logits) != len(prompts):
            raise InputError(f"the teacher cache holds {len(teacher.logits)} prompts, the training set {len(prompts)}; build it for these prompts.")
        self.student, self.slices, self.prompts, self.teacher = student, slices, prompts, teacher
        self.pairs, self.config, self.seed = tuple(pairs), config, seed
        self.optimizer = torch.optim.AdamW(list(slices.leaves.values()), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        scheduler = get_scheduler(schedule, self.optimizer, config.warmup, config.steps)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        self._share_of_rate = scheduler.lr_lambdas[0]
        self.identity = self._identity()

    def _identity(self) -> str:
        parts = [
            json.dumps(asdict(self.config), sort_keys=True),
            str(self.seed),
            self.prompts.fingerprint(),
            self.student.fingerprint(),
            *map(repr, self.pairs),
            *self.slices.slices,
        ]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def run(self, folder: Path, *, resume: bool = False, label: str = "distilling") -> list[StepReport]:
        """Train to the last step; writes `log.jsonl` and `checkpoint.safetensors` into `folder`. Errors: `InputError` on a NaN loss."""
        state, log = folder / "checkpoint.safetensors", folder / "log.jsonl"
        start, reports = 0, []
        if resume and state.exists():
            start, values = checkpoint.load(state, leaves=self.slices.leaves, optimizer=self.optimizer, identity=self.identity)
            self.slices.load(values)
            reports = read_log(log, first=start)
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(log, "".join(_line(report) for report in reports))
        with (
            self.slices.gradients(),
            self.student.training(),
            log.open("a") as file,
            tqdm(total=self.config.steps, initial=start, desc=label, unit="step", leave=False) as bar,
        ):
            for step in range(start, self.config.steps):
                report = self.step(step)
                reports.append(report)
                file.write(_line(report))
                bar.update()
                bar.set_postfix(task=report.task_loss, alignment=report.alignment_loss)
                if (step + 1) % self.config.checkpoint_every == 0 or step + 1 == self.config.steps:
                    file.flush()
                    checkpoint.save(state, step=step + 1, leaves=self.slices.leaves, optimizer=self.optimizer, identity=self.identity)
        return reports

    def step(self, step: int) -> StepReport:
        """One optimizer step on the batch of this step."""
        index = self.batch_index(step)
        with seeds.local(self.seed, "dropout", step, device=self.student.device):
            task, alignment, ckas = self.losses(index)
        loss = sum((term for term in (task, None if alignment is None else self.config.weight * alignment) if term is not None), torch.zeros(()))
        if not math.isfinite(loss.item()):
            raise InputError(f"the loss is {loss.item()} at step {step}: lower `learning_rate` or `weight`; the last checkpoint is kept.")
        loss.backward()
        self.slices.collect_gradients()
        norm = nn.utils.clip_grad_norm_(list(self.slices.leaves.values()), self.config.clip)
        rate = self.config.learning_rate * self._share_of_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate  # a function of the step alone, so that a resumed run needs no scheduler state
        self.optimizer.step()
        self.slices.write_back()
        return StepReport(
            step=step,
            loss=loss.item(),
            task_loss=None if task is None else task.item(),
            alignment_loss=None if alignment is None else alignment.item(),
            ckas={str(pair): float(value) for pair, value in zip(self.pairs, ckas, strict=True)} if alignment is not None else {},
            gradient_norm=float(norm),
            learning_rate=rate,
        )

    def batch_index(self, step: int) -> Int[Tensor, " batch"]:
        """The prompts of a step: consecutive pieces of a new shuffle each epoch, the ragged end left out."""
        per_epoch = len(self.prompts) // self.config.batch
        order = torch.randperm(len(self.prompts), generator=seeds.generator(self.seed, "epoch", step // per_epoch))
        return order[(step % per_epoch) * self.config.batch :][: self.config.batch]

    def losses(self, index: Int[Tensor, " batch"]) -> tuple[Tensor | None, Tensor | None, Float[Tensor, " pairs"]]:
        """(task loss, alignment loss, CKA of each pair) of some prompts, in the autograd graph; None for a loss that is left out."""
        prompts, aligned = self.prompts.rows(index), self.config.weight > 0
        names = hook_names([pair.student for pair in self.pairs], self.config.activation) if aligned else []
        logits, activations = self.student.activations(prompts.clean, prompts.mask, names, gradients=True)
        task = self._task_loss(logits, index, prompts)
        if not aligned:
            return task, None, torch.zeros(0)
        cached = self.teacher.rows(index, hook_names([pair.teacher for pair in self.pairs], self.config.activation))
        alignment, ckas = losses.alignment_loss(
            self._rows(prompts, activations, cached), estimator=self.config.estimator,
            measure=self.config.measure, options=self.config.measure_options, pairs=self.config.pairs,
        )  # fmt: skip
        return task, alignment, ckas

    def _rows(self, prompts: PromptPairs, activations: dict[str, Tensor], cached: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        weights = output_weights(self.student, [pair.student for pair in self.pairs], self.config.activation)
        theirs = self.teacher.output_weights if self.config.activation == "result" else None
        return [
            (
                head_rows(weights, activations, pair.student, place(prompts, pair.student_positions)),
                head_rows(theirs, cached, pair.teacher, place(prompts, pair.teacher_positions)),
            )
            for pair in self.pairs
        ]

    def _task_loss(self, logits: Float[Tensor, "batch d_vocab"], index: Int[Tensor, " batch"], prompts: PromptPairs) -> Tensor | None:
        match self.config.task_loss:
            case "ce_teacher":
                return losses.cross_entropy(logits, self.teacher.labels[index])
            case "ce_truth":
                return losses.cross_entropy(logits, prompts.answers)
            case "kl_teacher":
                return losses.kl_to_teacher(logits, self.teacher.logits[index], temperature=self.config.temperature)
            case "none":
                return None


def _line(report: StepReport) -> str:
    return json.dumps(asdict(report)) + "\n"


def read_log(path: Path, *, first: int | None = None) -> list[StepReport]:
    """The (first) reports of a JSONL log. Errors: `InputError` when it is missing or damaged."""
    try:
        return [StepReport(**json.loads(line)) for line in path.read_text().splitlines()[:first]]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); run this condition again.") from None
