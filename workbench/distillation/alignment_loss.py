"""The alignment term of eq 7 as a module, for any training loop: `weight * SUM over matched pairs (1 - similarity)`.

It trains nothing and knows no loop. It reads the student's heads, takes the teacher's from its activations (given, from
a cache, or from the teacher itself), and gives one scalar, to be added to whatever the loop trains on, and each pair's
similarity:

    loss = CircuitAlignmentLoss(model, teacher, matching, weight=0.3)
    alignment, similarities = loss(tokens, mask, positions)
    (task_loss + alignment).backward()

where `model` is a plain `transformers` model or a `Student`. In a loop that runs the model itself, `recording()` around
that forward saves the second one:

    with loss.recording() as record:
        output = model(**batch)
    alignment, similarities = loss.of_recording(record)

The formula is `losses.alignment_loss`, which `workbench.distillation.loop` trains on as well.

Several processes (DDP, FSDP2), each with its part of the batch: the alignment sees the rows of all of them. CKA is no
mean over prompts, so averaging the processes' own values would be another objective. Each process back-propagates
through its own rows; the gradient is scaled by the number of processes, because DDP and FSDP average gradients, and so
is the whole batch's. Accumulated micro-batches, which such a trainer runs one after another, are each aligned alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import TypedDict, Unpack

from workbench.distillation.config import AlignmentConfig, Pairs
from workbench.distillation.losses import Scalar, alignment_loss
from workbench.distillation.processes import rows_of_all
from workbench.distillation.prompt_rows import PromptFinder, TokenBatch
from workbench.distillation.teacher_cache import TeacherOutputs
from workbench.errors import InputError
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_map import HeadMap
from workbench.matching.head_rows import Activation, hook_names, output_weights, require_fitting, rows_at
from workbench.matching.match import Matching, pairs_of
from workbench.models.hooked_model import HookedModel
from workbench.models.plain_heads import PlainHeads, Recording
from workbench.similarity.cka import Estimator, fewest_rows
from workbench.similarity.measures import Measure, checked_options
from workbench.tasks.base import PromptPairs
from workbench.values.settings import configured

Similarities = dict[str, Tensor]
"""Each pair's similarity by its name, without a graph."""
Model = HookedModel | PlainHeads
FEWEST = 3
"""Rows of which every measure has a value, CKA's estimators apart."""


class AlignmentSettings(TypedDict, total=False):
    """What of an alignment can be set besides measure, weight and positions; see `AlignmentConfig`."""

    estimator: Estimator
    options: dict[str, Any]
    """Settings of the measure by name."""
    reduction: Pairs
    """`sum` (the paper) or `mean` over the matched pairs."""
    activation: Activation


