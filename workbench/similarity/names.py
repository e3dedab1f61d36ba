"""The names of measures and estimators, apart from their arithmetic: settings name them without loading it."""

from typing import Literal

Estimator = Literal["biased", "debiased"]
"""Of HSIC in CKA."""
Measure = Literal[
    "linear_cka",
    "rbf_cka",
    "procrustes",
    "gram",
    "rsa",
    "svcca",
    "pwcca",
    "projection_mse",
    "projection_cosine",
    "attention_kl",
]
"""The measures of `workbench.similarity.measures`."""
