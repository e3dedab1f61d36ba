"""Every method of discovery: on a model whose circuit is known, against slow loops, from a recipe, by its errors."""

import dataclasses
import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.patching.test_known_circuit import CIRCUIT, known, pairs, reference, unseen, write  # noqa: F401
from workbench.circuits.elimination import Site
from workbench.circuits.evaluation import circuit_logits
from workbench.circuits.exchange import exchange
from workbench.circuits.methods import registry
from workbench.circuits.methods.base import DiscoveryMethod, Inquiry
from workbench.circuits.methods.registry import OURS, method_named
from workbench.circuits.remaining import Remaining
from workbench.circuits.search import find_circuit
from workbench.circuits.search_curve import SearchCurve
from workbench.circuits.search_result import CircuitSearch
from workbench.cli import main
from workbench.errors import InputError
from workbench.experiment.discover import discover
from workbench.experiment.origins import stated
from workbench.experiment.recipe import read_recipe, to_plain
from workbench.experiment.run import Run
from workbench.experiment.runs import RunFolder
from workbench.patching.ablation import ablated_logits, reference_means
from workbench.patching.attribution import attribute_edges
from workbench.patching.execution import Execution
from workbench.tasks.entity_tracking import EntityTracking
from workbench.values.metrics import METRICS
from workbench.values.refs import Head

TO_KEEP: dict[str, Any] = {"target": 0.99}
SETTINGS: dict[str, dict[str, Any]] = {
    "path_patching": {"stages": EntityTracking.stages},
    **dict.fromkeys(("elimination", "elimination_by_gates", "greedy"), TO_KEEP),
    "learned_gates": {**TO_KEEP, "steps": 60, "batch": 6, "learning_rate": 0.2, "penalty": 1.0},  # or all gates close
}
GRADIENTS = ("eap", "eap_ig", "relp", "gim")
QUIET = Execution(progress=False)


@pytest.fixture(scope="module")
def found(known, pairs, reference) -> dict[str, CircuitSearch]:  # noqa: F811
    """What each method finds in the known model."""
    return {
        name: find_circuit(
            known,
            pairs,
            method=name,
            heads=len(CIRCUIT),
            reference=None if name == "path_patching" else reference,
            execution=QUIET,
            **SETTINGS.get(name, {}),
        )
        for name in OURS
    }


@pytest.mark.parametrize("name", OURS)
def test_the_circuit_that_is_known_is_found(found, known, unseen, reference, name):  # noqa: F811
    result = found[name]
    assert result.method == name
    assert result.notes
    assert set(result.circuit.heads) <= set(result.ranking)
    if name in GRADIENTS:  # hard attention has no gradient: they see the heads that write the answer, and no other
        assert set(result.circuit.heads) == {Head(4, 1), Head(5, 3)}
        return
    assert set(result.circuit.heads) == set(CIRCUIT)
    logits = circuit_logits(known, unseen, result.circuit, reference_means(known, reference))
    assert float(METRICS["accuracy"](logits, unseen.answers, unseen.distractors).mean()) == 1.0


@pytest.mark.parametrize("name", OURS)
def test_the_curve_is_what_a_loop_of_hooked_forwards_gives(found, known, pairs, reference, name):  # noqa: F811
    if name == "path_patching":
        pytest.skip("its curve puts the corrupt outputs in place, as path patching does")
    result, means = found[name], reference_means(known, reference)
    assert result.curve is not None
    for size in (0, 4, len(CIRCUIT), 24):
        if size not in result.curve.sizes:
            continue
        kept = dict.fromkeys(result.ranking[:size], ("all",))
        logits = ablated_logits(known, pairs, kept, means, complement=True)
        expected = float(METRICS["log_probability"](logits, pairs.answers, pairs.distractors).double().mean())
        value = result.curve.metric[result.curve.sizes.index(size)]
        assert value == pytest.approx(expected, abs=2e-4)
    assert result.curve.share(24) == 1.0
    assert abs(result.curve.metric[0] - result.curve.metric[-1]) > 1.0
    assert SearchCurve.from_json(json.loads(json.dumps(result.curve.to_json()))) == result.curve


def test_attribution_of_heads_is_the_sum_over_their_edges(found, known, pairs):  # noqa: F811
    edges = attribute_edges(known, pairs, metric="log_probability", steps=5, execution=QUIET)
    scores = found["eap_ig"].scores
    for head in (Head(0, 3), *CIRCUIT):
        row = edges.labels["sender"].index(str(head))
        assert float(scores.at(head).mean()) == pytest.approx(float(edges.values[row].nansum(0).mean()), abs=1e-5)


def test_greedy_takes_no_more_than_the_target_needs(found):
    curve, size = found["greedy"].curve, len(found["greedy"].circuit.heads)
    assert curve.reaches(size, 0.99)
    assert not any(curve.reaches(smaller, 0.99) for smaller in range(size))


