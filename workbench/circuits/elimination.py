"""Backward elimination: remove, each time, the part whose removal from *what is left* costs least, until too little is
left.

Heads that stand in for each other hide each other from single ablations: removing one costs nothing while the other is
there. Elimination removes the first for nothing and then sees what the second is worth.

    C_0 = everything;   C_{k+1} = C_k minus argmax over parts p in C_k of  mean over prompts of m(C_k minus p)

m is a metric of the logits (higher is better), or minus the KL divergence from the whole model's next-token
distribution. What is removed takes its replacement (a mean over reference prompts, its output on the corrupt prompt,
zero). A part is a head or an MLP, everywhere or at one named position of the prompts. The circuit is the last C_k that
reaches the target. Exact: every candidate of every round is evaluated on every prompt, n (n + 1) / 2 evaluations for n
parts, each of which runs only what its removal changes (`workbench.patching.engine.remains`). Where that costs too
much, `exact_from` removes parts in rounds by attribution (`workbench.circuits.gates`) as long as more than so many are
left, and goes on exactly from there.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
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
from workbench.circuits.remaining import KL, Remaining
from workbench.circuits.search_curve import Of
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.patching.engine.remains import Part
from workbench.patching.execution import Execution
from workbench.patching.progress import identity, progress_bar
from workbench.patching.replacement import Replacement, replacement_named
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import Metric, metric_named
from workbench.values.refs import Head, Mlp, Position
from workbench.values.scores import Scores

ROLE = "elimination"


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


@validated(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class EliminationConfig:
    """What is removed, and how far."""

    criterion: str | Metric = "log_probability"
    """What a removal should cost least of: a metric, or `kl_divergence`, the divergence from the whole model that it
    should add least to."""
    target: Annotated[float, Field(gt=0)] = 0.9
    """How much of the model the circuit must keep, as a share (with `until: kl_divergence`, nats at most)."""
    until: Of = "accuracy"
    """Share of what: of the whole model's accuracy; of the way from nothing left to the whole model in the criterion
    (`metric`: the logit difference recovered, say); or the KL divergence from the whole model."""
    positions: tuple[Position, ...] = ()
    """Named positions, apart from each other, at which parts are removed one by one; what they leave is one position
    more. Empty: parts are removed everywhere."""
    mlps: bool = False
    """Remove MLPs too."""
    to_the_end: bool = False
    """Go on below the target until nothing is left: the whole ranking, with its curve."""
    exact_from: Annotated[int, Field(ge=1)] | None = None
    """Exact from this many parts on; above, parts go in rounds by attribution. None: exact throughout."""
    round_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of what is left that one round removes."""
    round_steps: Annotated[int, Field(ge=1)] = 3
    """Steps of a round's integrated gradient."""
    prompts: Annotated[int, Field(ge=1)] | None = None
    """What goes is decided on the first so many prompts, whether the target is kept on all. None: on all."""

    @property
    def criterion_name(self) -> str:
        """The criterion in a word."""
        return KL if self.criterion == KL else metric_named(self.criterion).name

    @property
    def identity(self) -> dict[str, object]:
        """What of it decides the numbers, for the identity of a file."""
        names = ("target", "until", "positions", "mlps", "to_the_end", "exact_from", "round_share", "round_steps")
        criterion = KL if self.criterion == KL else metric_named(self.criterion).fingerprint
        fewer = {} if self.prompts is None else {"prompts": self.prompts}
        return {"criterion": criterion, **{name: getattr(self, name) for name in names}, **fewer}


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
    rivals: tuple[int | None, ...]
    """At each removal: how many other parts cost so nearly the same that these prompts can't tell (the 95 % interval of
    the paired difference holds 0). None: removed in a round; only the last of a round has values, the others NaN."""
    sites: tuple[Site, ...]
    """All parts, removed or not."""
    shape: tuple[int, int]
    config: EliminationConfig
    method: str
    runs: float
    """Forwards over one prompt that it took (a candidate counts 1, a forward with its backward 3)."""

    def share(self, removed: int) -> float:
        """What the target is measured by, after some removals (`until` of the configuration)."""
        curves = {"criterion": self.criterion, "accuracy": self.accuracy, "divergence": self.divergence}
        return self._share(**{name: float(each.values[removed].mean()) for name, each in curves.items()})

    def _share(self, *, criterion: float, accuracy: float, divergence: float) -> float:
        match self.config.until:
            case "kl_divergence":
                return divergence
            case "accuracy":
                whole = float(self.accuracy.values[0].mean())
                return accuracy / whole if whole else 0.0
            case "metric":
                whole, empty = float(self.criterion.values[0].mean()), self.empty["criterion"]
                return (criterion - empty) / (whole - empty)

    def keeps(self, *, criterion: float, accuracy: float, divergence: float) -> bool:
        """Whether a circuit of these means keeps the target."""
        share = self._share(criterion=criterion, accuracy=accuracy, divergence=divergence)
        return share <= self.config.target if self.config.until == "kl_divergence" else share >= self.config.target

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
    replacement: Replacement | Literal["zero"],
    config: EliminationConfig | None = None,
    *,
    execution: Execution | None = None,
) -> Elimination:
    """Backward elimination on these prompts.

    `execution.file`: a JSON file that holds the removals so far; an interrupted elimination resumes from it to the same
    bits. Errors: `InputError` in training mode, for prompts among the replacement's reference prompts, where nothing is
    lost when everything is removed, and for a file of another elimination.
    """
    config, execution = config or EliminationConfig(), execution or Execution()
    model.require_eval()
    replacement = replacement_named(replacement)
    replacement.require_fitting(pairs)
    search = _Search(model, pairs, replacement, config, execution)
    if abs(search.empty["criterion"] - float(search.rows[0][0].mean())) < 1e-9:
        raise InputError("removing every part changes nothing: use prompts or a metric on which they matter.")
    total = len(search.left) * (len(search.left) + 1) // 2
    with progress_bar(total=total, desc=f"eliminating from {model.name}", unit="run", shown=execution.progress) as bar:
        while search.left and (config.to_the_end or search.result().reaches(len(search.order))):
            before = len(search.left)
            search.step()
            bar.update(sum(range(len(search.left) + 1, before + 1)))
    return search.result()


