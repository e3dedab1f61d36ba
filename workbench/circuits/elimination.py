"""Backward elimination: remove, each time, the part whose removal from *what is left* costs least, until too little is
left.

Heads that stand in for each other hide each other from single ablations: removing one costs nothing while the other is
there. Elimination removes the first for nothing and then sees what the second is worth.

    C_0 = everything;   C_{k+1} = C_k minus argmax over parts p in C_k of  mean over prompts of m(C_k minus p)

m is a metric of the logits (higher is better), or minus the KL divergence from the whole model's next-token
distribution. What is removed takes its replacement (a mean over reference prompts, its output on the corrupt prompt,
zero). A part is a head or an MLP, everywhere or at one named position of the prompts. The circuit is the last C_k that
reaches the target. Exact: every candidate of every round is evaluated on every prompt, n (n + 1) / 2 evaluations for n
parts, each of which runs only what its removal changes (`workbench.patching.engine.remains`).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from scipy import stats
from torch import Tensor

from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.errors import InputError
from workbench.models import hooks
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import Replacement, described, kind_of
from workbench.patching.engine.remains import Ablatable, HookedRemains, Place, Remains, StandIns
from workbench.patching.execution import Execution
from workbench.patching.progress import identity, progress_bar
from workbench.tasks.base import PromptPairs, refuse_overlap
from workbench.values.metrics import METRICS, kl_divergence, metric_named
from workbench.values.refs import Head, Mlp, Position
from workbench.values.scores import Scores

BATCH = 256
"""Default number of prompts that are held at once."""
ROLE = "elimination"
KL = "kl_divergence"
"""The criterion that asks for the whole model's own distribution."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A head or an MLP at a named position of the prompts, written `L5H3` or `L5H3 at last`."""

    part: Head | Mlp
    position: Position = "all"

    def __str__(self) -> str:
        return str(self.part) if self.position == "all" else f"{self.part} at {self.position}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """What `str` wrote."""
        part, _, position = text.partition(" at ")
        return cls(Mlp(int(part[1:])) if part.startswith("M") else Head.parse(part), position or "all")


@validated(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EliminationConfig:
    """What is removed, and how far."""

    criterion: Literal["log_probability", "probability", "logit_difference", "accuracy", "kl_divergence"] = (
        "log_probability"
    )
    """What a removal should cost least of; with `kl_divergence`, the divergence from the whole model it should add."""
    target: Annotated[float, Field(gt=0)] = 0.9
    """How much of the model the circuit must keep, as a share (with `until: kl_divergence`, nats at most)."""
    until: Literal["accuracy", "criterion", "kl_divergence"] = "accuracy"
    """Share of what: of the whole model's accuracy; of the way from nothing left to the whole model in the criterion
    (the logit difference recovered, say); or the KL divergence from the whole model."""
    positions: tuple[Position, ...] = ()
    """Named positions, apart from each other, at which parts are removed one by one; what they leave is one position
    more. Empty: parts are removed everywhere."""
    mlps: bool = False
    """Remove MLPs too."""
    to_the_end: bool = False
    """Go on below the target until nothing is left: the whole ranking, with its curve."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Elimination:
    """A whole elimination: in which order parts went, what was left after each, and the circuit at the target."""

    order: tuple[Site, ...]
    """The removed parts, first to last."""
    criterion: Scores
    """[removed example]: the criterion with nothing removed, then after each removal."""
    accuracy: Scores
    """[removed example]: whether each prompt is answered right, likewise."""
    divergence: Scores
    """[removed example]: KL divergence from the whole model, in nats, likewise."""
    empty: Mapping[str, float]
    """Mean criterion, accuracy and KL with every part removed."""
    rivals: tuple[int, ...]
    """At each removal: how many other parts cost so nearly the same that these prompts can't tell (the 95 % interval of
    the paired difference holds 0)."""
    sites: tuple[Site, ...]
    """All parts, removed or not."""
    shape: tuple[int, int]
    config: EliminationConfig
    method: str

    def share(self, removed: int) -> float:
        """What the target is measured by, after some removals (`until` of the configuration)."""
        match self.config.until:
            case "kl_divergence":
                return float(self.divergence.values[removed].mean())
            case "accuracy":
                whole = float(self.accuracy.values[0].mean())
                return float(self.accuracy.values[removed].mean()) / whole if whole else 0.0
            case "criterion":
                whole, empty = float(self.criterion.values[0].mean()), self.empty["criterion"]
                return (float(self.criterion.values[removed].mean()) - empty) / (whole - empty)

    def reaches(self, removed: int) -> bool:
        """Whether what is left after some removals keeps the target."""
        share = self.share(removed)
        return share <= self.config.target if self.config.until == "kl_divergence" else share >= self.config.target

    @property
    def removals(self) -> int:
        """How many removals the circuit has behind it: the most after which the target is still reached."""
        return max(count for count in range(len(self.order) + 1) if self.reaches(count) or count == 0)

    @property
    def ranking(self) -> list[Site]:
        """All parts, the most needed first: those still there (in the order of the layers), then the last removed."""
        gone = set(self.order)
        return [*(site for site in self.sites if site not in gone), *reversed(self.order)]

    def left(self, removals: int) -> tuple[Site, ...]:
        """The parts that are there after some removals, in the order of the layers."""
        gone = set(self.order[:removals])
        return tuple(site for site in self.sites if site not in gone)

    def circuit_after(self, removals: int) -> Circuit:
        """The heads that are there after some removals, each at its positions (MLPs are not part of a `Circuit`)."""
        heads = [site for site in self.left(removals) if isinstance(site.part, Head)]
        members = (Member(site.part, ROLE, site.position) for site in heads if isinstance(site.part, Head))
        return Circuit.of(members, shape=self.shape, method=self.method)

    @property
    def circuit(self) -> Circuit:
        """The circuit at the target."""
        return self.circuit_after(self.removals)

    def summary(self) -> str:
        """One line: how large the circuit is and what it keeps."""
        left, accuracy = self.left(self.removals), self.accuracy.values.mean(-1)
        circuit = self.circuit
        return (
            f"{len(left)} of {len(self.sites)} parts ({len(circuit.heads)} of {self.shape[0] * self.shape[1]} heads) "
            f"keep accuracy {accuracy[self.removals]:.3f} of {accuracy[0]:.3f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of all but the values per example."""
        return {
            "order": [str(site) for site in self.order],
            "sites": [str(site) for site in self.sites],
            "criterion": self.criterion.values.mean(-1).tolist(),
            "accuracy": self.accuracy.values.mean(-1).tolist(),
            "divergence": self.divergence.values.mean(-1).tolist(),
            "empty": dict(self.empty),
            "rivals": list(self.rivals),
            "removals": self.removals,
            "method": self.method,
        }


def sites_of(model: HookedModel, pairs: PromptPairs, config: EliminationConfig) -> tuple[Site, ...]:
    """All parts that may be removed. Errors: `InputError` for positions that share a token, or that there are not."""
    positions = positions_of(pairs, config.positions)
    parts: list[Head | Mlp] = list(model.heads)
    if config.mlps:
        parts += [Mlp(layer) for layer in range(model.n_layers)]
    parts.sort(key=lambda part: (part.layer, isinstance(part, Mlp), str(part)))
    return tuple(Site(part, position) for part in parts for position in positions)


def positions_of(pairs: PromptPairs, names: Sequence[Position]) -> tuple[Position, ...]:
    """The named positions and what they leave of the prompts; `all` where none is named."""
    for one, other in itertools.combinations(names, 2):
        if bool((pairs.position(one) & pairs.position(other)).any()):
            raise InputError(f"the positions {one} and {other} share tokens; name positions that lie apart.")
    if not names:
        return ("all",)
    rest = f"not {'+'.join(names)}"
    return (*names, rest) if bool(pairs.position(rest).any()) else tuple(names)


def eliminate(
    model: HookedModel,
    pairs: PromptPairs,
    replacement: Replacement,
    config: EliminationConfig | None = None,
    *,
    execution: Execution | None = None,
) -> Elimination:
    """Exact backward elimination on these prompts.

    `execution.file`: a JSON file that holds the removals so far; an interrupted elimination resumes from it to the same
    bits. Errors: `InputError` in training mode, for prompts among the replacement's reference prompts, where nothing
    is lost when everything is removed, and for a file of another elimination.
    """
    config, execution = config or EliminationConfig(), execution or Execution()
    model.require_eval()
    sites = sites_of(model, pairs, config)
    work = _Work(model, pairs, replacement, config, execution)
    record = _Record(execution.path, lambda: identity(model, [pairs], described(replacement), config, "elimination 1"))
    work.remove(record.order)
    empty = work.empty(sites)
    rows = record.rows or [work.present()]
    rivals = list(record.rivals)
    order = list(record.order)
    left = [site for site in sites if site not in set(order)]
    total = len(left) * (len(left) + 1) // 2
    method = f"elimination by {config.criterion}, {kind_of(replacement)} ablation"

    def elimination() -> Elimination:
        return _elimination(order, rows, rivals, sites=sites, empty=empty, model=model, config=config, method=method)

    with progress_bar(total=total, desc=f"eliminating from {model.name}", unit="run") as bar:
        while left and (config.to_the_end or elimination().reaches(len(order))):
            values = work.without_each(left)
            best = int(values.mean(1).argmax())
            rivals.append(_rivals(values, best))
            order.append(left.pop(best))
            work.remove(order[-1:])
            rows.append(work.present())
            record.write(order, rows, rivals)
            bar.update(len(left) + 1)
    return elimination()


def _elimination(
    order: Sequence[Site],
    rows: Sequence[Tensor],
    rivals: Sequence[int],
    *,
    sites: tuple[Site, ...],
    empty: Mapping[str, float],
    model: HookedModel,
    config: EliminationConfig,
    method: str,
) -> Elimination:
    values = torch.stack(list(rows), 1)
    labels = {"removed": ("nothing", *map(str, order))}
    units = (config.criterion.replace("_", " "), "accuracy", "KL divergence from the whole model, nats")
    curves = [
        Scores(values=each, axes=("removed", "example"), labels=labels, unit=unit)
        for each, unit in zip(values, units, strict=True)
    ]
    return Elimination(
        order=tuple(order),
        criterion=curves[0],
        accuracy=curves[1],
        divergence=curves[2],
        empty=empty,
        rivals=tuple(rivals),
        sites=sites,
        shape=(model.n_layers, model.n_heads),
        config=config,
        method=method,
    )


def _rivals(values: Float[Tensor, "candidate example"], best: int) -> int:
    """How many candidates the prompts can't tell from the best one."""
    others = torch.cat([values[:best], values[best + 1 :]])
    difference = values[best] - others
    count = difference.shape[1]
    if count < 2 or not len(others):
        return len(others)
    width = float(stats.t.ppf(0.975, count - 1)) * difference.std(1) / count**0.5
    return int((difference.mean(1) <= width).sum())


class _Work:
    """The batches of prompts with what is left of the model on each."""

    def __init__(
        self,
        model: HookedModel,
        pairs: PromptPairs,
        replacement: Replacement,
        config: EliminationConfig,
        execution: Execution,
    ) -> None:
        if hasattr(replacement, "prompts"):
            refuse_overlap(replacement.prompts, pairs)  # type: ignore[union-attr]
        self.config, self.parts, self.whole = config, list(pairs.batches(execution.batch_of(BATCH))), list[Tensor]()
        self.metric = None if config.criterion == KL else metric_named(config.criterion)
        self.stand_ins = [stand_ins(model, part, replacement, mlps=config.mlps) for part in self.parts]
        self._open: Callable[[int], Ablatable] = lambda number: _ablatable(
            model, self.parts[number], self.stand_ins[number], execution
        )
        self.models = [self._open(number) for number in range(len(self.parts))]
        self.whole = [each.logits for each in self.models]

    def places(self, number: int, sites: Sequence[Site]) -> list[Place]:
        """The sites on one batch of prompts."""
        return [Place(part=site.part, where=self.parts[number].position(site.position)) for site in sites]

    def remove(self, sites: Sequence[Site]) -> None:
        """Take sites away for good."""
        for number, each in enumerate(self.models):
            each.remove(*self.places(number, sites))

    def empty(self, sites: Sequence[Site]) -> dict[str, float]:
        """What is measured with everything removed. Errors: `InputError` where that loses nothing."""
        rows = []
        for number in range(len(self.parts)):
            each = self._open(number)
            each.remove(*self.places(number, sites))
            rows.append(self._measured(number, each.logits))
        means = torch.cat(rows, 1).mean(1).tolist()
        return dict(zip(("criterion", "accuracy", "divergence"), means, strict=True))

    def present(self) -> Float[Tensor, "measure example"]:
        """Criterion, accuracy and KL of what is left, for each prompt."""
        return torch.cat([self._measured(number, each.logits) for number, each in enumerate(self.models)], 1)

    def _measured(self, number: int, logits: Tensor) -> Tensor:
        part = self.parts[number]
        return torch.stack([
            self.criterion(number, logits),
            METRICS["accuracy"](logits, part.answers, part.distractors),
            kl_divergence(logits, self.whole[number]),
        ]).double().cpu()  # fmt: skip

    def criterion(self, number: int, logits: Tensor) -> Float[Tensor, " batch"]:
        """What a removal should cost least of; higher is better."""
        part = self.parts[number]
        if self.metric is None:
            return -kl_divergence(logits, self.whole[number])
        return self.metric(logits, part.answers, part.distractors)

    def without_each(self, sites: Sequence[Site]) -> Float[Tensor, "candidate example"]:
        """The criterion of what is left without each of some sites."""
        columns = []
        for number, each in enumerate(self.models):
            values = torch.zeros(len(sites), len(self.parts[number]), dtype=torch.float64)
            for candidate, logits in each.without_each(self.places(number, sites)):
                values[candidate] = self.criterion(number, logits).double().cpu()
            columns.append(values)
        return torch.cat(columns, 1)


def _ablatable(model: HookedModel, pairs: PromptPairs, values: StandIns, execution: Execution) -> Ablatable:
    replay = execution.replay(model, pairs)
    if replay is None:
        return HookedRemains(model, pairs, values)
    return Remains(replay, values, memory=execution.memory)


@torch.no_grad()
def stand_ins(model: HookedModel, pairs: PromptPairs, replacement: Replacement, *, mlps: bool = False) -> StandIns:
    """What removed heads (and MLPs) write on these prompts. Errors: `InputError` for MLPs and resampled outputs."""
    shape = (1, pairs.clean.shape[1], model.n_heads, model.d_head)
    z = {}
    for layer in range(model.n_layers):
        value = torch.zeros(shape) if isinstance(replacement, str) else replacement.at(layer, pairs)
        value = value if value.ndim == 4 else value[None]
        z[layer] = value.expand(len(value), *shape[1:]).to(pairs.clean.device)
    return StandIns(z=z, mlp=dict(_mlp_stand_ins(model, pairs, replacement)) if mlps else {})


def _mlp_stand_ins(model: HookedModel, pairs: PromptPairs, replacement: Replacement) -> Iterator[tuple[int, Tensor]]:
    names = [hooks.mlp_output(layer) for layer in range(model.n_layers)]
    kind = kind_of(replacement)
    if kind == "resampled":
        raise InputError("MLPs have no resampled outputs here; eliminate heads alone, or by mean or counterfactual.")
    if kind == "counterfactual":
        values = model.early_activations(pairs.corrupt, pairs.mask, names)
        yield from ((layer, values[name]) for layer, name in enumerate(names))
        return
    reference = getattr(replacement, "prompts", None)
    if reference is None:
        width = model.output_weights(0).shape[-1]
        yield from ((layer, torch.zeros(1, pairs.clean.shape[1], width)) for layer in range(model.n_layers))
        return
    values = model.early_activations(reference.clean, reference.mask, names)
    mask, per_position = reference.mask[..., None], getattr(replacement, "per_position", False)
    for layer, name in enumerate(names):
        axes = (0,) if per_position else (0, 1)
        mean = (values[name] * mask).sum(axes, keepdim=True) / mask.sum(axes, keepdim=True).clamp(min=1)
        yield layer, mean.expand(1, pairs.clean.shape[1], mean.shape[-1])


class _Record:
    """The removals so far, in a file beside nothing else."""

    def __init__(self, file: Path | None, identify: Callable[[], str]) -> None:
        self.file, self.order, self.rows, self.rivals = file, list[Site](), list[Tensor](), list[int]()
        if file is None:
            return
        self.identity = identify()
        if not file.exists():
            return
        known = storage.read_json(file)
        if not isinstance(known, dict) or known.get("identity") != self.identity:
            raise InputError(
                f"{file} holds an elimination of another model, other prompts or settings; delete it, or keep this one "
                "elsewhere."
            )
        self.order = [Site.parse(text) for text in known["order"]]
        self.rows = [torch.tensor(row, dtype=torch.float64) for row in known["rows"]]
        self.rivals = list(known["rivals"])

    def write(self, order: Sequence[Site], rows: Sequence[Tensor], rivals: Sequence[int]) -> None:
        """Keep what is known now."""
        if self.file is not None:
            plain = {"order": [str(site) for site in order], "rows": [row.tolist() for row in rows]}
            storage.write_json(self.file, {"identity": self.identity, **plain, "rivals": list(rivals)})