def test_what_a_removal_costs_is_measured(found, known, pairs, reference):  # noqa: F811
    """The score of a circuit's head is the fall when it alone leaves the circuit."""
    result, means = found["elimination"], reference_means(known, reference)
    values = []
    for gone in ((), (result.circuit.heads[0],)):
        kept = {head: ("all",) for head in result.circuit.heads if head not in gone}
        logits = ablated_logits(known, pairs, kept, means, complement=True)
        values.append(float(METRICS["log_probability"](logits, pairs.answers, pairs.distractors).mean()))
    cost = float(result.scores.at(result.circuit.heads[0]).mean())
    assert cost == pytest.approx(values[0] - values[1], abs=2e-4)
    assert cost > 0.1


def test_an_interrupted_search_resumes_from_its_file(known, pairs, reference, tmp_path: Path, found):  # noqa: F811
    file = tmp_path / "search.safetensors"
    settings: dict[str, Any] = {"method": "elimination", "reference": reference, "target": 0.99}
    first = find_circuit(known, pairs, execution=Execution(progress=False, file=file), **settings)
    record = json.loads(file.with_suffix(".json").read_text())
    cut = {name: record[name][:5] for name in ("order", "rivals")}
    file.with_suffix(".json").write_text(json.dumps({**record, **cut, "rows": record["rows"][:6]}))
    again = find_circuit(known, pairs, execution=Execution(progress=False, file=file), **settings)
    assert again.to_json() == first.to_json() == found["elimination"].to_json()
    with pytest.raises(InputError, match="delete it"):
        find_circuit(known, pairs, execution=Execution(file=file), method="elimination", reference="zero")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("eliminaton", {}, "'elimination'"),
        ("elimination", {"targett": 0.5}, "no setting 'targett'.*'target'"),
        ("elimination", {"target": "most"}, "option 'target'"),
        ("elimination", {"target": -1.0}, "target: "),
        ("elimination", {"until": "accurate"}, "'accuracy'"),
        ("elimination", {"positions": ("lats",)}, "'last'"),
        ("eap_ig", {"steps": 0}, "steps: "),
        ("mean_ablation", {"steps": 3}, "no setting 'steps' with method 'mean_ablation'"),
        ("greedy", {"ranking": "greedy"}, "another method"),
        ("greedy", {"ranking": "eapig"}, "'eap_ig'"),
    ],
)
def test_a_slip_is_told_its_remedy(known, pairs, method, settings, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        find_circuit(known, pairs, method=method, **settings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"discovery.method": "eliminatoin"}, "discovery.*'elimination'"),
        ({"discovery.options.taget": 0.8}, "line.*discovery.options.*no option 'taget'.*'target'"),
        ({"discovery.options.target": "all"}, "the option 'target' of the method elimination"),
        ({"discovery.method": "eap", "discovery.options": {"steps": 3}}, "no option 'steps'"),
        ({"discovery.replacement": "means"}, "'mean'"),
    ],
)
def test_a_recipes_slip_is_told_with_its_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe("mind", overrides=overrides)


@pytest.fixture(scope="module")
def recipe(model_folder: Callable[..., Path]) -> dict[str, Any]:
    """A tiny search."""
    sizes = {"reference_scenes": 3, "discovery_scenes": 2, "train_scenes": 2, "test_scenes": 2}
    return {
        "teacher": str(model_folder("llama", layers=2)),
        "data": {"options": {"boxes": 3}, **sizes},
        "evaluation": {"random_circuits": 1, "curve": False},
        "conditions": ["base"],
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "elimination": {"positions": ["last"], "target": 0.5, "until": "metric"},
    "elimination_by_gates": {"exact_from": 3, "round_steps": 1, "mlps": True, "to_the_end": True},
    "eap_ig": {"steps": 2, "absolute": True},
    "learned_gates": {"steps": 3, "batch": 2},
    "greedy": {"ranking": "eap_ig", "ranking_options": {"steps": 1}, "until": "metric", "target": 0.5},
}


