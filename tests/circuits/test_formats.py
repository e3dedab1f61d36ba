"""Other programs' files: what they wrote is read, what is written is read back, and each example that is committed is
one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entity_pairs

from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.edge_selection import EdgeSelection, Ranking
from workbench.circuits.formats import (
    EapGraph,
    read_eap_graph,
    read_mib_submission,
    write_eap_graph,
    write_mib_submission,
)
from workbench.circuits.viewer_graph import read_viewer_graph, viewer_graph, write_viewer_graph
from workbench.errors import InputError
from workbench.models.hooked_model import Teacher
from workbench.patching.attribution import attribute_edges
from workbench.patching.execution import Execution
from workbench.storage import read_json
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Head
from workbench.values.scores import Scores

FORMATS = Path(__file__).parents[2] / "assets" / "formats"


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """Three pairs of 3 boxes."""
    return entity_pairs(scenes=1)


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox"])
def model(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Teacher:
    """Every query head its own k and v, groups of two, parallel blocks."""
    return Teacher.load(model_folder(request.param))


@pytest.fixture(scope="module")
def scores(model, pairs) -> Scores:
    """EAP."""
    return attribute_edges(model, pairs, metric="logit_difference", execution=Execution(progress=False))


def test_what_eap_ig_itself_wrote_is_read_and_written_the_same(tmp_path):
    graph = read_eap_graph(FORMATS / "eap_graph.json")
    theirs = read_json(FORMATS / "eap_graph.json")
    assert int(graph.present.sum()) == sum(edge["in_graph"] for edge in theirs["edges"].values()) > 40
    assert graph.d_model == theirs["cfg"]["d_model"] == 32
    place = graph.edges.labels["sender"].index("L0H2"), graph.edges.labels["receiver"].index("L1H3.k")
    assert float(graph.scores.values[place]) == pytest.approx(theirs["edges"]["a0.h2->a1.h3<k>"]["score"])
    write_eap_graph(tmp_path / "graph.json", graph)
    ours = read_json(tmp_path / "graph.json")
    assert ours["cfg"] == {
        name: theirs["cfg"][name] for name in ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")
    }
    assert ours["nodes"] == theirs["nodes"]
    assert set(ours["edges"]) == set(theirs["edges"])
    for name, edge in theirs["edges"].items():
        assert ours["edges"][name] == {"score": pytest.approx(edge["score"]), "in_graph": edge["in_graph"]}
    kept = Ranking(graph.scores, EdgeSelection(by="highest")).choose(60)
    assert torch.equal(graph.edges.pruned(kept), graph.present)  # its choice is ours


def test_a_graph_is_written_and_read_back(model, scores, tmp_path):
    present = Ranking(scores, EdgeSelection()).choose(50)
    graph = EapGraph.of(model, scores, present)
    write_eap_graph(tmp_path / "graph.json", graph)
    back = read_eap_graph(tmp_path / "graph.json", kv_heads=model.n_kv_heads)
    assert torch.allclose(back.scores.values, scores.mean(), equal_nan=True)
    assert torch.equal(back.present, present)
    assert (back.parallel, back.d_model) == (model.has_parallel_blocks, graph.d_model)
    ungrouped = read_eap_graph(tmp_path / "graph.json")  # as EAP-IG sees it
    assert int((~ungrouped.scores.values.isnan()).sum()) == Ranking(scores, EdgeSelection()).total
    assert float(ungrouped.scores.values.nansum()) == pytest.approx(float(scores.mean().nansum()), abs=1e-5)


def test_a_submission_is_written_and_read_back(model, scores, tmp_path):
    graph = EapGraph.of(model, scores)
    files = write_mib_submission(tmp_path, {("arithmetic_addition", "llama3"): graph, ("ioi", "gpt2"): graph})
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "arithmetic-addition_llama3/importances.json",
        "ioi_gpt2/importances.json",
    ]
    assert set(read_mib_submission(tmp_path)) == {("arithmetic-addition", "llama3"), ("ioi", "gpt2")}
    example = read_mib_submission(FORMATS / "mib")["ioi", "gpt2"]
    assert torch.equal(example.present, read_eap_graph(FORMATS / "eap_graph.json").present)
    with pytest.raises(InputError, match="MIB names"):
        write_mib_submission(tmp_path, {("ioi", "../x"): graph})
    with pytest.raises(InputError, match="no submission"):
        read_mib_submission(tmp_path / "nowhere")


def test_an_edge_without_a_score_has_none_and_a_bad_graph_says_its_remedy(tmp_path):
    written = read_json(FORMATS / "eap_graph.json")
    del written["edges"]["input->m0"]["score"]
    assert float(EapGraph.from_json(written).scores.select(sender="embed", receiver="M0").values) == 0.0
    for change, message in (
        (lambda value: value.pop("cfg"), "cfg"),
        (lambda value: value["cfg"].update(n_heads="4"), "n_heads"),
        (lambda value: value["edges"].pop("input->m0"), "no edge 'input->m0'"),
        (lambda value: value["edges"].update({"m2->m0": {"in_graph": True}}), "m2->m0"),
        (lambda value: value["edges"].update({"input->m0": {"in_graph": 1}}), "in_graph"),
    ):
        bad = json.loads(json.dumps(written))
        change(bad)
        with pytest.raises(InputError, match=message):
            EapGraph.from_json(bad)
    with pytest.raises(InputError, match="key-value heads"):
        EapGraph.from_json(written, kv_heads=3)


def required(graph: dict[str, Any]) -> None:
    """What Neuronpedia's schema requires, of what type."""
    assert {"metadata", "qParams", "nodes", "links"} <= set(graph)
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= set(graph["metadata"])
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    for node in graph["nodes"]:
        for name in ("node_id", "feature_type", "jsNodeId", "clerp"):
            assert isinstance(node[name], str)
        assert isinstance(node["feature"], int)
        assert isinstance(node["layer"], str)
        assert 0 <= node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"])
    for link in graph["links"]:
        assert {link["source"], link["target"]} <= set(ids)
        assert isinstance(link["weight"], float)
    assert set(graph["qParams"]["pinnedIds"]) <= set(ids)
    for name, *members in graph["qParams"]["supernodes"]:
        assert isinstance(name, str)
        assert set(members) <= set(ids)


