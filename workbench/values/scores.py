"""`Scores`: one labelled array for sweeps, profiles and similarity matrices, with their statistics.

Values are one number per example wherever examples exist (`example` is then the last axis); means, errors and intervals
happen here, once. NaN = not measured; it is never counted.

Sign, everywhere: an effect is positive where the head helps. Path patching, activation patching and edges are clean
minus patched (with the corrupt activation put into the clean run), ablation is whole minus ablated, attribution
estimates these; each is a fall of the metric, and its unit begins with "fall of".

In the glossary's one sentence: *effect* = how much the metric falls when a head's contribution is taken away; positive
means that the head helps, negative that it works against the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from workbench import seeds, storage
from workbench.errors import InputError, nearest
from workbench.values.display import Row, Shown
from workbench.values.refs import Head, head_named

Order = Literal["lowest", "highest", "magnitude"]
"""Which scores come first."""
STRONGEST = 5
"""How many entries scores show of themselves."""
FORMAT = 2
"""Of the files. In 1 (no number) path effects, activation patching and edges were patched minus clean ("change of")."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Scores(Shown):
    """A labelled array.

    `axes` names the dimensions of `values`, `labels` gives each axis its entries (an axis without labels is numbered).
    `unit` says what a value is, with its sign convention; `baseline` is the value without any intervention (mean over
    examples).
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]
    unit: str
    baseline: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.cpu())  # to be read, drawn and kept, wherever they were computed
        if self.values.ndim != len(self.axes):
            raise InputError(f"values have {self.values.ndim} dimensions, axes name {len(self.axes)}: {self.axes}.")
        for axis, names in self.labels.items():
            if axis not in self.axes or len(names) != self.values.shape[self.axes.index(axis)]:
                raise InputError(
                    f"axis {axis!r} has {len(names)} labels that do not fit values of shape {tuple(self.values.shape)} "
                    f"over {self.axes}."
                )

    @classmethod
    def of_heads(cls, values: Tensor, *, unit: str, baseline: float | None = None) -> "Scores":
        """Values [layer head] or [layer head example]."""
        axes = ("layer", "head", "example")[: values.ndim]
        labels = {
            "layer": tuple(f"L{i}" for i in range(values.shape[0])),
            "head": tuple(f"H{i}" for i in range(values.shape[1])),
        }
        return cls(values=values, axes=axes, labels=labels, unit=unit, baseline=baseline)

    def _title(self) -> str:
        shape = " x ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.values.shape, strict=True))
        baseline = "" if self.baseline is None else f", baseline {self.baseline:.4g}"
        return f"Scores ({shape}): {self.unit}{baseline}"

    def _table(self) -> tuple[Row, Sequence[Row]]:
        """The entries of largest |mean|, with their standard error over examples."""
        means = self.mean()
        sizes = means.abs().nan_to_num(-1.0).flatten()
        places = [
            place for place in sizes.argsort(descending=True, stable=True)[:STRONGEST].tolist() if sizes[place] >= 0
        ]
        errors = self.standard_error().flatten() if self.per_example else None
        rows = []
        for place in places:
            spread = "" if errors is None or errors[place].isnan() else f"± {float(errors[place]):.2g}"
            rows.append((self._name_of(place), f"{float(means.flatten()[place]):+.4g}", spread))
        return (("strongest", "mean", "") if self.per_example else ("strongest", "value", "")), rows

    def _name_of(self, place: int) -> str:
        """The labels of an entry: `L2H1`, `L0H1 -> L2H0.q`, `L3 last`."""
        axes = [axis for axis in self.axes if axis != "example"]
        sizes = [size for axis, size in zip(self.axes, self.values.shape, strict=True) if axis != "example"]
        where = np.unravel_index(place, sizes) if sizes else ()
        names = [
            self.labels[axis][int(index)] if axis in self.labels else str(int(index))
            for axis, index in zip(axes, where, strict=True)
        ]
        if axes[:2] == ["layer", "head"]:
            return " ".join(["".join(names[:2]), *names[2:]])
        return (" -> " if axes[:2] == ["sender", "receiver"] else " ").join(names)

    @property
    def per_example(self) -> bool:
        """Whether the last axis is `example`."""
        return self.axes[-1:] == ("example",)

    def mean(self) -> Tensor:
        """Mean over examples (the values themselves when there is no example axis)."""
        return self.values.nanmean(-1) if self.per_example else self.values

    def standard_error(self) -> Tensor:
        """Standard error of the mean over examples. Errors: `InputError` without an example axis."""
        values = self._examples()
        count = (~values.isnan()).sum(-1)
        variance = (values - self.mean()[..., None]).square().nansum(-1) / (
            count - 1
        )  # no examples or one: 0 / -1 or 0 / 0
        return torch.where(count > 1, (variance / count).sqrt(), torch.nan)

    def confidence_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Student's t interval of the mean over examples: (low, high)."""
        values = self._examples()
        count = (~values.isnan()).sum(-1).clamp(min=2)
        width = (
            torch.from_numpy(np.asarray(stats.t.ppf(0.5 + level / 2, count.numpy() - 1))).to(values.dtype)
            * self.standard_error()
        )
        return self.mean() - width, self.mean() + width

    def permutation_p_values(
        self, *, permutations: int = 9999, seed: int = 0, side: Literal["two-sided", "greater", "less"] = "two-sided"
    ) -> Tensor:
        """p of each entry's mean being 0, by flipping the signs of examples at random (paired differences have none
        under the null).

        The smallest p is 1 / (permutations + 1). Entries without examples are NaN. Errors: `InputError` without an
        example axis.
        """
        values = self._examples().double()
        flat, observed = values.nan_to_num(0.0).flatten(0, -2), values.nan_to_num(0.0).sum(-1).flatten()
        sign = {"two-sided": 0.0, "greater": 1.0, "less": -1.0}[side]
        beyond, draw = torch.ones(len(flat), dtype=torch.float64), seeds.generator(seed, "sign flips")
        for start in range(0, permutations, 1000):
            count = min(1000, permutations - start)
            flips = torch.randint(0, 2, (count, flat.shape[1]), generator=draw).double() * 2 - 1
            sums, slack = flips @ flat.T, 1e-12 * flat.abs().sum(-1)
            further = sums.abs() >= observed.abs() - slack if sign == 0 else sign * sums >= sign * observed - slack
            beyond += further.sum(0)
        p = beyond / (permutations + 1)
        return torch.where(values.isnan().all(-1), torch.nan, p.view(values.shape[:-1]))

    def _examples(self) -> Tensor:
        if not self.per_example:
            raise InputError(
                "these scores have no example axis, so no interval can be given; keep the values per example."
            )
        return self.values

    def select(self, **where: str) -> "Scores":
        """The entries at some labels, e.g. `select(layer="L3")`; those axes are dropped."""
        values, axes = self.values, list(self.axes)
        for axis, label in where.items():
            if axis not in axes or label not in self.labels.get(axis, ()):
                raise InputError(f"no {label!r} on axis {axis!r}; {nearest(label, self.labels.get(axis, axes))}")
            values = values.select(axes.index(axis), self.labels[axis].index(label))
            axes.remove(axis)
        return replace(
            self,
            values=values,
            axes=tuple(axes),
            labels={axis: names for axis, names in self.labels.items() if axis in axes},
        )

    def normalized(self) -> "Scores":
        """Divided by the largest absolute mean, so that the largest effect is 1 or -1."""
        largest = self.mean()[~self.mean().isnan()].abs().max()
        return replace(self, values=self.values / largest, unit=f"{self.unit}, divided by the largest", baseline=None)

    def ranked(self, *, by: Order = "highest") -> list[Head]:
        """The measured heads of [layer head] scores, most important first: those that help most (`highest`), those that
        work most against the answer (`lowest`), or both (`magnitude`)."""
        if by not in get_args(Order):
            raise InputError(f"heads are ranked by {', '.join(get_args(Order))}; {nearest(by, get_args(Order))}")
        means = self.mean()
        if self.axes[:2] != ("layer", "head") or means.ndim != 2:
            raise InputError(f"only scores over (layer, head) rank heads; these are over {self.axes}.")
        keys = {"lowest": means, "highest": -means, "magnitude": -means.abs()}[by]
        heads = [Head(layer, head) for layer, head in (~means.isnan()).nonzero().tolist()]
        return sorted(heads, key=lambda head: (float(keys[head.layer, head.index]), head))

    def top(self, count: int, *, by: Order = "highest") -> list[Head]:
        """The `count` most important heads."""
        return self.ranked(by=by)[:count]

    def at(self, head: Head | str) -> Tensor:
        """The value (or values per example) of a head."""
        head = head_named(head)
        if not (head.layer < self.values.shape[0] and head.index < self.values.shape[1]):
            raise InputError(
                f"{head} is outside the {self.values.shape[0]} layers x {self.values.shape[1]} heads of these scores."
            )
        return self.values[head.layer, head.index]

    def to_frame(self) -> pd.DataFrame:
        """A row per entry: labels, mean and, with examples, the 95 % interval and number of examples."""
        axes = [axis for axis in self.axes if axis != "example"]
        means = self.mean()
        names = [self.labels.get(axis, tuple(map(str, range(means.shape[i])))) for i, axis in enumerate(axes)]
        frame = pd.DataFrame(index=pd.MultiIndex.from_product(names, names=axes)).reset_index()
        frame["mean"] = means.flatten().double().numpy()
        if self.per_example:
            low, high = self.confidence_interval()
            frame["low"], frame["high"] = low.flatten().double().numpy(), high.flatten().double().numpy()
            frame["examples"] = (~self.values.isnan()).sum(-1).flatten().numpy()
        return frame

    def save(self, path: str | Path, *, identity: str = "") -> None:
        """Write safetensors with the axes, labels, unit and baseline in its metadata; `identity` says what they were
        computed from."""
        described = {"axes": self.axes, "labels": self.labels, "unit": self.unit, "baseline": self.baseline}
        storage.write_tensors(
            Path(path),
            {"values": self.values},
            metadata={"scores": json.dumps({"format": FORMAT, **described}), "identity": identity},
        )

    @classmethod
    def load(cls, path: str | Path, *, identity: str | None = None) -> "Scores":
        """Read what `save` wrote; effects of earlier versions get today's sign (`upgraded`).

        Errors: `InputError` when missing, damaged, of a later version, or (where `identity` is given) computed from
        something else.
        """
        tensors, metadata = storage.read_tensors(Path(path))
        if "scores" not in metadata or "values" not in tensors:
            raise InputError(f"{path} holds no scores; it was written by something else.")
        try:
            described = storage.read_typed(json.loads(metadata["scores"]), _Described, what="a description of scores")
            if not tensors["values"].is_floating_point():
                raise InputError(f"their values are {tensors['values'].dtype}, not floating-point numbers.")
            scores = cls(
                values=tensors["values"],
                axes=described.axes,
                labels=described.labels,
                unit=described.unit,
                baseline=described.baseline,
            )
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} holds no scores that can be read: {str(error).rstrip('.')}; delete it and run the stage that "
                "writes it again."
            ) from None
        written = described.format
        if written > FORMAT:
            raise InputError(f"{path} was written by a later version of the workbench (format {written}); update it.")
        if identity is not None and metadata.get("identity") != identity:
            what = "another model, other prompts or settings, or another metric"
            if written < FORMAT:
                what = "an earlier version of the workbench, which did not say enough of what they were computed from"
            raise InputError(f"{path} holds scores of {what}; delete it, or keep these scores elsewhere.")
        return scores if written >= FORMAT else upgraded(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """What is written of scores beside their values."""

    axes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    unit: str
    baseline: float | None
    format: int = 1


CHANGE = re.compile(r"^(relative )?change of ")


def upgraded(scores: Scores) -> Scores:
    """Scores of format 1 with today's sign: what was a change (patched minus clean) becomes a fall (clean minus
    patched); all other scores are as they were."""
    if not CHANGE.match(scores.unit):
        return scores
    unit = CHANGE.sub(lambda match: f"{match[1] or ''}fall of ", scores.unit)
    return replace(scores, values=-scores.values, unit=unit.replace(" (patched minus clean)", ""))


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson interval of a proportion (scipy's `binomtest`)."""
    interval = stats.binomtest(successes, trials).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """McNemar's exact test on paired outcomes: (only first right, only second right, two-sided p)."""
    if first.shape != second.shape:
        raise InputError(f"McNemar's test pairs the same prompts; got {first.shape[0]} and {second.shape[0]}.")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p = stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    return only_first, only_second, float(p)


def joined(scores: Sequence[Scores]) -> Scores:
    """The same scores over more examples: concatenated along `example`."""
    baselines = [part.baseline for part in scores]
    weights = [part.values.shape[-1] for part in scores]
    baseline = (
        None
        if None in baselines
        else float(np.average([value for value in baselines if value is not None], weights=weights))
    )
    return replace(scores[0], values=torch.cat([part.values for part in scores], -1), baseline=baseline)