class CircuitAlignmentLoss(nn.Module):
    """`weight * SUM over matched pairs (1 - similarity)`, and each pair's similarity."""

    def __init__(
        self,
        student: nn.Module | HookedModel,
        teacher: nn.Module | HookedModel | TeacherOutputs | None,
        pairs: Matching | HeadMap | Sequence[AlignedPair],
        *,
        prompts: PromptPairs | None = None,
        measure: Measure = "linear_cka",
        weight: float | int = 1.0,
        positions: str | None = None,
        **settings: Unpack[AlignmentSettings],
    ) -> None:
        """`student`: a transformers model or a `Student`. `teacher`: one of these, its cached outputs on `prompts`, or
        None where every call brings its activations. `pairs`: what `match` returns. `positions`: None = as they were
        matched, or one named position for all. `prompts`: needed by `of_recording`, by cached outputs and by
        `positions`. Errors: `InputError` for heads that a model does not have, and for settings that don't fit."""
        super().__init__()
        chosen: dict[str, Any] = {"pairs" if name == "reduction" else name: value for name, value in settings.items()}
        self.config = configured(
            AlignmentConfig, {"measure": measure, "weight": float(weight), **chosen}, call="CircuitAlignmentLoss"
        )
        checked_options(self.config.measure, self.config.options)
        self.weight = self.config.weight
        """lambda; a schedule sets it anew before a step."""
        self.pairs = _pairs(pairs, prompts, positions)
        self.prompts = prompts
        if prompts is not None:
            require_fitting(self.config.measure, self.config.activation, prompts)
        self._finder = None if prompts is None else PromptFinder(prompts)
        self._student = _model(student)
        self._trained: PlainHeads | None = None
        """The model of the last recording, where it is not the student that the loss was made with."""
        self._teacher = teacher if teacher is None or isinstance(teacher, TeacherOutputs) else _model(teacher)
        self._require_heads()

    def _require_heads(self) -> None:
        for model, heads in (
            (self._student, [pair.student for pair in self.pairs]),
            (self._teacher, [pair.teacher for pair in self.pairs]),
        ):
            if isinstance(model, HookedModel | PlainHeads):
                for head in heads:
                    model.checked(head)
                if isinstance(model, PlainHeads) and self.config.activation == "pattern":
                    raise InputError(
                        "attention patterns are not read from a plain transformers model; align `z` or `result`, or "
                        "give a Student and a Teacher."
                    )
        if isinstance(self._teacher, TeacherOutputs):
            if self.prompts is None:
                raise InputError("cached outputs of a teacher belong to prompts; give these as `prompts`.")
            if len(self._teacher) != len(self.prompts):
                raise InputError(
                    f"the teacher cache holds {len(self._teacher)} prompts, and there are {len(self.prompts)}; build "
                    "it for these prompts."
                )

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        positions: Mapping[str, Bool[Tensor, "batch pos"]],
        teacher: Mapping[str, Tensor] | None = None,
    ) -> tuple[Scalar, Similarities]:
        """The loss of some prompts, from a forward of the student in the autograd graph.

        `positions`: masks by name; `last` and `all` need not be given. `teacher`: its activations on these tokens by
        hook name (`hooks.z(layer)`: [batch pos head d_head]); None runs the teacher, or looks the prompts up in its
        cached outputs. Errors: `InputError` when there is neither.
        """
        batch = TokenBatch(tokens=tokens, mask=mask, positions=positions)
        ours = _activations(self._student, tokens, mask, self._names("student"))
        return self._loss(self._student_rows(self._student, ours, batch), self._theirs(batch, teacher))

    def _theirs(self, batch: TokenBatch, given: Mapping[str, Tensor] | None) -> list[Float[Tensor, "_ _"]]:
        """The teacher's rows on the student's batch: of given activations, of the prompts' own (from a cache, or in
        another tokenizer's tokens), or from running the teacher on the student's tokens."""
        looked_up = isinstance(self._teacher, TeacherOutputs) or (
            self.prompts is not None and self.prompts.teacher is not None
        )
        if given is None and looked_up:
            assert self._finder is not None
            prompts = self._finder.rows_in(batch.tokens, batch.mask)
            return self._teacher_rows(prompts.index, batch.tokens.device)
        activations = self._live(batch.tokens, batch.mask) if given is None else given
        weights = self._weights(self._teacher, "teacher", batch.tokens.device)
        outputs = {name: value.to(batch.tokens.device) for name, value in activations.items()}
        return rows_at(weights, outputs, self._sites("teacher"), batch)

    @contextmanager
    def recording(self, model: nn.Module | None = None) -> Iterator[Recording]:
        """Record the heads in the forward of the student (or of `model`, which is trained in its place) inside the
        context. Errors: `InputError` for a student that is no transformers model, and where no forward ran."""
        plain = self._plain(model)
        with plain.recording(sorted({pair.student.layer for pair in self.pairs})) as record:
            yield record

    def of_recording(self, record: Recording, *, all_rows: bool = True) -> tuple[Scalar, Similarities]:
        """The loss on those rows of a recorded batch that begin with one of the `prompts`.

        `all_rows`: whether all rows must. Where they need not, and fewer begin with one than have a similarity, the
        loss is 0. Errors: `InputError` for a row that does not, and for heads' outputs that no gradient reaches.
        """
        if self._finder is None or record.tokens is None or record.mask is None:
            raise InputError("the rows of a recorded batch are recognised by their prompts; give them as `prompts`.")
        prompts = self._finder.rows_in(record.tokens, record.mask, all_rows=all_rows)
        _require_graph(record)
        activations = {name: value[prompts.rows.to(value.device)] for name, value in record.activations.items()}
        return self._loss(
            self._student_rows(self._recorded, activations, prompts.batch),
            self._teacher_rows(prompts.index, record.tokens.device),
            least=1 if all_rows else max(FEWEST, fewest_rows(self.config.estimator)),
        )

    @property
    def _recorded(self) -> Model:
        return self._trained if self._trained is not None else self._student

    def _plain(self, model: nn.Module | None) -> PlainHeads:
        known = self._recorded
        if model is None or (isinstance(known, PlainHeads) and known.model is model):
            if not isinstance(known, PlainHeads):
                raise InputError("a Student is run by the loss itself; record a transformers model, or call the loss.")
            return known
        self._trained = PlainHeads(model)
        for pair in self.pairs:
            self._trained.checked(pair.student)
        return self._trained

    def _names(self, side: Literal["student", "teacher"]) -> list[str]:
        return hook_names([getattr(pair, side) for pair in self.pairs], self.config.activation)

    def _sites(self, side: Literal["student", "teacher"]) -> list[Any]:
        return [(getattr(pair, side), getattr(pair, f"{side}_positions")) for pair in self.pairs]

    def _weights(
        self, model: Any, side: Literal["student", "teacher"], device: torch.device
    ) -> Mapping[int, Tensor] | None:
        """W_O of the layers of one side's heads on a device, for activation `result`."""
        if self.config.activation != "result":
            return None
        heads = [getattr(pair, side) for pair in self.pairs]
        if model is None:
            raise InputError("activation `result` needs the teacher's W_O; give the teacher, or align `z`.")
        if isinstance(model, TeacherOutputs):
            weights: Mapping[int, Tensor] = model.output_weights
        elif isinstance(model, HookedModel):
            weights = output_weights(model, heads, "result") or {}
        else:
            weights = {layer: model.output_weights(layer) for layer in {head.layer for head in heads}}
        return {layer: weight.to(device) for layer, weight in weights.items()}

    def _student_rows(
        self, model: Model, activations: Mapping[str, Tensor], prompts: TokenBatch
    ) -> list[Float[Tensor, "_ _"]]:
        """In the weights' dtype, as in the loop: bfloat16 of autocast has too few digits for Gram matrices. On one
        device, wherever the layers are."""
        dtype = next((each.dtype for each in model.parameters().values() if each.is_floating_point()), torch.float32)
        device = prompts.tokens.device
        outputs = {name: value.to(device, dtype) for name, value in activations.items()}
        return rows_at(self._weights(model, "student", device), outputs, self._sites("student"), prompts)

    @torch.no_grad()
    def _teacher_rows(self, index: Int[Tensor, " rows"], device: torch.device) -> list[Float[Tensor, "_ _"]]:
        """The teacher's rows on its own reading of some prompts of the set."""
        assert self.prompts is not None
        prompts = self.prompts.rows(index.to(self.prompts.clean.device)).for_teacher
        if isinstance(self._teacher, TeacherOutputs):
            outputs: Mapping[str, Tensor] = self._teacher.rows(index, self._names("teacher"))
        else:
            outputs = self._live(prompts.clean.to(device), prompts.mask.to(device))
        here = prompts.clean.device
        rows = rows_at(
            self._weights(self._teacher, "teacher", here),
            {name: value.to(here) for name, value in outputs.items()},
            self._sites("teacher"),
            prompts,
        )
        return [each.to(device) for each in rows]

    @torch.no_grad()
    def _live(self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> dict[str, Tensor]:
        if self._teacher is None or isinstance(self._teacher, TeacherOutputs):
            raise InputError("there is no teacher to run; give its activations, or the teacher itself.")
        device = next(iter(self._teacher.parameters().values())).device
        with torch.autocast(device.type, enabled=False):
            outputs = _activations(self._teacher, tokens.to(device), mask.to(device), self._names("teacher"))
        return {name: value.to(tokens.device) for name, value in outputs.items()}

    def _loss(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], *, least: int = 1) -> tuple[Scalar, Similarities]:
        """From the rows of both sides on all processes; 0 where a head has fewer than the least."""
        device = ours[0].device
        rows, processes = rows_of_all([*ours, *(each.to(device) for each in theirs)])
        if min(map(len, rows)) < least:
            return torch.stack([each.sum() for each in ours]).sum() * 0, {}
        config, half = self.config, len(ours)
        with torch.autocast(device.type, enabled=False):
            total, similarities = alignment_loss(
                list(zip(rows[:half], rows[half:], strict=True)),
                estimator=config.estimator,
                measure=config.measure,
                options=config.options,
                pairs=config.pairs,
                weights=[pair.weight for pair in self.pairs],
            )
        total = total + (processes - 1) * (total - total.detach())
        return self.weight * total, dict(zip(map(str, self.pairs), similarities, strict=True))


