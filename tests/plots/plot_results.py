"""Small results with known numbers, one figure of each kind drawn from them, and ways to look into a figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from plotly import graph_objects as go

from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.curves import FaithfulnessCurve
from workbench.distillation.loop import StepReport
from workbench.experiment.results import ConditionResult
from workbench.matching import HeadMap, Match
from workbench.matching.aligned_pairs import AlignedPair
from workbench.matching.pair_cka import PairCka
from workbench.plots.curves import faithfulness_figure
from workbench.plots.graph import circuit_graph
from workbench.plots.head_maps import matching, matching_change
from workbench.plots.importance import head_importance
from workbench.plots.lens import lens_curves, lens_figure
from workbench.plots.logit_attribution import attribution_figure
from workbench.plots.looks import looks_figure
from workbench.plots.losses import loss_curves
from workbench.plots.matrices import cka_change
from workbench.plots.operations import operations_figure
from workbench.plots.patterns import attention_maps, attention_text
from workbench.plots.seeds import loss_bands, seeds_chart
from workbench.plots.similarity import cka_matrix, impact_scatter
from workbench.plots.table import TITLES, results_chart
from workbench.plots.theme import LIGHT, Theme
from workbench.readouts.counts import AccuracyByCount
from workbench.readouts.logit_attribution import LogitAttribution
from workbench.readouts.logit_lens import LogitLens
from workbench.readouts.patterns import PLAIN, WEIGHTED, AttentionPatterns
from workbench.report.study import cell_chart, convergence_chart
from workbench.values.refs import Head
from workbench.values.scores import Scores

UNIT = "fall of log probability, path from last to the logits"


def scores_of(layers: int, heads: int, *, examples: int = 6, seed: int = 0) -> Scores:
    """Random effects; the last layer is not measured."""
    values = torch.randn(layers, heads, examples, generator=torch.Generator().manual_seed(seed))
    values[-1] = torch.nan
    return Scores.of_heads(values, unit=UNIT, baseline=-1.0)


def circuit_of(shape: tuple[int, int], roles: dict[str, str]) -> Circuit:
    """`{"L0H1": "A"}` -> a circuit; `A+B` is two roles."""
    return Circuit.of(
        (Member(Head.parse(head), role, "last") for head, both in roles.items() for role in both.split("+")),
        shape=shape,
        method="test",
    )


TEACHER = circuit_of((4, 4), {"L0H0": "C", "L1H3": "A", "L2H1": "A+B", "L2H2": "B"})
STUDENT = circuit_of((3, 2), {"L0H1": "C", "L1H0": "A", "L1H1": "B"})


def head_map() -> HeadMap:
    """Three student heads on two teacher heads, with a tie."""
    chosen = {"L0H1": ("L2H1", 0.25, 0.0), "L1H0": ("L1H3", 0.125, 0.5), "L1H1": ("L2H1", 0.0, 0.75)}
    rows = (
        Match(student=Head.parse(ours), teacher=Head.parse(theirs), distance=distance, margin=margin)
        for ours, (theirs, distance, margin) in chosen.items()
    )
    return HeadMap(matches=tuple(rows), rule="paper", one_to_one=False)


def cka_of(student: Head, teacher: Head, value: float) -> PairCka:
    """A pair's CKA; its floor is 0.1, at most 0.2."""
    pair = AlignedPair(student=student, teacher=teacher, student_positions=("last",), teacher_positions=("last",))
    return PairCka(pair=pair, cka=value, floor=0.1, floor_high=0.2, rows=64)


def matrix_of(pairs: Sequence[tuple[Head, Head]], value: float) -> Scores:
    """A CKA for every pair of these heads, 0.1 and 0.2 with prompts shuffled."""
    ours, theirs = (tuple(dict.fromkeys(str(pair[side]) for pair in pairs)) for side in (0, 1))
    values = torch.tensor([value, 0.1, 0.2]).expand(len(ours), len(theirs), 3)
    labels = {"student": ours, "teacher": theirs, "draw": ("paired", "shuffled 0", "shuffled 1")}
    return Scores(values=values, axes=("student", "teacher", "draw"), labels=labels, unit="debiased CKA")


def cell() -> dict[str, Any]:
    """A study's cell, as far as its figures need one."""
    points = [
        {"step": step, "mean": 0.5 + step / 100, "low": 0.45 + step / 100, "high": 0.55 + step / 100, "count": 2}
        for step in (10, 20, 30)
    ]
    single = [{**point, "mean": 0.3, "low": None, "high": None, "count": 1} for point in points]
    trained, plain = (
        {"mean": mean, "low": low, "high": high, "count": 2} for mean, low, high in ((0.7, 0.6, 0.8), (0.4, None, None))
    )
    conditions = {
        "base": {"curve": [], "full": plain, "circuit": plain},
        "circuit_ce": {"curve": points, "full": trained, "circuit": plain},
        "full_ce": {"curve": single, "full": plain, "circuit": trained},
    }
    return {"student": "sibling", "train_scenes": 10, "weight": 0.3, "conditions": conditions}


