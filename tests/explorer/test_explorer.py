"""The explorer's session: what it shows is what the workbench computes, what it exports reproduces it, and bad input
changes nothing."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from workbench.circuits.circuit import Circuit, Member, whole_model
from workbench.circuits.evaluation import evaluate_circuit
from workbench.errors import InputError
from workbench.explorer import parts
from workbench.explorer.api import forget, session_of
from workbench.explorer.material import encoded
from workbench.explorer.session import Session
from workbench.explorer.subject import Subject
from workbench.models.hooked_model import Teacher
from workbench.patching.ablation import ablate, counterfactual_outputs
from workbench.patching.path import path_patch
from workbench.readouts.logit_attribution import direct_logit_attribution
from workbench.readouts.patterns import attention_patterns
from workbench.tasks.entity_tracking import EntityTracking
from workbench.values.refs import Head

HEAD = Head(1, 2)
SHAPE = (3, 4)


@pytest.fixture
def session(load_teacher: Callable[..., Teacher]) -> Iterator[Session]:
    """A random teacher beside a random student, on scenes of three boxes."""
    made = session_of(
        load_teacher(), load_teacher("llama", seed=1, layers=2), task="entity_tracking", options={"boxes": 3}, prompts=6
    )
    yield made
    made.close()


def settled(session: Session, **command: Any) -> dict[str, Any]:
    """The view after a command, when everything is there."""
    view = session.handle(command)
    assert view["error"] is None, view["error"]
    return {**session.settle(), "notice": view["notice"]}


def test_a_view_is_plain_json_and_complete(session: Session) -> None:
    view = settled(session, do="select", side="teacher", head=str(HEAD))
    json.dumps(view, allow_nan=False)
    assert view["pending"] == []
    assert all(
        view["head"][name] is not None
        for name in ("score", "attention", "share", "impacts", "reads", "feeds", "partners")
    )
    assert {**session.handle({"do": "hello"})}["setup"]["models"][1] == {
        "side": "student",
        "name": session.subjects["student"].model.name,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
    }


def test_what_is_done_while_the_view_is_made_is_asked_for_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker ends just after the view has read what it knows: a view with gaps must say that something is pending,
    or no page would ask again."""
    shown, patient = parts.shown, session.settle

    def overtaken(*given: Any) -> dict[str, Any]:
        found = shown(*given)
        assert session._worker.wait(60.0)
        return found

    monkeypatch.setattr(parts, "shown", overtaken)
    view = session.handle({"do": "toggle", "side": "teacher", "head": str(HEAD)}, patience=0.0)
    assert view["circuits"]["teacher"]["on_prompts"] is None, "not there yet when it was read"
    assert view["pending"] != []
    monkeypatch.setattr(parts, "shown", shown)
    assert patient()["circuits"]["teacher"]["on_prompts"] is not None