def _pairs(
    pairs: Matching | HeadMap | Sequence[AlignedPair], prompts: PromptPairs | None, positions: str | None
) -> tuple[AlignedPair, ...]:
    if isinstance(pairs, HeadMap) or (isinstance(pairs, Matching) and positions is not None):
        if prompts is None:
            raise InputError("where heads are read is known from prompts; give them as `prompts`.")
        aligned = pairs_of(pairs, prompts, positions)
    elif isinstance(pairs, Matching):
        aligned = pairs.pairs
    else:
        aligned = tuple(pairs)
        if positions is not None or not all(isinstance(pair, AlignedPair) for pair in aligned):
            raise InputError("pairs with positions of their own keep them; give what `match` returns, or a HeadMap.")
    if not aligned:
        raise InputError("no heads are matched, so there is nothing to align; match circuits that hold heads.")
    return aligned


def _model(model: nn.Module | HookedModel) -> Model:
    return model if isinstance(model, HookedModel) else PlainHeads(model)


def _activations(
    model: Model, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Tensor]:
    """By hook name, in the graph where gradients are enabled."""
    if isinstance(model, HookedModel):
        return model.activations(tokens, mask, names, gradients=torch.is_grad_enabled())[1]
    return model.activations(tokens, mask, names)


def _require_graph(record: Recording) -> None:
    if torch.is_grad_enabled() and not any(value.requires_grad for value in record.activations.values()):
        raise InputError(
            "no gradient reaches the heads' outputs, so that their alignment would train nothing: either all that "
            "trains comes after them, or gradient checkpointing is reentrant; set "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
