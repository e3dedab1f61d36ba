"""What a result shows of itself: the numbers that it holds, in text and in HTML, and never an error."""

import re
from typing import Any

import torch

from workbench.circuits.circuit import Circuit, Member, whole_model
from workbench.circuits.comparison import compare
from workbench.circuits.curves import FaithfulnessCurve
from workbench.circuits.discovery import Discovery
from workbench.circuits.evaluation import CircuitReport
from workbench.values.refs import Head
from workbench.values.scores import Scores

MEMBERS = [Member(Head(1, 2), "A", "last"), Member(Head(0, 1), "B", "first"), Member(Head(0, 0), "B", "first")]
CIRCUIT = Circuit.of(MEMBERS, shape=(2, 4), method="by <hand>")
VALUES = torch.tensor([[0.5, -2.0, 0.1, torch.nan], [0.0, 0.2, 3.0, 0.3]])
REPORT = CircuitReport(
    heads=3,
    total_heads=8,
    prompts=70,
    scope="positions",
    ablation="mean",
    full_accuracy=0.9,
    full_interval=(0.8, 0.95),
    circuit_accuracy=0.81,
    circuit_interval=(0.7, 0.9),
    random_circuit_accuracy=0.125,
    random_circuit_range=(0.1, 0.15),
    random_circuits=5,
    empty_accuracy=0.0625,
    faithfulness=0.9,
    logit_differences={"full": 5.0, "circuit": 4.0, "random": 0.25, "empty": 0.0},
    logit_difference_recovered=0.8,
)
CURVE = FaithfulnessCurve(
    ablation="mean",
    metric="logit difference",
    sizes=(0, 5, 10),
    total_heads=10,
    faithfulness=(0.0, 1.2, 1.0),
    random=((0.0, 0.25, 1.0), (0.0, 0.75, 1.0)),
    without=(1.0, 0.375, 0.0),
    random_without=(),
    full=1.0,
    empty=0.0,
)


def test_scores_show_shape_unit_and_their_strongest_entries() -> None:
    scores = Scores.of_heads(VALUES, unit="fall of x", baseline=1.5)
    lines = repr(scores).splitlines()
    assert lines[0] == "Scores (layer 2 x head 4): fall of x, baseline 1.5"
    assert [line.split() for line in lines[3:]] == [
        ["L1H2", "+3"],
        ["L0H1", "-2"],
        ["L0H0", "+0.5"],
        ["L1H3", "+0.3"],
        ["L1H1", "+0.2"],
    ]
    several = repr(Scores.of_heads(VALUES[..., None] + torch.tensor([-1.0, 1.0]), unit="fall of x"))
    assert "example 2" in several
    assert re.search(r"L1H2 +\+3 +± 1", several)
    edges = Scores(
        values=VALUES,
        axes=("sender", "receiver"),
        labels={"sender": ("embed", "L0H1"), "receiver": ("L1H0.q", "M1", "L1H1.v", "logits")},
        unit="x",
    )
    assert "L0H1 -> L1H1.v" in repr(edges)


def test_scores_without_any_entry_show_themselves_too() -> None:
    for values in (torch.full((2, 3), torch.nan), torch.zeros(0, 3), torch.zeros(2, 3, 0), torch.zeros(2, 3, 1)):
        assert "Scores (" in repr(Scores.of_heads(values, unit="x"))
    one = Scores(values=torch.tensor(2.5), axes=(), labels={}, unit="x")
    assert "+2.5" in repr(one)
    assert "+2.5" in repr(Scores(values=torch.tensor([2.5]), axes=("example",), labels={}, unit="x"))


def test_every_result_shows_its_numbers_in_text_and_html() -> None:
    scores = Scores.of_heads(VALUES, unit="fall of x")
    found = Discovery(circuit=CIRCUIT, scores={"A": scores}, seconds={"A": 2.5})
    shown: list[tuple[Any, list[str]]] = [
        (CIRCUIT, ["3 of 8 heads (38%)", "A", "last", "L1H2", "L0H0 L0H1", "by"]),
        (REPORT, ["faithfulness 0.900", "0.810", "[0.700, 0.900]", "5 random", "0.125", "4.000", "0.062"]),
        (CURVE, ["CPR 0.850", "1.200", "0.500", "0.375", "logit difference"]),
        (compare(CIRCUIT, CIRCUIT.without(["L1H2"])), ["0.67", "L1H2", "L0H0 L0H1"]),
        (found, ["2.5 s", "L1H2 +3"]),
        (scores, ["L1H2", "fall of x"]),
    ]
    for result, parts in shown:
        for part in parts:
            assert part in repr(result), (part, repr(result))
            assert part in result._repr_html_()
    assert "<hand>" not in CIRCUIT._repr_html_()
    assert "&lt;hand&gt;" in CIRCUIT._repr_html_()


def test_empty_circuits_and_undefined_faithfulness_show_themselves() -> None:
    assert "0 of 8 heads" in repr(Circuit.of([], shape=(2, 4), method="nothing"))
    assert "8 of 8 heads" in repr(whole_model((2, 4)))
    undefined = CircuitReport.from_json({**REPORT.to_json(), "faithfulness": None})
    assert "faithfulness undefined" in repr(undefined)