@pytest.mark.parametrize(
    ("name", "replacement"),
    [*((name, "mean") for name in OURS), *(("elimination", kind) for kind in ("zero", "counterfactual", "resampled"))],
)
def test_a_recipe_reaches_every_method(recipe, tmp_path: Path, monkeypatch, name, replacement):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "recipe.yaml"
    discovery = {"method": name, "options": OPTIONS.get(name, {}), "replacement": replacement, "heads": 2}
    discovery["selection"] = "top"  # no head of a random model stands out
    file.write_text(yaml.safe_dump({**recipe, "discovery": discovery}))
    assert main(["discover", "--recipe", str(file), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    told = json.loads((tmp_path / "run" / "circuits" / "teacher-search.json").read_text())
    assert told["method"] == name
    assert len(told["ranking"]) == 8
    assert told["curve"]["sizes"][-1] in (8, 10, 16)
    circuit = json.loads((tmp_path / "run" / "circuits" / "teacher.json").read_text())
    if name == "elimination":
        assert {member["position"] for member in circuit["members"]} <= {"last", "not last"}
    (tmp_path / "run" / "circuits" / "teacher.json").unlink()
    again = Run(read_recipe(file), RunFolder(tmp_path / "run"))
    again.begin(resume=True)
    discover(again)
    assert json.loads((tmp_path / "run" / "circuits" / "teacher.json").read_text()) == circuit


@dataclasses.dataclass(frozen=True)
class FirstLayer:
    """A method of another package: the first heads of the first layer."""

    count: int = 2

    def find(self, inquiry: Inquiry) -> CircuitSearch:
        return method_named("mean_ablation").find(dataclasses.replace(inquiry, impacts=None))

    def acts_at(self, stages: Any) -> tuple[str, ...]:
        return ("all",)

    def runs(self, heads: int, layers: int) -> int:
        return self.count


def test_an_installed_package_adds_a_method(monkeypatch, known, pairs):  # noqa: F811
    points = [EntryPoint(name="first_layer", value=f"{__name__}:FirstLayer", group=registry.GROUP)]
    points.append(EntryPoint(name="nothing", value="builtins:object", group=registry.GROUP))
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    assert isinstance(method_named("first_layer", {"count": 3}), DiscoveryMethod)
    assert find_circuit(known, pairs, method="first_layer", count=1, execution=QUIET).circuit.heads
    with pytest.raises(InputError, match=r"no option 'cuont'.*'count'"):
        method_named("first_layer", {"cuont": 3})
    with pytest.raises(InputError, match="is no method: it needs find"):
        method_named("nothing")
    assert read_recipe("mind", overrides={"discovery": {"method": "first_layer"}}).discovery.method == "first_layer"


def test_settings_of_before_have_the_digest_of_before() -> None:
    plain = to_plain(read_recipe("demo").discovery)
    assert set(plain) - set(stated(plain, "discovery")) == {"options", "replacement", "resamples"}
    assert "options" in stated({**plain, "options": {"target": 0.9}}, "discovery")


def test_ours_are_methods_and_say_what_they_cost() -> None:
    for name in OURS:
        method = method_named(name)
        assert isinstance(method, DiscoveryMethod)
        assert method.runs(32, 4) > 0
        assert method.acts_at(())
    assert method_named("elimination", {"positions": ["last"], "mlps": True}).runs(32, 4) == 72 * 73 // 2
    assert torch.is_grad_enabled()


def test_growing_and_pruning_repairs_a_circuit(known, pairs, reference):  # noqa: F811
    """From a circuit that lacks a head of the known one and has one that does nothing: one exchange puts it right."""
    sites = [Site(head) for head in known.heads]
    remaining = Remaining(known, pairs, reference_means(known, reference), "log_probability", QUIET)
    missing, idle = Head(3, 1), Head(0, 3)
    assert missing in CIRCUIT
    assert idle not in CIRCUIT
    wrong = [site for site in sites if site.part in {*CIRCUIT, idle} - {missing}]
    grown = exchange(remaining, sites, wrong, lambda measured: float(measured[1].mean()) >= 0.99)
    assert {site.part for site in grown.left} == set(CIRCUIT)
    assert (grown.exchanges, grown.pruned) == (1, 0)
    right = [site for site in sites if site.part in CIRCUIT]
    larger = [site for site in sites if site.part in {*CIRCUIT, idle}]
    accurate = exchange(remaining, sites, larger, lambda measured: float(measured[1].mean()) >= 0.99)
    assert list(accurate.left) == right
    assert accurate.pruned == 1


def test_stability_and_exchange_are_in_the_result(known, pairs, reference, tmp_path: Path):  # noqa: F811
    settings: dict[str, Any] = {
        "method": "elimination_by_gates",
        "reference": reference,
        "target": 0.99,
        "exchange": True,
        "resamples": 2,
        "prompts": 4,
        "round_steps": 1,
    }
    result = find_circuit(known, pairs, execution=Execution(progress=False, file=tmp_path / "one.json"), **settings)
    assert set(result.circuit.heads) == set(CIRCUIT)
    assert result.stability == (1.0, 1.0)
    assert any(note.startswith("stability: over 2 resampled") for note in result.notes)
    assert any("grown and pruned" in note for note in result.notes)
    assert {file.name for file in tmp_path.glob("*.json")} == {
        "one.json",
        *(f"one-resample-{draw}-elimination_by_gates.json" for draw in range(2)),
    }