def log_of(task: list[float] | None, alignment: list[float] | None) -> list[StepReport]:
    """Step reports with these losses."""
    count = len(task or alignment or [])
    rows = zip(task or [None] * count, alignment or [None] * count, strict=True)
    return [
        StepReport(step=step, loss=1.0, task_loss=a, alignment_loss=b, ckas={}, gradient_norm=1.0, learning_rate=1e-3)
        for step, (a, b) in enumerate(rows)
    ]


def result_of(condition: str, *, seed: int = 0, full: float = 0.75, circuit: float = 0.5) -> ConditionResult:
    """A row with known intervals."""
    return ConditionResult(
        condition=condition,
        seed=seed,
        full_accuracy=full,
        full_interval=(full - 0.125, full + 0.0625),
        circuit_accuracy=circuit,
        circuit_interval=(circuit - 0.25, circuit + 0.125),
        random_circuit_accuracy=0.03125,
        faithfulness=circuit / full,
        mean_cka=None if condition == "teacher" else 0.625,
        cka_floor=None if condition == "teacher" else 0.0125,
        trained_parameters=1234567,
        trained_fraction=0.1254,
        steps=1500,
        mcnemar={"full_ce": 0.0004, "circuit_ce": 0.0312},
    )


def results() -> list[ConditionResult]:
    """Every condition, in an order that is not the table's."""
    return [result_of(condition, full=0.5 + 0.03 * place) for place, condition in enumerate(sorted(TITLES))]


def patterns(length: int = 9, heads: tuple[str, ...] = ("L0H1", "L2H2"), *, unit: str = PLAIN) -> AttentionPatterns:
    """Random causal attention whose rows sum to 1."""
    scores = torch.randn(len(heads), length, length, generator=torch.Generator().manual_seed(0))
    weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    tokens = tuple(f" w{place}" for place in range(length))
    return AttentionPatterns(tokens=tokens, heads=tuple(map(Head.parse, heads)), weights=weights, unit=unit)


def attribution() -> LogitAttribution:
    """Shares of 3 layers of 4 heads on 5 prompts; they sum to the total."""
    draw = torch.Generator().manual_seed(0)
    heads, mlps, rest = (torch.randn(*shape, 5, generator=draw) for shape in ((3, 4), (3,), (2,)))
    return LogitAttribution(
        heads=Scores.of_heads(heads, unit="share"),
        mlps=Scores(values=mlps, axes=("layer", "example"), labels={"layer": ("L0", "L1", "L2")}, unit="share"),
        rest=Scores(values=rest, axes=("part", "example"), labels={"part": ("embed", "final biases")}, unit="share"),
        total=heads.sum((0, 1)) + mlps.sum(0) + rest.sum(0),
    )


def lens(length: int = 20) -> LogitLens:
    """Three stages; the answer is the likeliest token at the last position of the last stage alone."""
    top = [[["other", "answer"] for _ in range(length)] for _ in range(3)]
    top[2][-1] = ["answer", "other"]
    likely = torch.tensor([0.6, 0.3]).expand(3, length, 2).clone()
    of_answer = torch.full((3, length), 0.3)
    of_answer[2, -1] = 0.6
    return LogitLens(
        tokens=tuple(f" w{place}" for place in range(length)),
        stages=("embed", "L0", "L1"),
        top=tuple(tuple(map(tuple, rows)) for rows in top),
        probabilities=likely,
        answer="answer",
        of_answer=of_answer,
    )


def edges_of(values: dict[tuple[str, str], float]) -> Scores:
    """Path effects of `(sender, receiver)`, NaN elsewhere, the same for two examples."""
    senders, receivers = (tuple(dict.fromkeys(pair[side] for pair in values)) for side in (0, 1))
    table = torch.full((len(senders), len(receivers), 2), torch.nan)
    for (sender, receiver), value in values.items():
        table[senders.index(sender), receivers.index(receiver)] = value
    return Scores(
        values=table,
        axes=("sender", "receiver", "example"),
        labels={"sender": senders, "receiver": receivers},
        unit="fall of logit difference",
    )


EDGES = {
    ("L0H0", "L1H2.q"): -0.5,
    ("L0H0", "L1H2.k"): 2.0,
    ("L0H0", "logits"): -1.0,
    ("L1H3", "L2H1.v"): -4.0,
    ("L2H1", "logits"): -3.0,
    ("L1H3", "logits"): 0.1,
}
CURVE = FaithfulnessCurve(
    ablation="mean",
    metric="logit difference",
    sizes=(0, 1, 30, 32),
    total_heads=32,
    faithfulness=(0.0, 0.2, 0.9, 1.0),
    without=(1.0, 0.6, 0.1, 0.0),
    random=((0.0, 0.0, 0.5, 1.0), (0.0, 0.1, 0.7, 1.0)),
    random_without=((1.0, 0.9, 0.2, 0.0), (1.0, 1.0, 0.4, 0.0)),
    full=3.0,
    empty=0.5,
)


