"""Back-propagation of a step's losses: the batch whole, or in micro-batches on one or several processes.

The task loss is a mean over prompts, so the gradients of equal pieces average to the batch's, to rounding. CKA is no
mean over prompts: a row's gradient depends on all rows, and the mean of the pieces' CKA is another number (the biased
estimator is far higher at small m). So a split batch is aligned as GradCache does it (Gao et al. 2021): a first pass
without graph collects the student's rows from all pieces and processes; the alignment's gradient with respect to these
rows is computed once, on the whole batch; then each piece's forward is repeated with its graph, and its rows are
back-propagated against their part of that gradient. That is the chain rule: the gradient is the unsplit batch's to
rounding, at the price of a forward up to the last aligned layer, which a process with one piece does not pay: it keeps
its first graph.

What cannot be equal: dropout, whose masks are drawn piece by piece (the same in both passes). `alignment_batch: micro`
skips the first pass and averages the pieces' own alignment losses: cheaper, and another objective. The loss of
interchanges is a mean over prompts, and needs no first pass.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.distillation.objective import Index, Objective
from workbench.distillation.processes import Processes

Rows = Sequence[Float[Tensor, "_ _"]]
"""One matrix for each pair."""


Dropout = Callable[..., AbstractContextManager[None]]
"""Seeds dropout for the whole of a step's batch (no argument) or for a piece of it (its number)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Losses:
    """The losses of a step; None for one that is left out."""

    total: Float[Tensor, ""]
    task: Float[Tensor, ""] | None
    alignment: Float[Tensor, ""] | None
    ckas: Float[Tensor, " pairs"]

    def detached(self) -> "Losses":
        """The same without the graph."""
        task, alignment = (None if value is None else value.detach() for value in (self.task, self.alignment))
        return Losses(total=self.total.detach(), task=task, alignment=alignment, ckas=self.ckas)


def backward(objective: Objective, index: Index, weight: float, processes: Processes, dropout: Dropout) -> Losses:
    """Add the gradient of task loss + `weight` * alignment loss on a batch to the student's parameters; returns the
    losses.

    With several processes each adds its share: the sum over the processes is the gradient.
    """
    pieces = index.chunk(processes.count * objective.config.accumulate)
    if len(pieces) == 1:
        with dropout():
            task, alignment, ckas = objective.losses(index)
        losses = _losses(task, alignment, ckas, weight)
        losses.total.backward()
        return losses.detached()
    first = processes.index * objective.config.accumulate
    mine = range(first, first + objective.config.accumulate)
    if objective.similar and objective.config.alignment_batch == "whole":
        return _by_chain_rule(objective, pieces, mine, weight, processes, dropout)
    return _averaged(objective, pieces, mine, weight, processes, dropout)


def _averaged(
    objective: Objective, pieces: Sequence[Index], mine: range, weight: float, processes: Processes, dropout: Dropout
) -> Losses:
    """Each piece by itself, its losses divided by the number of pieces."""
    share, gradients = 1 / len(pieces), []
    for piece in mine:
        with dropout(piece):
            task, alignment, ckas = objective.losses(pieces[piece])
        shared = [None if value is None else value * share for value in (task, alignment)]
        losses = _losses(shared[0], shared[1], ckas * share, weight)
        losses.total.backward()
        gradients.append(losses.detached())
    task, alignment = (
        None if getattr(gradients[0], name) is None else _total([getattr(each, name) for each in gradients], processes)
        for name in ("task", "alignment")
    )
    return _losses(task, alignment, _total([each.ckas for each in gradients], processes), weight)


def _by_chain_rule(
    objective: Objective, pieces: Sequence[Index], mine: range, weight: float, processes: Processes, dropout: Dropout
) -> Losses:
    """The alignment on the whole batch, its gradient handed to the pieces."""
    rows_of: dict[int, tuple[Tensor | None, Rows]] = {}
    rows: dict[int, Rows] = {}
    for piece in mine:
        with dropout(piece):
            if len(mine) == 1:
                rows_of[piece] = objective.task_and_rows(pieces[piece])
            rows[piece] = rows_of[piece][1] if piece in rows_of else objective.rows_alone(pieces[piece])
    alignment, ckas, slopes = _whole_alignment(objective, pieces, rows, weight, processes)
    tasks = []
    for piece in mine:
        with dropout(piece):
            task, live = rows_of[piece] if piece in rows_of else objective.task_and_rows(pieces[piece])
        along = torch.stack([(row * slope).sum() for row, slope in zip(live, slopes[piece], strict=True)]).sum()
        share = None if task is None else task / len(pieces)
        (along if share is None else share + along).backward()
        tasks.append(None if share is None else share.detach())
    task = None if tasks[0] is None else _total([each for each in tasks if each is not None], processes)
    return _losses(task, alignment, ckas, weight)


def _whole_alignment(
    objective: Objective, pieces: Sequence[Index], rows: dict[int, Rows], weight: float, processes: Processes
) -> tuple[Float[Tensor, ""], Float[Tensor, " pairs"], dict[int, list[Tensor]]]:
    """(alignment loss, CKA of each pair, each own piece's gradient of `weight` * alignment with respect to its
    rows)."""
    counts = torch.tensor([objective.row_counts(piece) for piece in pieces])
    starts = counts.cumsum(0) - counts
    own = next(iter(rows.values()))
    whole = [matrix.new_zeros(int(total), matrix.shape[1]) for matrix, total in zip(own, counts.sum(0), strict=True)]
    places = {
        piece: [slice(int(s), int(s + c)) for s, c in zip(starts[piece], counts[piece], strict=True)] for piece in rows
    }
    for piece, matrices in rows.items():
        for full, where, matrix in zip(whole, places[piece], matrices, strict=True):
            full[where] = matrix.detach()
    leaves = [
        full.requires_grad_() for full in processes.summed(whole)
    ]  # zeros elsewhere: a sum gathers pieces of any length
    alignment, ckas = objective.alignment(leaves, objective.teacher_rows(torch.cat(list(pieces))))
    slopes = torch.autograd.grad(weight * alignment, leaves, materialize_grads=True)
    return (
        alignment.detach(),
        ckas,
        {piece: [slope[where] for slope, where in zip(slopes, places[piece], strict=True)] for piece in rows},
    )


def _losses(task: Tensor | None, alignment: Tensor | None, ckas: Tensor, weight: float) -> Losses:
    terms = [term for term in (task, None if alignment is None else weight * alignment) if term is not None]
    return Losses(total=sum(terms, torch.zeros(())), task=task, alignment=alignment, ckas=ckas)


def _total(values: Sequence[Tensor], processes: Processes) -> Tensor:
    return processes.summed([torch.stack(list(values)).sum(0)])[0]
