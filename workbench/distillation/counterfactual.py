"""What alignment asks of the corrupt prompts: differences between a prompt and its counterpart, and interchanges.

Differences: a pair is compared by h(clean) - h(corrupt) (arXiv 2606.16897), so the teacher's activations on the corrupt
prompts are cached too, by hook name. Interchange (DIITO, Wu et al. 2022, arXiv 2112.02505): matched heads of both
models take their values on the corrupt prompt in a run on the clean one, and the student is to answer as the teacher:

    L_interchange = mean over prompts of KL(teacher's interchanged output || student's)

The teacher's side is computed once for the training prompts. Several pairs are interchanged together, or one for each
prompt in turn (the pair of prompt i is i modulo their number), so that what each head carries is asked by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.distillation.config import AlignmentConfig
from workbench.distillation.teacher_cache import TeacherOutputs
from workbench.distillation.top_logits import TopLogits
from workbench.errors import InputError
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.head_rows import hook_names, place
from workbench.models.hooked_model import Teacher
from workbench.patching.interchange import Site, interchanged_logits
from workbench.tasks.base import PromptPairs

Index = Int[Tensor, " rows"]
BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CounterfactualOutputs:
    """A teacher's outputs on the training prompts, and what their corrupt counterparts add to them."""

    clean: TeacherOutputs
    corrupt: TeacherOutputs | None
    """On the corrupt prompts; None where no differences are compared."""
    interchanged: Float[Tensor, "batch d_vocab"] | None
    """Logits of the clean prompts with the matched heads' values of the corrupt ones."""

    @property
    def output_weights(self) -> Mapping[int, Float[Tensor, "head d_head d_model"]]:
        """W_O by layer."""
        return self.clean.output_weights

    @property
    def fingerprint(self) -> str:
        """Of teacher and prompts, the corrupt ones too."""
        return self.clean.fingerprint

    def __len__(self) -> int:
        return len(self.clean)

    def logits_of(self, index: Index) -> Float[Tensor, "rows *token d_vocab"] | TopLogits:
        """Logits of some clean prompts."""
        return self.clean.logits_of(index)

    def labels_of(self, index: Index) -> Int[Tensor, "rows *token"]:
        """Answers of some clean prompts."""
        return self.clean.labels_of(index)

    def rows(self, index: Index, names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of some clean prompts by hook name."""
        return self.clean.rows(index, names)


def teacher_alignment_outputs(
    outputs: Callable[[PromptPairs, Sequence[str]], TeacherOutputs],
    teacher: Teacher,
    prompts: PromptPairs,
    pairs: Sequence[AlignedPair],
    alignment: AlignmentConfig | None,
) -> TeacherOutputs:
    """All that an alignment asks of a teacher on the training prompts: `outputs` makes (or finds) the teacher's outputs
    on some prompts with the activations of some hooks. Errors: `InputError` where prompts differ in length and a pair
    is aligned at a token without a counterpart."""
    names = hook_names([pair.teacher for pair in pairs], alignment.activation if alignment else "z")
    clean = outputs(prompts, names)
    if alignment is None or not pairs or not (alignment.differs or alignment.interchanges):
        return clean
    for pair in pairs:  # known before the teacher runs
        for side, positions in ((prompts, pair.student_positions), (prompts.for_teacher, pair.teacher_positions)):
            side.require_counterparts(place(side, positions))
    return CounterfactualOutputs(
        clean=clean,
        corrupt=outputs(prompts.swapped(), names) if alignment.differs else None,
        interchanged=_interchanged(teacher, prompts, pairs, alignment) if alignment.interchanges else None,
    )


def _interchanged(
    teacher: Teacher, prompts: PromptPairs, pairs: Sequence[AlignedPair], alignment: AlignmentConfig
) -> Float[Tensor, "batch d_vocab"]:
    logits = []
    for index in torch.arange(len(prompts)).split(BATCH):
        some = prompts.rows(index)
        logits.append(interchanged_logits(teacher, some, sites_of(pairs, "teacher", some, index, alignment)))
    return torch.cat(logits)


def sites_of(
    pairs: Sequence[AlignedPair], side: str, prompts: PromptPairs, index: Index, alignment: AlignmentConfig
) -> list[Site]:
    """The sites of one side that are interchanged in some prompts of the training set (`index`: their places in it)."""
    sites = []
    for number, pair in enumerate(pairs):
        where = place(prompts, getattr(pair, f"{side}_positions"))
        if alignment.interchanged == "one":
            where = where & (index.to(where.device) % len(pairs) == number)[:, None]
        sites.append((getattr(pair, side), where))
    return sites


def counterfactuals_of(outputs: TeacherOutputs) -> CounterfactualOutputs:
    """Errors: `InputError` for outputs on the clean prompts alone."""
    if not isinstance(outputs, CounterfactualOutputs):
        raise InputError(
            "differences and interchanges need the teacher's outputs on the corrupt prompts too; make its outputs with "
            "`teacher_alignment_outputs`."
        )
    return outputs