class _Search:
    """An elimination at work: what is left, what is known of it, and the file that holds both."""

    def __init__(
        self,
        model: HookedModel,
        pairs: PromptPairs,
        replacement: Replacement,
        config: EliminationConfig,
        execution: Execution,
    ) -> None:
        self.model, self.config = model, config
        self.sites = sites_of(model, pairs, config)
        self.method = f"elimination by {config.criterion_name}, {replacement.kind} ablation"
        self.remaining = Remaining(model, pairs, replacement, config.criterion, execution, mlps=config.mlps)
        self.deciding = self.remaining
        if config.prompts is not None and config.prompts < len(pairs):
            some = pairs.rows(slice(0, config.prompts))
            self.deciding = Remaining(model, some, replacement, config.criterion, execution, mlps=config.mlps)
        self.empty = self.remaining.empty(self._parts(self.sites))
        self.record = _Record(
            execution.path,
            lambda: identity(
                "elimination", model, [pairs], metrics=[], replacement=replacement.identity(), settings=config.identity
            ),
        )
        self.order, self.rows, self.rivals = self.record.order, self.record.rows, self.record.rivals
        self.rows = self.rows or [self.remaining.measured()]
        self._take_away(self.order)
        gone = set(self.order)
        self.left = [site for site in self.sites if site not in gone]
        self.in_rounds = config.exact_from is not None and not self.record.exact

    def _parts(self, sites: Sequence[Site]) -> list[tuple[Part, Position]]:
        return [(site.part, site.position) for site in sites]

    def _both(self) -> list[Remaining]:
        return [self.remaining] if self.deciding is self.remaining else [self.remaining, self.deciding]

    def _take_away(self, sites: Sequence[Site]) -> None:
        for each in self._both():
            each.remove(self._parts(sites))

    def step(self) -> None:
        """One removal, or one round of removals; the file knows of it."""
        self.in_rounds = self.in_rounds and len(self.left) > (self.config.exact_from or 0)
        if not (self.in_rounds and self._round()):
            self._exactly_one()
        self.record.write(self.order, self.rows, self.rivals, exact=not self.in_rounds)

    def _exactly_one(self) -> None:
        values = self.deciding.without_each(self._parts(self.left))
        best = int(values.mean(1).argmax())
        self.rivals.append(_rivals(values, best))
        self._remove([self.left[best]])

    def _remove(self, sites: Sequence[Site]) -> None:
        """Take sites away, the last of which has its values measured."""
        self._take_away(sites)
        unknown = torch.full_like(self.rows[0], torch.nan)
        self.rows += [*(unknown for _ in sites[1:]), self.remaining.measured()]
        self.order += sites
        self.left = [site for site in self.left if site not in set(sites)]

    def _round(self) -> bool:
        """Remove the parts of least attribution, as many as a round may; where that would miss the target, half as
        many. False where not even one may go by its attribution: the rest goes exactly."""
        scores = self.deciding.gate_scores(self._parts(self.left), steps=self.config.round_steps)
        most = len(self.left) - (self.config.exact_from or 0)
        count = min(most, max(1, int(self.config.round_share * len(self.left))))
        weakest = [self.left[at] for at in scores.mean(1).argsort(stable=True)[:count].tolist()]
        while count:
            self._remove(weakest[:count])
            self.rivals += [None] * count
            if self.config.to_the_end or self.result().reaches(len(self.order)):
                return True
            self._put_back(count)
            count //= 2
        self.in_rounds = False
        return False

    def _put_back(self, count: int) -> None:
        before = len(self.order) - count
        del self.order[before:], self.rows[before + 1 :], self.rivals[before:]
        for each in self._both():
            each.restart()
        self._take_away(self.order)
        gone = set(self.order)
        self.left = [site for site in self.sites if site not in gone]

    def result(self) -> Elimination:
        """The elimination so far."""
        values = torch.stack(list(self.rows), 1)
        labels = {"removed": ("nothing", *map(str, self.order))}
        units = (self.config.criterion_name.replace("_", " "), "accuracy", "KL divergence from the whole model, nats")
        curves = [
            Scores(values=each, axes=("removed", "example"), labels=labels, unit=unit)
            for each, unit in zip(values, units, strict=True)
        ]
        return Elimination(
            order=tuple(self.order),
            criterion=curves[0],
            accuracy=curves[1],
            divergence=curves[2],
            empty=self.empty,
            rivals=tuple(self.rivals),
            sites=self.sites,
            shape=(self.model.n_layers, self.model.n_heads),
            config=self.config,
            method=self.method,
            runs=sum(each.runs for each in self._both()),
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


class _Record:
    """The removals so far, in a file."""

    def __init__(self, file: Path | None, identify: Callable[[], str]) -> None:
        self.file, self.order, self.rows = file, list[Site](), list[Tensor]()
        self.rivals, self.exact = list[int | None](), False
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
        rows = [[[torch.nan if x is None else x for x in line] for line in row] for row in known["rows"]]
        self.rows = [torch.tensor(row, dtype=torch.float64) for row in rows]
        self.rivals, self.exact = list(known["rivals"]), bool(known["exact"])

    def write(
        self, order: Sequence[Site], rows: Sequence[Tensor], rivals: Sequence[int | None], *, exact: bool
    ) -> None:
        """Keep what is known now; NaN, which JSON has not, becomes null."""
        if self.file is not None:
            plain = [[[None if x != x else x for x in line] for line in row.tolist()] for row in rows]
            known = {"identity": self.identity, "order": [str(site) for site in order], "rows": plain}
            storage.write_json(self.file, {**known, "rivals": list(rivals), "exact": exact})