def impacts_of(shape: tuple[int, int], seed: int) -> Scores:
    """Ablation impacts of every head, one a prompt."""
    values = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed))
    return Scores.of_heads(values, unit="fall of log probability when the head is ablated", baseline=-1.0)


def counted() -> AccuracyByCount:
    """3 of 4, then 1 of 4 prompts."""
    right = torch.tensor([True, True, True, False, True, False, False, False])
    return AccuracyByCount.of(right, torch.tensor([0, 0, 0, 0, 2, 2, 2, 2]))


def seeded_logs() -> dict[str, list[StepReport]]:
    """Two seeds of the method and one of cross-entropy, which has no alignment loss."""
    draw = np.random.default_rng(0)
    task, alignment = (np.linspace(2, 1, 40) + 0.1 * draw.random((3, 40)) for _ in range(2))
    logs = {f"circuit_ce_cka-{seed}": log_of(task[seed].tolist(), alignment[seed].tolist()) for seed in range(2)}
    return logs | {"circuit_ce-0": log_of(task[2].tolist(), None)}


def looks() -> Scores:
    """Three members at four positions on six prompts."""
    values = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1)) / 4
    labels = {
        "member": ("L0H1 (A) at last", "L1H0 (B) at last", "L2H2 (C) at label"),
        "position": ("last", "label", "object", "first token"),
    }
    return Scores(values=values, axes=("member", "position", "example"), labels=labels, unit="attention probability")


def figures(theme: Theme = LIGHT) -> dict[str, go.Figure]:
    """One of each."""
    circuits, pairs = {"teacher": TEACHER, "student": STUDENT}, head_map().pairs
    both = {"student_circuit": STUDENT, "teacher_circuit": TEACHER}
    stages = Scores(
        values=torch.rand(3, 6, generator=torch.Generator().manual_seed(0)),
        axes=("stage", "example"),
        labels={"stage": ("embed", "L0", "L1")},
        unit="probability, logit lens",
    )
    before, after = ([cka_of(*pair, value) for pair in pairs] for value in (0.3, 0.8))
    return {
        "heads": head_importance(
            {"teacher": scores_of(4, 4), "student": scores_of(3, 2)}, circuits=circuits, theme=theme
        ),
        "matching": matching(head_map(), theme=theme, **both),
        "matching change": matching_change(head_map(), before=before, after=after, theme=theme, **both),
        "losses": loss_curves(
            {"circuit_ce_cka": log_of(np.linspace(2, 1, 40).tolist(), np.linspace(4, 2, 40).tolist())}, theme=theme
        ),
        "loss bands": loss_bands(seeded_logs(), theme=theme),
        "results": results_chart(results(), chance=1 / 7, theme=theme),
        "seeds": seeds_chart(
            [result_of("full_ce", seed=seed, full=0.5 + 0.1 * seed) for seed in range(3)], chance=1 / 7, theme=theme
        ),
        "faithfulness": faithfulness_figure({"a": CURVE}, theme=theme),
        "attention maps": attention_maps(patterns(), theme=theme),
        "attention text": attention_text(patterns(70, unit=WEIGHTED), theme=theme),
        "circuit": circuit_graph(TEACHER, edges_of(EDGES), theme=theme),
        "attribution": attribution_figure(attribution(), theme=theme),
        "lens": lens_figure(lens(), theme=theme),
        "lens curves": lens_curves({"teacher": stages}, theme=theme),
        "CKA": cka_matrix(before, head_map=head_map(), theme=theme),
        "CKA change": cka_change(matrix_of(pairs, 0.3), matrix_of(pairs, 0.8), head_map=head_map(), theme=theme),
        "convergence": convergence_chart(cell(), theme=theme),
        "impacts": impact_scatter(
            head_map(),
            student=impacts_of((3, 2), 0),
            teacher=impacts_of((4, 4), 1),
            student_circuit=STUDENT,
            theme=theme,
        ),
        "looks": looks_figure(looks(), theme=theme),
        "study": cell_chart(cell(), theme=theme),
        "operations": operations_figure({"teacher": counted()}, chance=1 / 7, theme=theme),
    }


def traces(figure: go.Figure, **attributes: object) -> list[go.Scatter]:
    """The traces with these attributes."""
    return list(figure.select_traces(attributes))


def everything(figure: go.Figure) -> str:
    """All of a figure as JSON: its words and colours."""
    return figure.to_json() or ""
