"""How well scores find a circuit that is known: the area under the ROC curve, over edges or nodes."""

import torch
from jaxtyping import Bool
from scipy import stats
from torch import Tensor

from workbench.errors import InputError
from workbench.patching.attribution import attribute_nodes
from workbench.values.scores import Scores


def auroc(scores: Scores, truth: Bool[Tensor, "..."]) -> float:
    """The chance that an edge (or node) of the circuit scores higher, by size, than one outside; ties count by half.

    `truth`: which entries of the mean scores belong to the circuit; NaN scores are left out. Errors: `InputError` where
    the circuit holds all or none of what is scored.
    """
    means = scores.mean()
    if truth.shape != means.shape:
        raise InputError(
            f"the truth is of shape {tuple(truth.shape)}, the scores {tuple(means.shape)}; mark each entry."
        )
    scored = ~means.isnan()
    sizes, inside = means[scored].abs(), truth[scored]
    members, others = int(inside.sum()), int((~inside).sum())
    if not members or not others:
        raise InputError("an area under the ROC curve needs scores inside the circuit and outside it.")
    ranks = torch.from_numpy(stats.rankdata(sizes.numpy()))
    return (float(ranks[inside].sum()) - members * (members + 1) / 2) / (members * others)


def node_scores(scores: Scores) -> Scores:
    """A node's score from those of its edges: that of everything it sends, the embedding left out."""
    nodes = attribute_nodes(scores)
    return Scores(
        values=nodes.values[1:], axes=nodes.axes, labels={"sender": nodes.labels["sender"][1:]}, unit=nodes.unit
    )