def test_every_number_in_view_is_the_workbenchs_own(session: Session) -> None:
    view = settled(session, do="select", side="teacher", head=str(HEAD))
    model, pairs = session.subjects["teacher"].model, encoded([session.state.pair], session.subjects["teacher"].model)
    metric = "logit_difference"
    scores = path_patch(model, pairs, metric=metric, position="last")
    shown = torch.tensor(view["maps"]["panels"]["teacher"]["values"])
    torch.testing.assert_close(shown, scores.mean(), rtol=1e-5, atol=1e-6)
    assert view["maps"]["panels"]["teacher"]["ranks"][HEAD.layer][HEAD.index] == scores.ranked().index(HEAD) + 1
    weights = attention_patterns(model, pairs.clean[0], [HEAD]).weights[0]
    assert view["head"]["attention"]["weights"][-1] == pytest.approx(weights[-1].tolist(), abs=1e-4)
    assert view["head"]["share"]["share"] == pytest.approx(
        float(direct_logit_attribution(model, pairs).heads.at(HEAD)), rel=1e-4
    )
    means = counterfactual_outputs(model, pairs)
    impact = ablate(model, pairs, means, metric=metric, heads=[HEAD]).at(HEAD)
    assert view["head"]["impacts"]["counterfactual"] == pytest.approx(float(impact), rel=1e-4)
    through_q = path_patch(model, pairs, metric=metric, position="all", receivers=[f"{HEAD}.q"])
    for row in view["head"]["reads"]:
        assert row["q"] == pytest.approx(float(through_q.at(Head.parse(row["head"]))), rel=1e-3, abs=1e-5)
    assert max(abs(row["q"]) for row in view["head"]["reads"]) > 100 * 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "path"},
        {"method": "activation", "metric": "log_probability", "weighted": True},
        {"method": "counterfactual", "position": "query_label", "average": True},
        {"method": "mean", "outside": "mean"},
        {"method": "zero", "metric": "probability", "outside": "zero"},
    ],
    ids=lambda settings: settings["method"],
)
def test_the_exported_lines_reproduce_the_view(session: Session, settings: dict[str, Any]) -> None:
    settled(session, do="set", **settings)
    for head in ("L0H1", "L1H3", "L2H0"):
        settled(session, do="toggle", side="teacher", head=head)
    settled(session, do="select", side="teacher", head=str(HEAD))
    view = settled(session, do="compare")
    found: dict[str, Any] = {}
    exec(compile(view["code"], "exported", "exec"), found)
    close = {"rel": 1e-4, "abs": 1e-6}
    values = [value for row in view["maps"]["panels"]["teacher"]["values"] for value in row]
    assert values == pytest.approx(found["scores"].mean().flatten().tolist(), **close)
    assert len(set(values)) > 6
    assert view["head"]["attention"]["weights"][-1] == pytest.approx(
        found["attention"].weights[0, -1].tolist(), abs=1e-4
    )
    assert view["head"]["share"]["share"] == pytest.approx(float(found["share"]), **close)
    assert view["head"]["impacts"] == pytest.approx(
        {kind: float(found[f"{kind}_impact"]) for kind in view["head"]["impacts"]}, **close
    )
    assert [row["together"] for row in view["head"]["reads"]] == pytest.approx(
        [float(found["reads"].at(Head.parse(row["head"]))) for row in view["head"]["reads"]], **close
    )
    assert view["head"]["feeds"]["logits"] == pytest.approx(
        float(found["feeds"].select(receiver="logits").values.squeeze()), **close
    )
    report = view["circuits"]["teacher"]["random"]
    assert report["logit_differences"] == pytest.approx(dict(found["report"].logit_differences), **close)
    assert report["circuit_accuracy"] == pytest.approx(found["report"].circuit_accuracy)


def test_the_two_ends_of_a_circuit(session: Session) -> None:
    empty = settled(session, do="hello")["circuits"]["teacher"]["on_prompts"]
    assert empty["logit_difference_recovered"] == pytest.approx(0.0, abs=1e-5)
    for head in whole_model(SHAPE).heads:
        session.handle({"do": "toggle", "side": "teacher", "head": str(head)})
    full = session.settle()["circuits"]["teacher"]["on_prompts"]
    assert full["logit_difference_recovered"] == pytest.approx(1.0, abs=1e-4)
    assert abs(full["logit_differences"]["full"] - full["logit_differences"]["empty"]) > 1e-2


def test_a_circuit_is_toggled_undone_and_emptied(session: Session) -> None:
    before = settled(session, do="hello")
    added = settled(session, do="toggle", side="teacher", head="L2H1")
    assert "added L2H1" in added["notice"]
    assert added["circuits"]["teacher"]["on_prompts"] != before["circuits"]["teacher"]["on_prompts"]
    assert added["circuits"]["student"] == before["circuits"]["student"]
    settled(session, do="toggle", side="student", head="L0H0")
    settled(session, do="clear", side="teacher")
    for _ in range(3):
        undone = settled(session, do="undo")
    assert undone["circuits"] == before["circuits"]
    assert "nothing to undo" in session.handle({"do": "undo"})["error"]


