"""Circuits of edges in other programs' files: EAP-IG's graph JSON and a submission to MIB.

EAP-IG names nodes `input`, `a0.h3`, `m0`, `logits` and edges `input->a0.h3<q>`; it has no key-value groups. A group's
edge is written once for each of its query heads, each with its part of the score; reading with `kv_heads` sums them up
again. MIB takes the same files, `TASK_MODEL/importances.json` in the folder of a submission.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench import storage
from workbench.circuits.edge_selection import edges_of
from workbench.errors import InputError
from workbench.models.hooked_model import HookedModel
from workbench.patching.attribution import Edges
from workbench.values.refs import Embedding, Head, Mlp, Receiver
from workbench.values.scores import Scores

REMEDY = "write it with EAP-IG's `Graph.to_json`, or with `write_eap_graph`"
IMPORTANCES = "importances.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EapGraph:
    """A graph of EAP-IG: scores of all edges, and which of them are in the circuit."""

    scores: Scores
    """[sender receiver], NaN where there is no edge."""
    present: Bool[Tensor, "sender receiver"]
    d_model: int
    parallel: bool
    """Whether attention and MLP of a block read the same residual stream."""

    def __post_init__(self) -> None:
        edges_of(self.scores)
        if self.present.shape != self.scores.values.shape or bool((self.present & self.scores.values.isnan()).any()):
            raise InputError("the edges of a graph are marked in an array like that of their scores.")

    @classmethod
    def of(
        cls, model: HookedModel, scores: Scores, present: Bool[Tensor, "sender receiver"] | None = None
    ) -> "EapGraph":
        """The graph of a model with its scores (their mean over prompts); `present`: the circuit, by default none."""
        means = scores.mean()
        return cls(
            scores=Scores(values=means, axes=("sender", "receiver"), labels=scores.labels, unit=scores.unit),
            present=torch.zeros_like(means, dtype=torch.bool) if present is None else present,
            d_model=int(model.model.cfg.d_model),
            parallel=model.has_parallel_blocks,
        )

    @property
    def edges(self) -> Edges:
        """Its senders and receivers."""
        return edges_of(self.scores)

    def to_json(self) -> dict[str, Any]:
        """As EAP-IG writes it: `cfg`, `nodes`, `edges`."""
        edges = self.edges
        heads = sum(isinstance(sender, Head) and sender.layer == 0 for sender in edges.senders)
        layers = (len(edges.senders) - 1) // (heads + 1)
        alive = edges.pruned(self.present).any(1).tolist()
        nodes = {_name(s): {"in_graph": here} for s, here in zip(edges.senders, alive, strict=True)}
        return {
            "cfg": {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": self.parallel, "d_model": self.d_model},
            "nodes": {**nodes, "logits": {"in_graph": True}},
            "edges": dict(self._written_edges()),
        }

    def _written_edges(self) -> Iterator[tuple[str, dict[str, Any]]]:
        edges, values = self.edges, self.scores.values / self.edges.counts()
        for row, sender in enumerate(edges.senders):
            for column in (~values[row].isnan()).nonzero().flatten().tolist():
                for target in _targets(edges, column):
                    written = {"score": float(values[row, column]), "in_graph": bool(self.present[row, column])}
                    yield f"{_name(sender)}->{target}", written

    @classmethod
    def from_json(cls, value: Any, *, kv_heads: int | None = None) -> "EapGraph":
        """Read what EAP-IG or `to_json` wrote; `kv_heads`: key-value heads a layer, where they are fewer than heads.

        An edge without a score has 0 (so MIB reads them). Errors: `InputError` on anything else, for an edge that the
        graph of its `cfg` does not have, and for one that is missing.
        """
        graph: _Written = storage.read_typed(_fields(value), _Written, what="a graph of EAP-IG", remedy=REMEDY)
        config = graph.cfg
        heads = config["n_heads"]
        if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
            raise InputError(f"{heads} heads can't share {kv_heads} key-value heads; say how many the model has.")
        edges = Edges.of_shape(config["n_layers"], heads, kv_heads or heads)
        there = edges.connected(parallel=config["parallel_attn_mlp"])
        values, present, open_ = torch.zeros_like(there), torch.zeros(there.shape, dtype=torch.bool), set(graph.edges)
        for row, sender in enumerate(edges.senders):
            for column in (~there[row].isnan()).nonzero().flatten().tolist():
                for target in _targets(edges, column):
                    name = f"{_name(sender)}->{target}"
                    if name not in graph.edges:
                        raise InputError(f"this graph of EAP-IG has no edge {name!r}; {REMEDY}.")
                    values[row, column] += graph.edges[name].score or 0.0
                    present[row, column] |= graph.edges[name].in_graph
                    open_.discard(name)
        if open_:
            raise InputError(f"this graph of EAP-IG has the edge {min(open_)!r}, which its `cfg` leaves no room for.")
        scores = Scores(
            values=values + (there - there), axes=("sender", "receiver"), labels=edges.labels, unit="score of EAP-IG"
        )
        return cls(scores=scores, present=present, d_model=config["d_model"], parallel=config["parallel_attn_mlp"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _WrittenEdge:
    in_graph: bool
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    cfg: dict[str, Any]
    nodes: dict[str, Any]
    edges: dict[str, _WrittenEdge]

    def __post_init__(self) -> None:
        for name, kind in (("n_layers", int), ("n_heads", int), ("d_model", int), ("parallel_attn_mlp", bool)):
            if not isinstance(self.cfg.get(name), kind) or (kind is int and self.cfg[name] < 1):
                raise InputError(f"its `cfg` says nothing that fits of `{name}`")


def _fields(value: Any) -> Any:
    """The three fields that are read (a file may hold more)."""
    if not isinstance(value, Mapping):
        return value
    return {name: value[name] for name in ("cfg", "nodes", "edges") if name in value}


def _name(sender: Embedding | Head | Mlp) -> str:
    if isinstance(sender, Head):
        return f"a{sender.layer}.h{sender.index}"
    return f"m{sender.layer}" if isinstance(sender, Mlp) else "input"


def _targets(edges: Edges, column: int) -> list[str]:
    """The names of a receiver in a graph without key-value groups."""
    reader = edges.receivers[column]
    if not isinstance(reader, Receiver):
        return ["logits" if isinstance(reader, str) else _name(reader)]
    span = 1 if reader.composition == "q" else edges.group
    heads = (Head(reader.head.layer, reader.head.index + place) for place in range(span))
    return [f"{_name(head)}<{reader.composition}>" for head in heads]


def write_eap_graph(path: str | Path, graph: EapGraph) -> None:
    """Write the JSON that `eap.graph.Graph.from_json` reads, atomically."""
    storage.write_json(Path(path), graph.to_json())


def read_eap_graph(path: str | Path, *, kv_heads: int | None = None) -> EapGraph:
    """Read the JSON that `eap.graph.Graph.to_json` writes. Errors: `InputError` on anything else."""
    return EapGraph.from_json(storage.read_json(Path(path)), kv_heads=kv_heads)


def write_mib_submission(folder: str | Path, graphs: Mapping[tuple[str, str], EapGraph]) -> list[Path]:
    """Write a submission to MIB's circuit track: `TASK_MODEL/importances.json` for every (task, model) in MIB's names
    (`ioi`, `gpt2`). Returns the files.

    Errors: `InputError` for a name that would not be found again.
    """
    files = []
    for (task, model), graph in graphs.items():
        task = task.replace("_", "-")
        if not re.fullmatch(r"[\w.-]+", task) or not re.fullmatch(r"[a-zA-Z0-9.-]+", model):
            raise InputError(f"MIB names a task and a model in letters, digits, - and .: not {task!r}, {model!r}.")
        files.append(Path(folder) / f"{task}_{model}" / IMPORTANCES)
        write_eap_graph(files[-1], graph)
    return files


def read_mib_submission(folder: str | Path) -> dict[tuple[str, str], EapGraph]:
    """(task, model) -> graph, of every `TASK_MODEL/importances.json` in a folder. Errors: `InputError` where there is
    none."""
    graphs = {}
    for file in sorted(Path(folder).glob(f"*_*/{IMPORTANCES}")):
        task, _, model = file.parent.name.rpartition("_")
        graphs[task, model] = read_eap_graph(file)
    if not graphs:
        raise InputError(f"{folder} holds no submission to MIB; it should have folders TASK_MODEL with {IMPORTANCES}.")
    return graphs
