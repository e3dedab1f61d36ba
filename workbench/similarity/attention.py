"""Alikeness of attention patterns: 1 - mean KL(teacher || student) over query rows, so that the loss 1 - similarity is
that KL in nats.

    KL_i = sum_k t_ik log((t_ik + e) / (s_ik + e)),  e = 1e-9

X and Y are attention probabilities [*batch m key]: m query tokens (rows), the same keys on both sides. e keeps a key
that the student gives no weight finite, at a slope that half precision can hold; it moves the value by less than 1e-8 a
key. Not symmetric, unbounded below; 1 for equal patterns. It compares where heads look, not what they write: it is not
defined on `hook_z`.
"""

from workbench.errors import InputError
from workbench.similarity.rows import Features, Mask, Others, Value, filled, nan_stays_nan, rows_counted

SMALLEST = 1e-9
"""e of the equation."""


@nan_stays_nan
def attention_kl(x: Features, y: Others, *, mask: Mask | None = None) -> Value:
    """1 - mean KL(Y || X) of attention patterns, student X and teacher Y. Errors: `InputError` where the numbers of
    keys differ, or rows are no distributions."""
    if x.shape != y.shape:
        raise InputError(
            f"attention patterns over {x.shape[-1]} and {y.shape[-1]} keys can't be compared; use the same prompts for "
            "both models."
        )
    m = rows_counted(x, mask, least=1, measure="attention KL")
    student, teacher = filled(x, mask), filled(y, mask)
    for name, rows in (("student", student), ("teacher", teacher)):
        _require_distributions(name, rows, mask)
    terms = teacher * ((teacher + SMALLEST).log() - (student + SMALLEST).log())
    return 1 - terms.sum((-2, -1)) / m


def _require_distributions(name: str, rows: Features, mask: Mask | None) -> None:
    rows, total = rows.detach(), rows.detach().sum(-1)
    off = ((total - 1).abs() > 0.02) | (rows < 0).any(-1)  # bfloat16 rows sum to 1 within about 0.01
    if (off if mask is None else off & mask).any():
        raise InputError(
            f"the {name}'s rows are no attention patterns (at or above 0, summing to 1); measure attention_kl needs "
            "activation `pattern`."
        )
