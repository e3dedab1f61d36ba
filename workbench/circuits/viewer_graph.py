"""The attribution graph that Neuronpedia's viewer reads (by its own JSON schema, that of circuit-tracer): a circuit's
nodes over the tokens of one prompt, its edges as links, its roles as supernodes.

A head stands at the position of its first role (at the last token where it acts everywhere), the embedding as one node
at the first token. A link's weight sums the edges into q, k and v; what each has is written beside it (`parts`), so
that `read_viewer_graph` gives the circuit back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.circuits.circuit import Circuit, Member
from workbench.circuits.edge import LOGITS, Edge, Node, WrittenEdge
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel, last_position
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Embedding, Head, Mlp, Receiver

GENERATOR = {"name": "circuit-distillation-workbench"}
WHAT = "an attribution graph written by `write_viewer_graph`"


def viewer_graph(
    circuit: Circuit, model: HookedModel, pairs: PromptPairs, *, prompt: int = 0, slug: str = "circuit", scan: str = ""
) -> dict[str, Any]:
    """The graph of a circuit over the clean prompt of one pair, as plain JSON values.

    `slug`: its name; `scan`: what Neuronpedia calls the model (by default the model's own name). Errors: `InputError`
    for a prompt that there is not, a circuit of another model, and a model without a tokenizer.
    """
    if not 0 <= prompt < len(pairs):
        raise InputError(f"there is no pair {prompt}: they are numbered 0 to {len(pairs) - 1}.")
    if circuit.shape != (model.n_layers, model.n_heads):
        raise InputError(f"the circuit is of {circuit.shape[0]} layers x {circuit.shape[1]} heads, not {model.name}'s.")
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer to spell the prompt with; load it from its folder.")
    drawn = _Drawn(circuit, model, pairs.rows(slice(prompt, prompt + 1)))
    return {
        "metadata": {
            "slug": slug,
            "scan": scan or model.name,
            "prompt_tokens": drawn.tokens,
            "prompt": drawn.prompt,
            "info": {"description": circuit.method, "generator": GENERATOR},
            "shape": list(circuit.shape),
            "mlps_searched": circuit.mlps is not None,
            "edges_searched": circuit.edges is not None,
        },
        "qParams": {
            "pinnedIds": list(drawn.ids.values()),
            "supernodes": drawn.supernodes(),
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": drawn.nodes(),
        "links": drawn.links(),
    }


def write_viewer_graph(path: str | Path, graph: Mapping[str, Any]) -> None:
    """Write a graph as JSON, atomically; the viewer's upload takes the file."""
    storage.write_json(Path(path), dict(graph))


def read_viewer_graph(path: str | Path) -> Circuit:
    """The circuit of a graph that `write_viewer_graph` wrote. Errors: `InputError` on anything else."""
    written: _Written = storage.read_typed(storage.read_json(Path(path)), _Written, what=WHAT)
    members, mlps = list[Member](), list[Mlp]()
    for node in written.nodes:
        if node.feature_type == "attention head" and node.feature is not None:
            members += [Member(Head(int(node.layer), node.feature), role, where) for role, where in node.roles]
        if node.feature_type == "mlp":
            mlps.append(Mlp(int(node.layer)))
    edges = [Edge.read(part) for link in written.links for part in link.parts]
    return Circuit.of(
        members,
        shape=written.metadata.shape,
        method=written.metadata.info["description"],
        mlps=mlps if written.metadata.mlps_searched else None,
        edges=edges if written.metadata.edges_searched else None,
    )


class _Drawn:
    """The nodes of a circuit over one prompt."""

    def __init__(self, circuit: Circuit, model: HookedModel, pairs: PromptPairs) -> None:
        self.circuit, self.model = circuit, model
        real = pairs.mask[0].nonzero().flatten().tolist()
        ids = pairs.clean[0, real].tolist()
        self.tokens = [str(model.tokenizer.decode([token])) for token in ids]
        self.prompt = str(model.tokenizer.decode(ids))
        self.last = real.index(int(last_position(pairs.mask)[0]))
        self.answer = int(pairs.first_members().answers[0])
        self.first_token = ids[0]
        self.place: dict[Node, int] = {}
        for node in circuit.nodes:
            self.place[node] = 0 if isinstance(node, Embedding) else self.last
            if isinstance(node, Head):
                position = circuit.scope[node][0]
                spots = pairs.position(position)[0].nonzero().flatten().tolist()
                if position != "all" and spots:
                    self.place[node] = real.index(spots[-1])
        self.ids = {node: self._id(node) for node in circuit.nodes}

    def _id(self, node: Node) -> str:
        return f"{self._layer(node)}_{self._feature(node)}_{self.place[node]}"

    def _layer(self, node: Node) -> str:
        if isinstance(node, Head | Mlp):
            return str(node.layer)
        return "E" if isinstance(node, Embedding) else str(self.model.n_layers + 1)

    def _feature(self, node: Node) -> int:
        if isinstance(node, Head):
            return node.index
        if isinstance(node, Mlp):
            return self.model.n_heads
        return self.first_token if isinstance(node, Embedding) else self.answer

    def _label(self, node: Node) -> str:
        if isinstance(node, Head):
            return f"{node} {self.circuit.role_of(node)}"
        if isinstance(node, Mlp):
            return str(node)
        return "embeddings" if isinstance(node, Embedding) else f'Output "{self.model.tokenizer.decode([self.answer])}"'

    def nodes(self) -> list[dict[str, Any]]:
        """One object a node."""
        return [self._node(node) for node in self.circuit.nodes]

    def _node(self, node: Node) -> dict[str, Any]:
        kind = "attention head" if isinstance(node, Head) else "mlp" if isinstance(node, Mlp) else "logit"
        place, feature = self.place[node], self._feature(node)
        roles = [[m.role, m.position] for m in self.circuit.members if m.head == node]
        return {
            "node_id": self.ids[node],
            "feature": feature,
            "layer": self._layer(node),
            "ctx_idx": place,
            "feature_type": "embedding" if isinstance(node, Embedding) else kind,
            "token_prob": 0.0,
            "is_target_logit": node == LOGITS,
            "run_idx": 0,
            "reverse_ctx_idx": len(self.tokens) - 1 - place,
            "jsNodeId": f"{self._layer(node)}_{feature}-{place}",
            "clerp": self._label(node),
            "influence": None,
            "activation": None,
            "roles": roles,
        }

    def supernodes(self) -> list[list[str]]:
        """[role, its nodes ...]; a head of several roles stands in the first."""
        groups: dict[str, list[str]] = {}
        for head in self.circuit.heads:
            role = next(member.role for member in self.circuit.members if member.head == head)
            groups.setdefault(role, []).append(self.ids[head])
        return [[role, *ids] for role, ids in sorted(groups.items())]

    def links(self) -> list[dict[str, Any]]:
        """One object for each two nodes that edges join."""
        bundles: dict[tuple[str, str], list[Edge]] = {}
        for edge in self.circuit.edges or ():
            bundles.setdefault((self.ids[edge.sender], self.ids[self._reader(edge)]), []).append(edge)
        return [
            {
                "source": source,
                "target": target,
                "weight": sum(edge.score or 0.0 for edge in edges),
                "parts": [edge.to_json() for edge in edges],
            }
            for (source, target), edges in bundles.items()
        ]

    def _reader(self, edge: Edge) -> Node:
        """The node that a link leads to: of a key-value group the first head that is in the circuit."""
        if not isinstance(edge.receiver, Receiver) or edge.into in self.ids:
            return edge.into
        group = self.model.n_heads // self.model.n_kv_heads
        heads = (Head(edge.receiver.head.layer, edge.receiver.head.index + place) for place in range(group))
        return next(head for head in heads if head in self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metadata:
    slug: str
    scan: str
    prompt_tokens: tuple[str, ...]
    prompt: str
    info: dict[str, Any]
    shape: tuple[int, int]
    mlps_searched: bool
    edges_searched: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    node_id: str
    feature: int | None
    layer: str
    ctx_idx: int
    feature_type: str
    jsNodeId: str
    clerp: str
    roles: tuple[tuple[str, str], ...]
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    influence: float | None
    activation: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    source: str
    target: str
    weight: float
    parts: tuple[WrittenEdge, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    metadata: _Metadata
    qParams: dict[str, Any]
    nodes: tuple[_Node, ...]
    links: tuple[_Link, ...]
