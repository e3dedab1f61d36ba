"""Accuracy broken down by a fact of the pairs: does the model still answer when eight operations touch the queried
box?"""

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool
from torch import Tensor

from workbench.errors import InputError, nearest
from workbench.values.scores import wilson_interval


def accuracy_by(dataset: Dataset, correct: Bool[Tensor, " batch"], *, fact: str = "touching") -> pd.DataFrame:
    """One row for each value of a fact, ascending: value, prompts, correct, accuracy, low, high (95 % Wilson interval).

    `correct`: which rows of `dataset` were answered right, in its order. Errors: `InputError` for an unknown fact and
    another number of rows.
    """
    known = dataset.features.get("facts", {})
    if fact not in known:
        raise InputError(f"these pairs record no fact {fact!r}; {nearest(fact, known)}")
    if len(dataset) != len(correct):
        raise InputError(
            f"{len(correct)} outcomes for {len(dataset)} rows; give one for each row, in the dataset's order."
        )
    values = torch.tensor([facts[fact] for facts in dataset["facts"]])
    return pd.DataFrame([_row(fact, value, correct.cpu()[values == value]) for value in sorted(set(values.tolist()))])


def _row(fact: str, value: int, correct: Bool[Tensor, " some"]) -> dict[str, int | float]:
    prompts, right = len(correct), int(correct.sum())
    low, high = wilson_interval(right, prompts)
    return {fact: value, "prompts": prompts, "correct": right, "accuracy": right / prompts, "low": low, "high": high}
