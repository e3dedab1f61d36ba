"""From a model and pairs to a circuit in one call, and how good that circuit is in another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from typing_extensions import TypedDict, Unpack

from workbench.circuits.circuit import Circuit
from workbench.circuits.discovery import DiscoveryConfig, backward_search, stacked, top_by_ablation
from workbench.circuits.evaluation import CircuitReport, EvaluationScope, evaluate_with_outcomes
from workbench.errors import InputError, nearest
from workbench.models.hooked_model import HookedModel
from workbench.patching.execution import Execution
from workbench.patching.path import Effect
from workbench.patching.reference import Reference, reading, replacement_of, require_model, require_pairs
from workbench.patching.sweeps import ablate
from workbench.tasks.base import PromptPairs, Stage
from workbench.values.metrics import Metric, metric_named
from workbench.values.scores import Scores
from workbench.values.settings import configured
from workbench.values.tables import html_table, number, text_table

Method = Literal["path_patching", "mean_ablation"]
METHODS = ("path_patching", "mean_ablation")
DIRECT = (Stage(name="A", title="direct", position="last"),)
"""The search where no stages are known: heads that write the answer to the logits themselves."""
PLAIN = Execution()


class SearchSettings(TypedDict, total=False):
    """What of a search can be set besides its method, size and metric; see `DiscoveryConfig`."""

    stages: Sequence[Stage]
    """Of path patching, in place of those that the pairs' task declares."""
    effect: Effect
    least_effect: float
    selection: Literal["interval", "top", "threshold", "elbow", "significance"]
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CircuitSearch:
    """A circuit, and the scores that it was chosen by."""

    circuit: Circuit
    scores: Scores
    """One value for each head (over the stages the strongest); positive = the head helps."""
    method: Method
    reference: str
    """What the scores compare the clean run with, in words: what stands in for an ablated head, or what is patched."""
    by_stage: Mapping[str, Scores] = field(default_factory=lambda: MappingProxyType({}))
    """Path patching: the scores of each stage, [layer head example]."""

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
        means = self.scores.mean()
        score = {head: float(means[head.layer, head.index]) for head in self.circuit.heads}
        rows = [
            (str(head), self.circuit.role_of(head), ", ".join(self.circuit.scope[head]), number(score[head]))
            for head in sorted(score, key=lambda head: (-score[head], head))
        ]
        layers, heads = self.circuit.shape
        title = f"{len(score)} of {layers * heads} heads by {self.circuit.method}; {self.reference}; {self.scores.unit}"
        return ("head", "role", "position", "score"), rows, title

    def __repr__(self) -> str:
        head, rows, title = self._table()
        return text_table(head, rows, title=title)

    def _repr_html_(self) -> str:
        head, rows, title = self._table()
        return html_table(head, rows, title=title)


def find_circuit(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    method: Method | None = None,
    heads: int = 6,
    metric: str | Metric = "log_probability",
    reference: Reference = None,
    execution: Execution = PLAIN,
    **settings: Unpack[SearchSettings],
) -> CircuitSearch:
    """The few attention heads that do a task in a model.

    `method=None` takes `path_patching` where the pairs come from a task that declares the stages of its circuit (at
    most `heads` in each stage, searched backward from the logits), else `mean_ablation` (the `heads` whose ablation
    costs most). A head counts if its effect is at least `least_effect` (0.02) of the gap between clean and corrupt
    metric (path patching) or of the whole model's metric (ablation), and its 95 % interval lies above 0: see
    `SearchSettings`. Ablated heads take their mean over the pairs' corrupt prompts, never over the evaluated clean
    ones, unless `reference` says otherwise; the result tells which. `execution.file`: where the scores are kept (path
    patching: beside it, with the stage's name). Errors: `InputError` for an unknown method, metric or setting, and for
    pairs on which clean and corrupt don't differ.
    """
    measured = metric_named(metric)
    require_model(model)
    require_pairs(pairs)
    if method is not None and method not in METHODS:
        raise InputError(f"no method {method!r} of finding a circuit; {nearest(str(method), METHODS)}")
    own = settings.pop("stages", None)
    stages = tuple(own) if own is not None else () if pairs.origin is None else pairs.origin.stages
    chosen = method or ("path_patching" if stages else "mean_ablation")
    given = {"method": chosen, "heads": heads, **settings}
    config = configured(DiscoveryConfig, given, call="find_circuit")
    if chosen == "path_patching":
        if reference is not None:
            raise InputError(
                "path patching takes a head's output from the pair's corrupt prompt, so it has no `reference`; leave "
                "it out, or set method='mean_ablation'."
            )
        return _by_paths(model, reading(model, pairs), stages or DIRECT, measured, config, execution)
    mine = reading(model, pairs)
    replacement, words = replacement_of(model, mine, reference)
    profile = ablate(model, mine, metric=measured, reference=replacement, execution=execution)
    circuit = top_by_ablation(profile, config)
    return CircuitSearch(circuit=circuit, scores=profile, method=chosen, reference=f"ablated: {words}")


