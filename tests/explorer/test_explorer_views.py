"""What the explorer's views beside the map say: small pictures, comparisons, groups, paths of an elimination, links,
estimates. Each number is that of the workbench's own function; each bad command changes nothing."""

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import entity_pairs

from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.evaluation import evaluate_circuit
from workbench.explorer import subject as subject_module
from workbench.explorer.api import session_of
from workbench.explorer.estimate import estimated
from workbench.explorer.library import MAP, sources
from workbench.explorer.session import Session
from workbench.matching.head_map import HeadMap, Match
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablate, ablated_logits, plain_logits
from workbench.patching.replacement import counterfactual_outputs
from workbench.readouts.patterns import attention_patterns
from workbench.tasks.base import PromptPairs
from workbench.values.metrics import metric_named
from workbench.values.refs import Head

SHAPE = (3, 4)
RANKING = [Head(layer, index) for index in range(4) for layer in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: a circuit with the ranking of its search, matches, and files that hold neither."""
    folder = tmp_path_factory.mktemp("run")
    members = [Member(head, "elimination", "all") for head in RANKING[:4]]
    circuit = Circuit.of(members, shape=SHAPE, method="elimination")
    (folder / "circuits").mkdir()
    storage.write_json(folder / "circuits" / "teacher.json", circuit.to_json())
    curve = {"sizes": [0, 4, 12], "accuracy": [0.1, 0.4, 0.5], "metric": [0.0, 1.0, 2.0]}
    curve |= {"divergence": [None] * 3, "unit": "logit difference", "ablation": "mean", "prompts": 5}
    search = {"method": "elimination", "ranking": [str(head) for head in RANKING], "curve": curve}
    storage.write_json(folder / "circuits" / "teacher-search.json", search)
    storage.write_json(folder / "circuits" / "student.json", replace(circuit, shape=(5, 4)).to_json())
    for name, text in (("list", "[1]"), ("deep", "[" * 5000), ("empty", ""), ("words", '{"members": "x"}')):
        (folder / f"{name}.json").write_text(text)
    pairs = [(Head(1, 2), Head(2, 1)), (Head(0, 3), Head(1, 0))]
    matches = tuple(Match(student=ours, teacher=theirs, distance=0.1, margin=0.1) for ours, theirs in pairs)
    head_map = HeadMap(matches=matches, rule="similarity", one_to_one=True)
    storage.write_json(folder / HeadMap.FILE, head_map.to_json())
    return folder


@pytest.fixture(scope="module")
def opened(model_folder: Callable[..., Path], run: Path) -> Iterator[Session]:
    """A teacher, its student and the same student after a training, on scenes of three boxes."""
    folders = [model_folder("llama"), *(model_folder("llama", seed=seed, layers=2) for seed in (1, 2))]
    models = [Teacher.load(folder) for folder in folders]
    made = session_of(
        *models[:2],
        after=models[2],
        task="entity_tracking",
        options={"boxes": 3},
        prompts=3,
        runs=[run],
        folder=run / "saved",
    )
    made.patience = 0.0
    yield made
    made.close()


@pytest.fixture
def session(opened: Session) -> Iterator[Session]:
    """As it was begun; at the end nothing runs on its models."""
    before, worker = opened.state, opened._worker
    worker.resume()
    yield opened
    worker.stop()
    while worker._running is not None:
        time.sleep(0.005)
    opened.state = before
    opened._past.clear()


def told(session: Session, name: str, **fields: Any) -> dict[str, Any]:
    """The view at once, without what takes time."""
    view = session.handle({"do": name, **fields})
    assert view["error"] is None, view["error"]
    return view


def test_small_pictures_of_a_layer(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    view = session.do("select", side="teacher", head="L2H1")
    small = view["thumbnails"]
    assert (small["layer"], small["follows"]) == (2, True)
    scores = view["maps"]["panels"]["teacher"]["values"][2]
    assert [each["head"] for each in small["heads"]] == [
        f"L2H{index}" for index in sorted(range(4), key=lambda index: -abs(scores[index]))
    ]
    pairs = session.subjects["teacher"].pair(session.state.pair)
    weights = attention_patterns(session.subjects["teacher"].model, pairs.clean[0], [Head(2, 3)]).weights[0]
    cells = small["pictures"]["cells"]
    shown = torch.tensor(list(base64.b64decode(small["pictures"]["heads"][3]))).view(cells, cells) / 255
    torch.testing.assert_close(shown * small["pictures"]["largest"][3], weights, atol=0.003, rtol=0)
    assert weights.max() > 0.3
    assert session.do("set", layer=0)["thumbnails"]["layer"] == 0
    monkeypatch.setattr(subject_module, "THUMBNAIL", 8)
    monkeypatch.setattr(session, "_worker", type(session._worker)())
    coarse = session.do("set", layer=2)["thumbnails"]["pictures"]
    assert coarse["cells"] == 8
    assert coarse["largest"] == pytest.approx(small["pictures"]["largest"])
    session._worker.close()
    assert session.handle({"do": "set", "layer": 3})["error"]


def test_a_second_head_and_a_second_pair(session: Session) -> None:
    session.do("select", side="teacher", head="L1H1")
    view = session.do("beside", side="student", head="L0H2")
    alone = session.do("select", side="student", head="L0H2")["head"]
    for name in ("attention", "impacts", "share", "score"):
        assert view["beside"][name] == alone[name], name
        assert view["head"][name] != alone[name], name
    session.do("select", side="teacher", head="L1H1")
    on_another = session.do("beside", side="teacher", head="L1H1", index=2)
    assert on_another["beside"]["picked"] == 2
    assert not on_another["beside"]["same_pair"]
    there = session.do("pick", index=2)["head"]
    for name in ("attention", "impacts", "share"):
        assert on_another["beside"][name] == there[name], name
    assert session.do("beside")["beside"] is None


def test_a_group_is_ablated_together(session: Session) -> None:
    """The joint effect is that of one run without all of them, and not the sum of single ones."""
    heads = [Head(1, 1), Head(2, 0), Head(0, 2)]
    for head in heads:
        told(session, "toggle", side="teacher", head=str(head))
    view = session.do("role", side="teacher", heads=["L1H1", "L2H0"], role="value fetcher")
    groups = {each["role"]: each for each in view["circuits"]["teacher"]["groups"]}
    assert groups["value fetcher"]["heads"] == ["L1H1", "L2H0"]
    subject = session.subjects["teacher"]
    pairs, metric = subject.evaluated(), metric_named("logit_difference")
    stand_in, falls = counterfactual_outputs(subject.model, pairs), []
    whole = metric(plain_logits(subject.model, pairs), pairs.answers, pairs.distractors)
    for some in (heads[:2], heads[:1], heads[1:2]):
        logits = ablated_logits(subject.model, pairs, dict.fromkeys(some, ("all",)), stand_in)
        falls.append(float((whole - metric(logits, pairs.answers, pairs.distractors)).mean()))
    effect = groups["value fetcher"]["effect"]
    assert effect["joint"] == pytest.approx(falls[0], rel=1e-4)
    assert effect["singly"] == pytest.approx(falls[1] + falls[2], rel=1e-4)
    assert abs(effect["joint"] - effect["singly"]) > 100 * 1e-6
    found: dict[str, Any] = {}
    exec(compile(view["code"], "exported", "exec"), found)
    assert found["joint"]["value fetcher"] == pytest.approx(falls[0], rel=1e-4)
    assert told(session, "undo")["circuits"]["teacher"]["groups"][0]["role"] == "picked"
    before = session.state
    for change in ({"heads": []}, {"heads": ["L0H0"]}, {"role": "a+b"}, {"role": ""}, {"role": "x" * 41}, {"role": 3}):
        command = {"do": "role", "side": "teacher", "heads": ["L1H1"], "role": "b", **change}
        assert session.handle(command)["error"], change
        assert session.state == before


def test_groups_are_saved_with_the_circuit(session: Session) -> None:
    told(session, "toggle", side="teacher", head="L1H1")
    told(session, "role", side="teacher", heads=["L1H1"], role="value fetcher")
    session.handle({"do": "save", "side": "teacher", "name": "mine"})
    assert "mine.json" in session.handle({"do": "poll"})["sources"]["teacher"]
    told(session, "clear", side="teacher")
    again = told(session, "load", side="teacher", source="mine.json")
    assert again["circuits"]["teacher"]["heads"] == [{"head": "L1H1", "role": "value fetcher"}]


def test_steps_along_an_elimination(session: Session) -> None:
    names = session.handle({"do": "poll"})["sources"]["teacher"]
    assert names[:2] == [MAP, "teacher.json"]
    assert not set(names) & {"student.json", "list.json", "deep.json", "empty.json", "words.json"}
    view = session.do("load", side="teacher", source="teacher.json")["circuits"]["teacher"]
    assert (view["path"]["size"], view["path"]["heads"], view["path"]["chosen"]) == (4, 12, 4)
    assert view["path"]["search"] == [[0, 0.2], [4, 0.8], [12, 1.0]]
    assert [size for size, _ in view["path"]["here"]] == list(range(13))
    subject = session.subjects["teacher"]
    stand_in = counterfactual_outputs(subject.model, subject.evaluated())
    for size in (2, 7):
        stepped = session.do("step", side="teacher", size=size)["circuits"]["teacher"]
        assert [each["head"] for each in stepped["heads"]] == [str(head) for head in sorted(RANKING[:size])]
        assert stepped["path"]["next"] == str(RANKING[size - 1])
        report = evaluate_circuit(
            subject.model, subject.evaluated(), session.state.circuits["teacher"], stand_in, random_circuits=0
        )
        assert dict(stepped["path"]["here"])[size] == stepped["on_prompts"]["faithfulness"]
        assert stepped["on_prompts"]["logit_difference_recovered"] == pytest.approx(
            report.logit_difference_recovered, abs=1e-5
        )
    told(session, "role", side="teacher", heads=[str(RANKING[0])], role="mine")
    kept = told(session, "step", side="teacher", size=1)["circuits"]["teacher"]["heads"]
    assert kept == [{"head": str(RANKING[0]), "role": "mine"}], "a name given by hand stays"
    told(session, "undo")
    told(session, "undo")
    assert told(session, "undo")["circuits"]["teacher"]["path"]["size"] == 4, "a walk is undone as one"
    ranks = session.do("load", side="teacher", source=MAP)["maps"]["panels"]["teacher"]["ranks"]
    (first,) = session.do("step", side="teacher", size=1)["circuits"]["teacher"]["heads"]
    assert ranks[Head.parse(first["head"]).layer][Head.parse(first["head"]).index] == 1
    before = session.state
    for bad in (
        {"do": "step", "side": "teacher", "size": 13},
        {"do": "step", "side": "teacher", "size": True},
        {"do": "step", "side": "student", "size": 1},
        {"do": "load", "side": "teacher", "source": "../teacher.json"},
        {"do": "load", "side": "teacher", "source": "student.json"},
        {"do": "load", "side": "student", "source": "teacher.json"},
        {"do": "load", "side": "teacher", "source": ["x"]},
    ):
        assert session.handle(bad)["error"], bad
        assert session.state == before


def test_matched_pairs_are_walked(session: Session) -> None:
    heads = []
    for step in (1, 1, 1, -1):
        view = told(session, "match", step=step)
        assert view["matches"]["count"] == 2
        heads.append((view["head"]["head"], view["beside"]["side"], view["beside"]["head"], view["matches"]["at"]))
    first, second = ("L2H1", "student", "L1H2", 0), ("L1H0", "student", "L0H3", 1)
    assert heads == [first, second, first, second]
    assert view["head"]["partners"][0]["mapped"] == ["L0H3"]
    for step in (0, True, "1", None, 10**30):
        assert session.handle({"do": "match", "step": step})["error"]


def test_before_and_after(session: Session) -> None:
    view = session.do("select", side="after", head="L1H3")
    panels = view["maps"]["panels"]
    assert view["head"]["change"] == {side: panels[side]["values"][1][3] for side in ("student", "after")}
    assert abs(view["head"]["change"]["student"] - view["head"]["change"]["after"]) > 1e-4
    assert session.do("select", side="teacher", head="L1H3")["head"]["change"] is None


def test_a_link_restores_the_view(session: Session) -> None:
    told(session, "pick", index=1)
    told(session, "set", method="counterfactual", metric="probability", position="last", layer=1, weighted=True)
    told(session, "toggle", side="student", head="L1H0")
    told(session, "role", side="student", heads=["L1H0"], role="value fetcher")
    told(session, "select", side="student", head="L0H1")
    view = told(session, "beside", side="after", head="L1H1", index=0)
    link, state = json.loads(json.dumps(view["link"])), session.state
    told(session, "pick", index=0)
    told(session, "set", method="zero", metric="logit_difference", position="all", layer=None, weighted=False)
    told(session, "clear", side="student")
    told(session, "beside")
    again = told(session, "restore", view=link)
    assert again["link"] == link
    assert replace(session.state, circuits={}) == replace(state, circuits={})
    assert session.state.circuits["student"].members == state.circuits["student"].members


BAD: list[Any] = [
    None,
    [],
    "x",
    {},
    {"about": "another task"},
    {"pair": {"index": 99}},
    {"pair": {"clean": "x" * 300_000}},
    {"pair": None},
    {"select": {"side": "teacher", "head": "L9H9"}},
    {"select": [1]},
    {"set": {"method": "magic"}},
    {"set": {"do": "save"}},
    {"set": {"layer": 10**30}},
    {"set": {"average": 1}},
    {"beside": {"side": "x", "head": "L0H0"}},
    {"circuits": {"teacher": [["L0H0", "a"]]}},
    {"circuits": {"teacher": [["L0H0", "a", "nowhere"]]}},
    {"circuits": {"teacher": [["L0H0", "a\x00", "all"]]}},
    {"circuits": {"nobody": []}},
    {"circuits": {"teacher": "x"}},
]


def test_bad_links_change_nothing(session: Session) -> None:
    session.do("toggle", side="teacher", head="L0H1")
    good = session.view()["link"]
    before = session.state
    for bad in BAD:
        link = {**good, **bad} if isinstance(bad, dict) and bad else bad
        view = session.handle({"do": "restore", "view": link})
        assert "What is in view stays" in view["error"], bad
        assert session.state == before, bad


def test_a_large_model_is_estimated_first(
    load_teacher: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate stands before the exact sweep, in its sign and its order; the pieces together are the sweep."""
    monkeypatch.setattr(subject_module, "LARGE", 1)
    monkeypatch.setattr(subject_module, "PIECES", (3, 4))
    about: dict[str, Any] = {"task": "entity_tracking", "options": {"boxes": 3}, "prompts": 4}
    made = session_of(load_teacher(), **about)
    try:
        for method in ("path", "activation", "mean"):
            made.do("set", method=method)
            subject, state = made.subjects["teacher"], made.state
            exact, estimate = subject.heat_map(state), subject.estimated_map(state)
            view = made.settle()["maps"]["panels"]["teacher"]
            assert view["estimated"] is None
            assert view["unit"] == exact.unit
            torch.testing.assert_close(torch.tensor(view["values"]), exact.mean(), rtol=1e-4, atol=1e-6)
            rows = torch.stack([estimate.mean().flatten(), exact.mean().flatten()])
            assert float(torch.corrcoef(rows)[0, 1]) > (0.8 if method == "path" else 0.5), method
            first = subject.piece_of_map(state, subject.pieces[0]).values[..., 0]
            assert first.isnan().sum() == 9
            assert set(estimate.top(3, by="magnitude")) == {
                head for head in subject.model.heads if first[head.layer, head.index].isfinite()
            }
        made._worker.close()
    finally:
        made.close()


@dataclass(frozen=True)
class Near:
    """A small step from the clean outputs towards the corrupt ones."""

    clean: Mapping[int, torch.Tensor]
    corrupt: Mapping[int, torch.Tensor]
    step: float
    kind: Literal["counterfactual"] = "counterfactual"

    def identity(self) -> str:
        return f"near {self.step}"

    def require_fitting(self, evaluated: PromptPairs) -> None:
        pass

    def at(self, layer: int, evaluated: PromptPairs) -> torch.Tensor:
        return self.clean[layer] + self.step * (self.corrupt[layer] - self.clean[layer])


@pytest.mark.parametrize("position", ["all", "last"])
def test_a_small_change_has_its_estimated_effect(load_teacher: Callable[..., Teacher], position: str) -> None:
    model, pairs = load_teacher(), entity_pairs()
    clean, corrupt = (counterfactual_outputs(model, each).values for each in (pairs.swapped(), pairs))
    for metric in ("logit_difference", "probability"):
        near = Near(clean, corrupt, 1e-2)
        whole, guess = estimated(
            model,
            pairs,
            [Near(clean, corrupt, 1.0), near],
            metric=metric_named(metric),
            position=position,
            direct=False,
        )
        torch.testing.assert_close(100 * guess.values, whole.values, rtol=1e-3, atol=1e-6)
        measured = ablate(model, pairs, near, metric=metric, position=position).values
        error = (measured - guess.values).abs().max()
        assert measured.abs().max() > 50 * error


def test_an_estimate_is_said_to_be_one(load_teacher: Callable[..., Teacher], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the pieces are missing every head has its estimate, marked; paths and ablations of the head in view too."""
    monkeypatch.setattr(subject_module, "LARGE", 1)
    monkeypatch.setattr(subject_module, "PIECES", (3, 4))
    about: dict[str, Any] = {"task": "entity_tracking", "options": {"boxes": 3}, "prompts": 4}
    made = session_of(load_teacher(), **about)
    try:
        whole = made.do("select", side="teacher", head="L1H2")
        known = made._worker.outcome
        pieces = 3 - 1

        def some(key: Any) -> Any:
            return None if key[0] == "map" and key[-1] > 3 else known(key)

        monkeypatch.setattr(made._worker, "outcome", some)
        panel = made.view()["maps"]["panels"]["teacher"]
        assert sum(map(sum, panel["estimated"])) == 12 - 3
        assert panel["measured"] == 12
        assert made.scores("teacher") is None
        assert pieces == len(made.subjects["teacher"].pieces) - 1
        guess = whole["head"]["guess"]
        assert guess["impacts"].keys() == {"zero", "counterfactual"} < whole["head"]["impacts"].keys()
        reads = {row["head"]: row["together"] for row in guess["reads"]}
        assert {row["head"] for row in whole["head"]["reads"]} & set(reads)
        assert guess["feeds"]["logits"] is not None
    finally:
        made.close()


def test_circuits_of_a_committed_run_come_with_their_path() -> None:
    """An elimination that a run has written: its circuit is the beginning of the ranking, and it has a curve."""
    source = sources([Path(__file__).parents[2] / "assets/results/mind_circuit"])["teacher.json"]
    assert (len(source.ranking), source.circuit.shape) == (32, (4, 8))
    assert source.first(len(source.circuit.heads)).members == source.circuit.members
    assert source.curve is not None
    assert source.curve.share(len(source.circuit.heads)) is not None