def test_the_viewers_graph_holds_what_its_schema_requires_and_gives_the_circuit_back(model, pairs, scores, tmp_path):
    edges = Ranking(scores, EdgeSelection(greedy=True)).circuit(40, method="EAP")
    heads = Circuit.of(
        [
            Member(Head(0, 1), "reader", "query_label"),
            Member(Head(2, 0), "fetcher", "last"),
            Member(Head(1, 2), "reader", "all"),
        ],
        shape=edges.shape,
        method="by hand",
    )
    for circuit in (edges, heads):
        graph = viewer_graph(circuit, model, pairs, prompt=1)
        required(graph)
        write_viewer_graph(tmp_path / "graph.json", graph)
        assert read_viewer_graph(tmp_path / "graph.json") == circuit
    roles = {name: len(members) for name, *members in graph["qParams"]["supernodes"]}
    assert roles == {"fetcher": 1, "reader": 2}
    place = {node["clerp"]: node["ctx_idx"] for node in graph["nodes"]}
    where = pairs.position("query_label")[1].nonzero().flatten().tolist()
    assert place["L0H1 reader"] == where[-1] < place["L2H0 fetcher"]
    weights = viewer_graph(edges, model, pairs)["links"]
    assert sum(link["weight"] for link in weights) == pytest.approx(sum(edge.score or 0 for edge in edges.edges or ()))
    with pytest.raises(InputError, match="numbered 0 to"):
        viewer_graph(edges, model, pairs, prompt=99)


def test_the_committed_example_is_a_graph():
    required(read_json(FORMATS / "viewer_graph.json"))
    circuit = read_viewer_graph(FORMATS / "viewer_graph.json")
    assert circuit.edges
    assert circuit.shape == (6, 8)
