"""Several models on the same prompts, in one table: accuracies with intervals, circuits, controls, paired tests."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pandas as pd
from jaxtyping import Bool
from torch import Tensor

from workbench.circuits.circuit import Circuit
from workbench.circuits.evaluation import correct, evaluate_with_outcomes
from workbench.circuits.search_result import CircuitSearch, circuit_of
from workbench.errors import InputError, nearest
from workbench.matching.match import Matching
from workbench.matching.pair_cka import pair_ckas
from workbench.models.hooked_model import HookedModel, Teacher
from workbench.patching.ablation import plain_logits
from workbench.patching.reference import Reference, reading, replacement_of, require_model, require_pairs
from workbench.tasks.base import PromptPairs
from workbench.values.scores import mcnemar, wilson_interval
from workbench.values.tables import accuracy_text, html_table, number, text_table

Outcomes = Bool[Tensor, " batch"]
KINDS = ("student", "teacher")
"""Keys of `circuits` that stand for every student, or every teacher, without a circuit of its own name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model on the prompts; what needs a circuit is None without one."""

    name: str
    full_accuracy: float
    full_interval: tuple[float, float]
    """95 % Wilson interval over prompts."""
    circuit_accuracy: float | None
    """Every other head ablated."""
    circuit_interval: tuple[float, float] | None
    random_circuit_accuracy: float | None
    """Control: as many heads from outside the circuit, mean over several draws."""
    faithfulness: float | None
    """Circuit accuracy over full accuracy."""
    mean_cka: float | None
    """Of the matched pairs, where a matching was given (None for the teacher)."""
    cka_floor: float | None
    """Control: the same with the prompts shuffled."""
    p: float | None
    """Two-sided p of McNemar's exact test against the comparison's `against`; None for that one itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """Rows of models, in the order in which they were given."""

    rows: tuple[ModelRow, ...]
    against: str
    """What the p values compare with."""
    prompts: int
    source: str
    """Where the prompts come from, and what stands in for an ablated head, in words."""

    def __getitem__(self, name: str) -> ModelRow:
        """The row of a model. Errors: `InputError` with the nearest name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(f"no model {name!r} was compared; {nearest(str(name), [row.name for row in self.rows])}")

    def to_frame(self) -> pd.DataFrame:
        """A row a model."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
        head = ("model", "full accuracy", "circuit accuracy", "random circuit", "faithful", "CKA", "floor")
        rows = [
            (
                row.name,
                accuracy_text(row.full_accuracy, row.full_interval),
                "-"
                if row.circuit_accuracy is None or row.circuit_interval is None
                else accuracy_text(row.circuit_accuracy, row.circuit_interval),
                number(row.random_circuit_accuracy),
                number(row.faithfulness, 2),
                number(row.mean_cka, 2),
                number(row.cka_floor, 2),
                number(row.p, 4),
            )
            for row in self.rows
        ]
        return (*head, f"p vs {self.against}"), rows, f"{self.prompts} prompts; {self.source}"

    def __repr__(self) -> str:
        head, rows, title = self._table()
        return text_table(head, rows, title=title)

    def _repr_html_(self) -> str:
        head, rows, title = self._table()
        return html_table(head, rows, title=title)


