"""Results -> plain JSON for the page. Numbers keep six digits; NaN (not measured) becomes null."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.circuit import Circuit
from workbench.circuits.evaluation import CircuitReport
from workbench.explorer.subject import strongest
from workbench.readouts.logit_attribution import LogitAttribution
from workbench.readouts.patterns import AttentionPatterns
from workbench.values.refs import Composition, Head, Receiver
from workbench.values.scores import Order, Scores


def plain(value: Any) -> Any:
    """JSON: floats with six digits, NaN and infinities as null, tuples as lists, heads as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Head) else value


def of_map(scores: Scores, order: Order) -> dict[str, Any]:
    """A heat map: means, intervals where there are several examples, ranks (1 = most important), unit and baseline."""
    ranked = scores.ranked(by=order)
    ranks: list[list[int | None]] = [[None] * scores.values.shape[1] for _ in range(scores.values.shape[0])]
    for rank, head in enumerate(ranked, 1):
        ranks[head.layer][head.index] = rank
    examples = scores.values.shape[-1]
    low, high = scores.confidence_interval() if examples > 1 else (None, None)
    return {
        "values": scores.mean().double().tolist(),
        "low": None if low is None else low.double().tolist(),
        "high": None if high is None else high.double().tolist(),
        "ranks": ranks,
        "measured": len(ranked),
        "examples": examples,
        "unit": scores.unit,
        "baseline": scores.baseline,
    }


def of_attention(patterns: AttentionPatterns) -> dict[str, Any]:
    """A head's attention: row by row, each as far as its own token."""
    rows = patterns.weights[0].double().tolist()
    return {
        "tokens": patterns.tokens,
        "weights": [[round(value, 4) for value in row[: n + 1]] for n, row in enumerate(rows)],
        "unit": patterns.unit,
    }


def of_thumbnails(weights: Float[Tensor, "head query key"]) -> dict[str, Any]:
    """Attention of several heads in 256 steps of the largest weight of each: rows of bytes, in base 64."""
    largest = weights.flatten(1).max(1).values.clamp(min=1e-9)
    steps = (255 * weights / largest[:, None, None]).round().clamp(0, 255).to(torch.uint8)
    coded = [base64.b64encode(bytes(each.flatten().tolist())).decode("ascii") for each in steps]
    return {"cells": weights.shape[-1], "heads": coded, "largest": largest.tolist()}


def of_estimated_reads(edges: Scores, head: Head, count: int) -> list[dict[str, Any]]:
    """The heads below with the largest estimated effect through q, k and v, and that through each."""
    through = {part: edges.labels["receiver"].index(_reading(edges, head, part)) for part in ("q", "k", "v")}
    means = edges.mean().nan_to_num(0.0)
    together = means[:, list(through.values())].sum(1)
    names = edges.labels["sender"]
    best = [place for place in together.abs().argsort(descending=True).tolist() if names[place].startswith("L")]
    return [
        {
            "head": names[place],
            "together": float(together[place]),
            **{part: float(means[place, column]) for part, column in through.items()},
        }
        for place in best[:count]
        if float(together[place])
    ]


def _reading(edges: Scores, head: Head, part: Composition) -> str:
    """A head's input by its label: k and v of a group stand under the group's first head."""
    names = [str(Receiver(Head(head.layer, index), part)) for index in range(head.index, -1, -1)]
    return next(name for name in names if name in edges.labels["receiver"])


def of_estimated_feeds(edges: Scores, head: Head, count: int) -> dict[str, Any]:
    """The largest estimated effects on heads above, and that on the logits."""
    row = edges.mean()[edges.labels["sender"].index(str(head))].tolist()
    means = dict(zip(edges.labels["receiver"], row, strict=True))
    logits = means.pop("logits", math.nan)
    known = [(name, value) for name, value in means.items() if "." in name and value and math.isfinite(value)]
    return {"logits": logits, "heads": [list(each) for each in sorted(known, key=lambda each: -abs(each[1]))[:count]]}


def of_attribution(attribution: LogitAttribution, count: int) -> dict[str, Any]:
    """The largest direct shares of the logit difference, [part, share], and the sum of all."""
    frame = attribution.to_frame()
    parts = [list(each) for each in zip(frame["part"].tolist(), frame["mean"].tolist(), strict=True)]
    return {
        "parts": parts[:count],
        "count": len(parts),
        "total": float(attribution.total.mean()),
        "unit": attribution.heads.unit,
    }


def of_share(attribution: LogitAttribution, head: Head) -> dict[str, Any]:
    """A head's direct share of the logit difference, its rank by size among the heads, and the sum that it is a share
    of."""
    ranked = strongest(attribution.heads, attribution.heads.values[..., 0].numel())
    return {
        "share": float(attribution.heads.at(head).mean()),
        "rank": ranked.index(head) + 1,
        "heads": len(ranked),
        "total": float(attribution.total.mean()),
    }


def of_reads(together: Scores, singly: Mapping[str, Scores], count: int) -> list[dict[str, Any]]:
    """The heads below with the largest path effect through q, k and v together, with that through each, as far as it is
    known."""
    effects = [(head, float(together.at(head).mean())) for head in strongest(together, count)]
    return [
        {
            "head": str(head),
            "together": value,
            **{name: float(scores.at(head).mean()) for name, scores in singly.items()},
        }
        for head, value in effects
        if value
    ]


def of_feeds(scores: Scores, count: int) -> dict[str, Any]:
    """The largest path effects on heads above, [receiver, effect], and that on the logits."""
    means = dict(zip(scores.labels["receiver"], scores.mean()[0].tolist(), strict=True))
    logits = means.pop("logits", math.nan)
    known = [(name, value) for name, value in means.items() if value and math.isfinite(value)]
    return {"logits": logits, "heads": [list(each) for each in sorted(known, key=lambda each: -abs(each[1]))[:count]]}


def of_circuit(circuit: Circuit) -> dict[str, Any]:
    """The heads of a circuit with their roles."""
    return {
        "heads": [{"head": str(head), "role": circuit.role_of(head)} for head in circuit.heads],
        "method": circuit.method,
        "shape": circuit.shape,
    }


def of_report(report: CircuitReport) -> dict[str, Any]:
    """An evaluation's numbers."""
    return report.to_json()


def common_scale(maps: Sequence[Mapping[str, Any]]) -> float:
    """The largest |value| of several heat maps: they share one scale, symmetric around 0."""
    values = [abs(value) for each in maps for row in each["values"] for value in row if math.isfinite(value)]
    return max(values, default=0.0) or 1.0
