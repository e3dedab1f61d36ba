"""Edge by edge: on models whose wiring is known, exact paths find every edge of the circuit and no other, and EAP-IG
ranks them on top."""

import pytest
from conftest import entity_pairs

from tests.patching.test_known_circuit import CIRCUIT, known, write  # noqa: F401 (fixtures)
from workbench.models.hooked_model import Teacher
from workbench.patching.attribution import attribute_edges, exact_edges
from workbench.patching.path import activation_baselines, prepared
from workbench.tasks.base import PromptPairs
from workbench.values.scores import Scores

Edge = tuple[str, str]
DETECTOR, TRANSMITTERS, FETCHERS = "L2H0", ("L3H1", "L3H2"), ("L4H1", "L5H3")
TRUE: set[Edge] = {
    *(("embed", f"{reader}.v") for reader in ("L0H1", "L1H2")),  # a structure reader reads its clause's object
    *((reader, f"{DETECTOR}.v") for reader in ("L0H1", "L1H2")),
    ("embed", f"{DETECTOR}.q"),  # the queried label,
    ("embed", f"{DETECTOR}.k"),  # and the labels that it is compared with
    *((DETECTOR, f"{head}.v") for head in TRANSMITTERS),
    *((head, f"{fetcher}.q") for head in TRANSMITTERS for fetcher in FETCHERS),
    *(("embed", f"{fetcher}.{side}") for fetcher in FETCHERS for side in "kv"),  # the objects' tokens
    *((fetcher, "logits") for fetcher in FETCHERS),
}
"""Every edge of the circuit of `test_known_circuit`."""
AGAINST: set[Edge] = {
    ("embed", "L5H0.k"),
    ("embed", "L5H0.v"),
    ("L3H1", "L5H0.q"),
    ("L3H2", "L5H0.q"),
    ("L5H0", "logits"),
}
"""The edges of the head that works a little against the answer."""


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """For the search."""
    return entity_pairs(split="calibration", scenes=2, seed=1)


def means(scores: Scores) -> dict[Edge, float]:
    """Edge -> mean score, of the edges that there are."""
    values = scores.mean()
    found = {
        (sender, receiver): float(values[i, j])
        for i, sender in enumerate(scores.labels["sender"])
        for j, receiver in enumerate(scores.labels["receiver"])
    }
    return {edge: value for edge, value in found.items() if value == value}


def strongest(found: dict[Edge, float], count: int) -> set[Edge]:
    return set(sorted(found, key=lambda edge: -abs(found[edge]))[:count])


def gap(model: Teacher, pairs: PromptPairs) -> float:
    clean, corrupt = activation_baselines(prepared(model, pairs), "logit_difference")
    return clean - corrupt


def test_the_list_names_every_head_of_the_circuit():
    assert {sender for sender, _ in TRUE} - {"embed"} == set(map(str, CIRCUIT))


def test_exact_paths_find_every_edge_and_no_other(known, pairs):  # noqa: F811
    found, whole = means(exact_edges(known, pairs, metric="logit_difference")), gap(known, pairs)
    assert len(found) > 500
    for edge, effect in found.items():
        if edge in TRUE:
            assert effect > 0.3 * whole
        elif edge in AGAINST:
            assert effect < -0.04 * whole
        else:
            assert abs(effect) < 0.02 * whole


def test_integrated_gradients_rank_the_edges_of_the_circuit_on_top(known, pairs):  # noqa: F811
    found = means(attribute_edges(known, pairs, metric="logit_difference", steps=16))
    assert strongest(found, len(TRUE | AGAINST)) == TRUE | AGAINST
    assert max(found[edge] for edge in AGAINST) < 0 < min(found[edge] for edge in TRUE)