def compare(
    models: Mapping[str, HookedModel],
    pairs: PromptPairs,
    *,
    circuits: Mapping[str, Circuit | CircuitSearch] | None = None,
    against: str | None = None,
    matching: Matching | None = None,
    reference: Reference = None,
    random_circuits: int = 5,
    seed: int = 0,
) -> ModelComparison:
    """Models by name on the same prompts, best ones that nothing was found or trained on.

    `circuits`: by a model's name, or `student` and `teacher` for all of a kind; each is evaluated alone, beside random
    circuits of equal size. `against`: the model that McNemar's test sets every other one against (None: the first).
    `matching`: adds the CKA of its pairs with the one teacher among the models, and its shuffled floor. `reference`: as
    in `evaluate_circuit`. Errors: `InputError` for no models, and for a name or circuit that belongs to none.
    """
    if not isinstance(models, Mapping) or not models:
        raise InputError('there are no models to compare; give them by name: {"base": student, "teacher": teacher}.')
    for name, model in models.items():
        require_model(model, role=f"model {name!r}")
    require_pairs(pairs)
    base = next(iter(models)) if against is None else against
    if base not in models:
        raise InputError(f"no model {base!r} to compare against; {nearest(str(base), models)}")
    chosen = _circuits(models, circuits or {})
    teacher = None if matching is None else _one_teacher(models)
    outcomes: dict[str, Outcomes] = {}
    rows, words = [], ""
    for name, model in models.items():
        mine, circuit = reading(model, pairs), chosen.get(name)
        facts: dict[str, float | tuple[float, float] | None] = dict.fromkeys(_OF_CIRCUIT)
        if circuit is None:
            outcomes[name] = correct(plain_logits(model, mine), mine)
        else:
            replacement, words = replacement_of(model, mine, reference)
            report, right = evaluate_with_outcomes(
                model, mine, circuit, replacement, random_circuits=random_circuits, seed=seed
            )
            outcomes[name] = right["full"]
            facts = {field: getattr(report, field) for field in _OF_CIRCUIT}
        rows.append((name, facts, _ckas(model, teacher, matching, pairs)))
    source = str(pairs.origin or "pairs") + (f"; ablated heads: {words}" if words else "")
    return ModelComparison(
        rows=tuple(_row(name, facts, ckas, outcomes, base) for name, facts, ckas in rows),
        against=base,
        prompts=len(pairs),
        source=source,
    )


_OF_CIRCUIT = ("circuit_accuracy", "circuit_interval", "random_circuit_accuracy", "faithfulness")


def _row(
    name: str,
    facts: Mapping[str, float | tuple[float, float] | None],
    ckas: tuple[float | None, float | None],
    outcomes: Mapping[str, Outcomes],
    base: str,
) -> ModelRow:
    right = outcomes[name]
    values: dict[str, object] = dict(facts)
    return ModelRow(
        name=name,
        full_accuracy=float(right.float().mean()),
        full_interval=wilson_interval(int(right.sum()), len(right)),
        mean_cka=ckas[0],
        cka_floor=ckas[1],
        p=None if name == base else mcnemar(right.cpu(), outcomes[base].cpu())[2],
        **values,  # type: ignore[arg-type]
    )


def _circuits(models: Mapping[str, HookedModel], circuits: Mapping[str, Circuit | CircuitSearch]) -> dict[str, Circuit]:
    """The circuit of each model that has one."""
    if not isinstance(circuits, Mapping):
        raise InputError('give circuits by name: circuits={"student": ours, "teacher": theirs}.')
    for name in circuits:
        if name not in models and name not in KINDS:
            raise InputError(
                f"there is a circuit for {name!r} but no such model; {nearest(str(name), [*models, *KINDS])}"
            )
    chosen = {}
    for name, model in models.items():
        kind = "teacher" if isinstance(model, Teacher) else "student"
        given = circuits.get(name, circuits.get(kind))
        if given is not None:
            chosen[name] = circuit_of(given, model)
    return chosen


def _one_teacher(models: Mapping[str, HookedModel]) -> Teacher:
    teachers = [model for model in models.values() if isinstance(model, Teacher)]
    if len(teachers) != 1:
        raise InputError(
            f"with `matching` the models need exactly one Teacher, whose heads the students' are compared with; there "
            f"are {len(teachers)}."
        )
    return teachers[0]


def _ckas(
    model: HookedModel, teacher: Teacher | None, matching: Matching | None, pairs: PromptPairs
) -> tuple[float | None, float | None]:
    if teacher is None or matching is None or model is teacher:
        return None, None
    ckas = pair_ckas(model, teacher, pairs, matching.pairs)
    return sum(each.cka for each in ckas) / len(ckas), sum(each.floor for each in ckas) / len(ckas)