def test_nothing_is_computed_twice(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    compute = Subject.heat_map
    monkeypatch.setattr(Subject, "heat_map", lambda self, state: (runs.append(state.method), compute(self, state))[1])
    for method in ("path", "zero", "path", "zero"):
        settled(session, do="set", method=method)
    settled(session, do="pick", index=1)
    settled(session, do="pick", index=0)
    assert sorted(runs) == ["path"] * 2 + ["zero"] * 4, "each method once for each of two models and each pair"


def test_a_typed_pair(session: Session) -> None:
    clean = "The apple is in Box F, the book is in Box Q. Box F contains the"
    settled(session, do="type", clean=clean, corrupt=clean.replace("apple", "key"), answer="apple", distractor=" book")
    assert (session.state.picked, session.state.pair.answer) == (None, " apple")
    listed = session.material.shown.pairs[2]
    settled(
        session,
        do="type",
        clean=listed.clean,
        corrupt=listed.corrupt,
        answer=listed.answer,
        distractor=listed.distractor,
    )
    assert session.state.picked == 2
    assert session.state.pair.positions == listed.positions


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corrupt": "Box F contains the"}, "equal prompt lengths"),
        ({"clean": "The zeppelin is in Box F. Box F contains the"}, "'zeppelin'"),
        ({"answer": "zeppelin"}, "answer 'zeppelin' is unknown to this tokenizer; it must be one known token"),
        ({"distractor": "book key"}, "distractor 'book key' has 2 tokens; it must be one known token"),
        ({"answer": ""}, "empty"),
        ({"clean": "  "}, "empty"),
        ({"distractor": " apple"}, "both"),
        ({"clean": None}, "empty"),
    ],
)
def test_a_bad_pair_is_refused_and_nothing_is_lost(session: Session, change: dict[str, Any], says: str) -> None:
    settled(session, do="toggle", side="teacher", head="L1H1")
    before = session.state
    good = {"clean": "The apple is in Box F. Box F contains the", "corrupt": "The key is in Box Q. Box F contains the"}
    view = session.handle({"do": "type", **good, "answer": " apple", "distractor": " key", **change})
    assert says in view["error"]
    assert session.state == before
    assert session.settle()["circuits"]["teacher"]["heads"]


@pytest.mark.parametrize(
    "command",
    [
        {},
        {"do": "explode"},
        {"do": "pick", "index": 99},
        {"do": "pick", "index": "0"},
        {"do": "select", "side": "teacher", "head": "L9H9"},
        {"do": "select", "side": "nobody", "head": "L0H0"},
        {"do": "toggle", "side": "teacher", "head": "H1"},
        {"do": "set", "method": "magic"},
        {"do": "set", "head": "L0H0"},
        {"do": "set", "position": "nowhere"},
        {"do": "save", "name": ""},
    ],
    ids=str,
)
def test_a_bad_command_is_answered_with_an_error(session: Session, command: dict[str, Any]) -> None:
    before = session.state
    assert session.handle(command)["error"]
    assert session.state == before


def test_what_fails_says_so_in_its_place(session: Session) -> None:
    pair = session.state.pair
    view = session.handle(
        {"do": "type", "clean": pair.clean, "corrupt": pair.clean, "answer": pair.answer, "distractor": pair.distractor}
    )
    assert view["error"] is None
    assert "nothing to patch" in session.settle()["maps"]["panels"]["teacher"]["error"]
    assert session.settle()["prompts"]["teacher"]["clean"]["top"], "the rest is there"


def test_means_need_reference_prompts(load_teacher: Callable[..., Teacher], session: Session) -> None:
    own = session_of(load_teacher(), pairs=session.material.shown.pairs)
    try:
        assert "mean" not in [each["value"] for each in own.handle({"do": "hello"})["setup"]["methods"]]
        assert own.handle({"do": "set", "method": "mean"})["error"]
        assert set(settled(own, do="select", side="teacher", head="L0H0")["head"]["impacts"]) == {
            "zero",
            "counterfactual",
        }
    finally:
        own.close()