def _by_paths(
    model: HookedModel,
    pairs: PromptPairs,
    stages: tuple[Stage, ...],
    metric: Metric,
    config: DiscoveryConfig,
    execution: Execution,
) -> CircuitSearch:
    files = _stage_files(execution.path, stages)
    search = backward_search(model, pairs, stages, config, metric=metric, engine=execution.engine, files=files)
    scores = stacked(search.scores)
    assert scores is not None  # the first stage is always scored
    return CircuitSearch(
        circuit=search.circuit,
        scores=scores,
        method="path_patching",
        reference=f"patched: the outputs on the {len(pairs)} pairs' corrupt prompts",
        by_stage=search.scores,
    )


def _stage_files(path: Path | None, stages: tuple[Stage, ...]) -> dict[str, Path] | None:
    return None if path is None else {stage.name: path.with_stem(f"{path.stem}-{stage.name}") for stage in stages}


def evaluate_circuit(
    model: HookedModel,
    circuit: Circuit | CircuitSearch,
    pairs: PromptPairs,
    *,
    reference: Reference = None,
    scope: EvaluationScope = "positions",
    random_circuits: int = 5,
    seed: int = 0,
) -> CircuitReport:
    """What a circuit does alone: accuracy with every other head ablated, beside the whole model and random circuits.

    Ablated heads take their mean over the pairs' corrupt prompts, never over the evaluated clean ones, unless
    `reference` says otherwise. `scope="positions"` keeps each circuit head where it acts, `everywhere` at all
    positions. Errors: `InputError` for a circuit of another model.
    """
    require_model(model)
    require_pairs(pairs)
    circuit = circuit_of(circuit)
    require_shape(model, circuit)
    if scope not in ("positions", "everywhere"):
        raise InputError(f"no scope {scope!r}; {nearest(str(scope), ('positions', 'everywhere'))}")
    if random_circuits < 1:
        raise InputError(f"a circuit is compared with at least one random circuit, not {random_circuits}.")
    mine = reading(model, pairs)
    replacement, _ = replacement_of(model, mine, reference)
    return evaluate_with_outcomes(
        model, mine, circuit, replacement, scope=scope, random_circuits=random_circuits, seed=seed
    )[0]


def circuit_of(circuit: Circuit | CircuitSearch) -> Circuit:
    """The circuit itself, also of a search. Errors: `InputError` for anything else."""
    if isinstance(circuit, CircuitSearch):
        return circuit.circuit
    if isinstance(circuit, Circuit):
        return circuit
    raise InputError(f"{circuit!r} is no circuit; give what find_circuit returns, or build one with `Circuit.of`.")


def require_shape(model: HookedModel, circuit: Circuit) -> None:
    """Refuse a circuit of a model of another shape."""
    if circuit.shape != (model.n_layers, model.n_heads):
        raise InputError(
            f"the circuit is of a model of {circuit.shape[0]} layers x {circuit.shape[1]} heads, {model.name} has "
            f"{model.n_layers} x {model.n_heads}; find the circuit in this model."
        )
