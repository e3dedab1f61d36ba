"""Circuit distillation inside somebody else's trainer: `transformers.Trainer` and what is made of it, such as TRL's
SFTTrainer, GKDTrainer and DistillationTrainer.

    class AlignedTrainer(CircuitAlignment, SFTTrainer): ...

    loss = CircuitAlignmentLoss(model, teacher, matching, prompts=train, weight=0.3)
    AlignedTrainer(model=model, args=args, train_dataset=rows, alignment=loss).train()

The trainer's own loss stays what it is; the alignment of those rows that begin with one of the loss's prompts is added
to it while it trains (evaluation sees the trainer's loss alone). The heads are read in the trainer's own forward.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from workbench.distillation.alignment_loss import CircuitAlignmentLoss
from workbench.distillation.masks import TrainedSlices, slices_of_heads
from workbench.errors import InputError
from workbench.models.plain_heads import PlainHeads
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head

IGNORED = -100
"""The label of a token that is not trained on, in `transformers`."""


class CircuitAlignment:
    """Mixed into a trainer, before it: adds the alignment to its loss, and trains the heads' slices alone where heads
    are named."""

    def __init__(
        self,
        *arguments: Any,
        alignment: CircuitAlignmentLoss | None,
        heads: Sequence[Head] | Literal["matched"] | None = None,
        train_kv: bool = True,
        other_rows: Literal["refuse", "skip"] = "refuse",
        **named: Any,
    ) -> None:
        """`alignment`: None trains without, the control at equal budget. `heads`: only their slices train, under the
        masks of the library's own loop (`matched`: the heads of the alignment's pairs), of a peft model its LoRA
        factors' parts for them; None trains what the trainer trains. `train_kv`: with grouped-query attention, the
        shared keys and values too. `other_rows`: what becomes of rows that begin with none of the prompts; `skip`
        leaves them to the trainer's loss. The rest is the trainer's. Errors: `InputError` for `matched` heads without
        an alignment, and for heads' slices in float16."""
        self._alignment, self._train_kv, self._all_rows = alignment, train_kv, other_rows == "refuse"
        if isinstance(heads, str):
            if heads != "matched" or alignment is None:
                raise InputError(f"heads={heads!r} is neither a list of heads nor 'matched', the alignment's own.")
            heads = list(dict.fromkeys(pair.student for pair in alignment.pairs))
        self._heads, self._slices, self._masks = heads, None, ExitStack()
        self._similarities: list[dict[str, Tensor]] = []
        super().__init__(*arguments, **named)
        trainer: Any = self
        if heads is not None and trainer.args.fp16:
            raise InputError("heads' slices can't train under float16's loss scaling; set bf16=True, or neither.")

    @property
    def slices(self) -> TrainedSlices | None:
        """What trains, where heads are named; made when the training begins."""
        return self._slices

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """The trainer's loss, plus the alignment while it trains."""
        trainer: Any = super()
        if self._alignment is None or not model.training:
            return trainer.compute_loss(model, inputs, *arguments, **named)
        me: Any = self
        with self._alignment.recording(me.accelerator.unwrap_model(model)) as record:
            result = trainer.compute_loss(model, inputs, *arguments, **named)
        alignment, similarities = self._alignment.of_recording(record, all_rows=self._all_rows)
        self._similarities.append({"alignment_loss": alignment.detach(), **similarities})
        items = named.get("num_items_in_batch", arguments[1] if len(arguments) > 1 else None)
        alignment = alignment / self._pieces(items)
        return (result[0] + alignment, *result[1:]) if isinstance(result, tuple) else result + alignment

    def _pieces(self, items: Any) -> int:
        """What the trainer does not divide by itself: a loss over all items of the accumulated batch is a sum over its
        micro-batches, and the alignment is a mean over them."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            accepts = trainer.model_accepts_loss_kwargs and items is not None
            scaled = accepts or trainer.compute_loss_func is not None
        return trainer.current_gradient_accumulation_steps if scaled else 1

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """The trainer's log with the means, since the last one, of the alignment loss and of each pair's
        similarity."""
        if "loss" in logs and self._similarities:
            for name in dict.fromkeys(name for each in self._similarities for name in each):
                values = torch.stack([each[name] for each in self._similarities if name in each])
                logs[name if name == "alignment_loss" else f"similarity/{name}"] = float(values.mean())
            self._similarities.clear()
        trainer: Any = super()
        trainer.log(logs, *arguments, **named)

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's optimizer, of the heads' slices alone where heads are named: weight decay, momentum and
        clipping see nothing else."""
        trainer, base = cast(Any, self), cast(Any, super())
        if self._heads is None or trainer.optimizer is not None:
            return base.create_optimizer(*([] if model is None else [model]))
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("heads' slices train in one process or under DDP; leave FSDP or DeepSpeed, or `heads`.")
        plain = PlainHeads(trainer.model)
        plain.confine_adapter(self._heads)
        slices = TrainedSlices(plain, slices_of_heads(plain, self._heads, train_kv=self._train_kv))
        self._masks.close()
        self._masks.enter_context(slices.masked_gradients())
        kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        group = {"params": list(slices.leaves.values()), "weight_decay": trainer.args.weight_decay}
        optimizer = kind([group], **settings)
        optimizer.register_step_pre_hook(lambda *_: slices.collect_gradients())
        optimizer.register_step_post_hook(lambda *_: slices.write_back())
        self._slices, trainer.optimizer = slices, optimizer
        return optimizer

    def train(self, *arguments: Any, **named: Any) -> Any:
        """The trainer's training; the model's flags are afterwards as they were."""
        self._require_no_single_row()
        trainer: Any = super()
        try:
            return trainer.train(*arguments, **named)
        finally:
            self._masks.close()

    def _require_no_single_row(self) -> None:
        """The end of an epoch is not the time to learn that its last batch is too small to be compared."""
        trainer: Any = self
        rows, args = trainer.train_dataset, trainer.args
        if self._alignment is None or not self._all_rows or args.dataloader_drop_last or args.world_size > 1:
            return
        if hasattr(rows, "__len__") and len(rows) % args.train_batch_size == 1:
            raise InputError(
                f"the last batch of an epoch ({len(rows)} rows in batches of {args.train_batch_size}) would be one "
                "row, which has no similarity; set dataloader_drop_last=True, or another per_device_train_batch_size."
            )


def training_rows(prompts: PromptPairs, labels: Int[Tensor, "batch *token"] | None = None) -> Dataset:
    """Prompts with their answers as tokenised rows of a trainer: `input_ids`, and `labels` on the answer alone.

    `labels`: the teacher's answers, the paper's task loss: of one token `teacher.final_logits(...).argmax(-1)`, of
    several `greedy_answers(teacher, prompts)`, [batch token] padded with -1. None: the right ones, whole. Errors:
    `InputError` for sets of answers without `labels`.
    """
    if labels is None and prompts.answers.ndim > 1:
        raise InputError(
            "a trainer's row has one answer, and these prompts have sets of them; give `labels` (the teacher's "
            "answers), or `prompts.first_members()`."
        )
    if labels is None:
        labels = prompts.answers if prompts.answer_tokens is None else prompts.answer_tokens
    rows = []
    for tokens, mask, ids in zip(prompts.clean, prompts.mask, labels.reshape(len(prompts), -1).tolist(), strict=True):
        real, answer = tokens[mask].tolist(), [token for token in ids if token >= 0]
        rows.append({"input_ids": [*real, *answer], "labels": [*[IGNORED] * len(real), *answer]})
    return Dataset.from_list(rows)