def test_a_head_is_most_alike_itself(load_teacher: Callable[..., Teacher]) -> None:
    twins = session_of(load_teacher(), load_teacher(), task="entity_tracking", options={"boxes": 3}, prompts=12)
    try:
        for side, other in (("teacher", "student"), ("student", "teacher")):
            (partner,) = settled(twins, do="select", side=side, head="L1H1")["head"]["partners"]
            assert partner["side"] == other
            assert partner["nearest"][0][0] == "L1H1"
            assert partner["nearest"][0][1] == pytest.approx(1.0, abs=1e-4)
            assert partner["nearest"][1][1] < 0.99
    finally:
        twins.close()


def test_a_circuit_is_saved_where_it_may_be(session: Session, tmp_path: Any) -> None:
    session.folder = tmp_path
    settled(session, do="toggle", side="student", head="L1H0")
    assert session.handle({"do": "save", "side": "student", "name": "mine"})["error"] is None
    assert Circuit.from_json(json.loads((tmp_path / "mine.json").read_text())) == session.state.circuits["student"]
    assert session.handle({"do": "save", "side": "student", "name": "mine.json"})["error"] is None, (
        "a circuit may be saved again"
    )
    before = (tmp_path / "mine.json").read_bytes()
    settled(session, do="toggle", side="student", head="L0H1")
    for answer in (None, False, 1, "yes"):
        asked = session.handle({"do": "save", "side": "student", "name": "mine", "overwrite": answer})
        assert asked["asks"]
        assert "holds another circuit (1 head); overwrite it" in asked["error"]
        assert (tmp_path / "mine.json").read_bytes() == before
    told = session.handle({"do": "save", "side": "student", "name": "mine", "overwrite": True})
    assert (told["error"], told["asks"]) == (None, False)
    assert Circuit.from_json(json.loads((tmp_path / "mine.json").read_text())) == session.state.circuits["student"]
    empty = session.handle({"do": "save", "side": "teacher", "name": "mine", "overwrite": True})
    assert "is empty; add a head" in empty["error"]
    assert not empty["asks"]
    (tmp_path / "precious.json").write_text("[1, 2]")
    for name in ("precious", "../mine.json", "a/b.json", ".hidden", "..\\x", str(tmp_path / "there.json")):
        assert session.handle({"do": "save", "side": "student", "name": name})["error"], name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "precious.json"]


def test_a_session_is_kept_under_its_name(load_teacher: Callable[..., Teacher]) -> None:
    about: dict[str, Any] = {"task": EntityTracking(boxes=3), "prompts": 4, "name": "kept"}
    try:
        first = session_of(load_teacher(), **about)
        settled(first, do="toggle", side="teacher", head="L0H2")
        assert session_of(load_teacher(), **about) is first, "the same weights, loaded again"
        other = session_of(load_teacher("llama", seed=2), **about)
        assert other is not first
        assert not other.state.circuits["teacher"].heads
        assert "closed" in first.handle({"do": "poll"})["error"]
    finally:
        forget("kept")


def test_what_cannot_be_explored_is_refused(load_teacher: Callable[..., Teacher]) -> None:
    teacher, pairs = (
        load_teacher(),
        list(EntityTracking(boxes=3).pairs(load_teacher().tokenizer, split="test", scenes=1, seed=0)),
    )
    with pytest.raises(InputError, match="either"):
        session_of(teacher, pairs=pairs, task="ioi")
    with pytest.raises(InputError, match="no pairs"):
        session_of(teacher, pairs=[])
    with pytest.raises(InputError, match="shape"):
        session_of(teacher, pairs=pairs, circuits={"teacher": whole_model((2, 4))})
    with pytest.raises(InputError, match="no such model"):
        session_of(teacher, pairs=pairs, circuits={"after": whole_model(SHAPE)})


def test_known_ends_change_no_evaluation(session: Session) -> None:
    subject = session.subjects["teacher"]
    circuit = Circuit.of([Member(Head(2, 1), "a", "last"), Member(Head(0, 3), "b", "all")], shape=SHAPE, method="test")
    means = counterfactual_outputs(subject.model, subject.evaluated())
    for _ in range(2):
        assert replace(subject.report(circuit, "counterfactual", random_circuits=2)) == evaluate_circuit(
            subject.model, subject.evaluated(), circuit, means, random_circuits=2
        )
