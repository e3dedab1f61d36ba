"""One model of a session: every number that the explorer shows of it, each by the one function of the workbench that
computes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.circuit import Circuit
from workbench.circuits.evaluation import CircuitReport, Ends, circuit_ends, evaluate_circuit
from workbench.errors import InputError
from workbench.explorer.estimate import estimated
from workbench.explorer.labels import METRIC_TITLES
from workbench.explorer.material import Key, Material, encoded, key_of
from workbench.explorer.state import Method, Outside, Side, State
from workbench.matching.head_similarity import all_head_similarity
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablate, ablated_logits, plain_logits
from workbench.patching.activation import activation_patch
from workbench.patching.attribution import attribute_edges, exact_edges
from workbench.patching.engine.passage import Route
from workbench.patching.path import path_patch, prepared, sweep_heads
from workbench.patching.replacement import Replacement, Zero, counterfactual_outputs, covers, reference_means
from workbench.readouts.logit_attribution import LogitAttribution, direct_logit_attribution
from workbench.readouts.patterns import AttentionPatterns, attention_patterns
from workbench.readouts.text import token_texts
from workbench.tasks.base import PromptPairs
from workbench.tasks.pairs import Pair
from workbench.tasks.tokenizers import same_vocabulary
from workbench.values.metrics import METRICS, mass, metric_named
from workbench.values.refs import Composition, Head, Position, Receiver
from workbench.values.scores import Scores

TOP = 6
"""How many predictions are shown."""
COMPOSITIONS: tuple[Composition, ...] = ("q", "k", "v")
EVALUATED, LISTED = ("evaluated",), ("listed",)
"""Keys of the two sets of prompts that are not the pair in view."""
LARGE = 100
"""Heads above which a map is estimated first, and measured piece by piece."""
PIECES = (16, 64)
"""Heads of the first pieces of a map, the most important by the estimate first; the rest is the last one."""
THUMBNAIL = 48
"""Tokens along a side of a small picture of attention; of longer prompts it shows each cell's largest weight."""


class Subject:
    """A model, and what is kept of it between requests (encoded prompts, replacements, the two ends of circuit
    evaluation)."""

    def __init__(self, side: Side, model: HookedModel, material: Material) -> None:
        if model.tokenizer is None:
            raise InputError(f"the {side} has no tokenizer, so its prompts can't be shown; load it with one.")
        model.require_eval()
        self.side: Side = side
        self.model, self.material = model, material
        self.shape = (model.n_layers, model.n_heads)
        self._kept: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], Any], *, room: int = 8) -> Any:
        """A value that several parts share; of each kind the latest few are kept, for they hold activations."""
        if key not in self._kept:
            of_kind = [known for known in self._kept if known[0] == key[0]]
            for known in of_kind[: len(of_kind) - room + 1]:
                del self._kept[known]
            self._kept[key] = make()
        return self._kept[key]

    def pair(self, pair: Pair) -> PromptPairs:
        """The pair in view as tensors."""
        return self.once(
            ("pair", key_of(pair)),
            lambda: encoded([replace(pair, corrupt_answer=None, facts=None)], self.model, self.material.settings),
            room=64,
        )

    def _encoded(self, pairs: Sequence[Pair]) -> PromptPairs:
        return encoded(pairs, self.model, self.material.settings)

    def listed(self) -> PromptPairs:
        """All pairs of the list."""
        return self.once(("listed",), lambda: self._encoded(self.material.shown.pairs))

    def evaluated(self) -> PromptPairs:
        """The prompts that circuits are evaluated on."""
        return self.once(("evaluated",), lambda: self._encoded(self.material.evaluated.pairs))

    def reference(self) -> PromptPairs:
        """The prompts of the mean. Errors: `InputError` when there are none."""
        if self.material.reference is None:
            raise InputError(
                "mean ablation needs reference prompts: pass `reference=` (pairs of another draw), or choose zero or "
                "counterfactual."
            )
        reference = self.material.reference
        return self.once(("reference",), lambda: self._encoded(reference.pairs))

    def replacement(self, kind: Outside, pairs: PromptPairs, key: Key | tuple[str, ...]) -> Replacement:
        """What stands in for an ablated head on these prompts. Means are by position where a reference prompt is as
        long, else over all tokens."""
        if kind == "zero":
            return Zero()
        if kind == "mean":
            there = covers(self.reference(), pairs)
            return self.once(("mean", there), lambda: reference_means(self.model, self.reference(), per_position=there))
        return self.once(("counterfactual", key), lambda: counterfactual_outputs(self.model, pairs))

    def predictions(self, pair: Pair) -> dict[str, Any]:
        """Tokens, likeliest next tokens, and every metric, of the clean and the corrupt prompt."""
        pairs = self.pair(pair)
        predicted = {name: self._predicted(each) for name, each in (("clean", pairs), ("corrupt", pairs.swapped()))}
        return {**predicted, "answer": pair.answer, "distractor": pair.distractor}

    def _predicted(self, pairs: PromptPairs) -> dict[str, Any]:
        logits = plain_logits(self.model, pairs)
        likely = logits[0].softmax(-1)
        best, kinds = (
            likely.topk(min(TOP, len(likely))),
            {
                **dict.fromkeys(pairs.answers[0].reshape(-1).tolist(), "answer"),
                **dict.fromkeys(pairs.distractors[0].reshape(-1).tolist(), "distractor"),
            },
        )
        answers = pairs.answers[0].reshape(-1)
        rank = int((likely > likely[answers[answers >= 0]].max()).sum()) + 1  # of a set, its likeliest member's
        return {
            "tokens": token_texts(self.model, pairs.clean[0]),
            "ids": pairs.clean[0].tolist(),
            "top": [
                [text, value, kinds.get(token, "other")]
                for text, value, token in zip(
                    token_texts(self.model, best.indices), best.values.tolist(), best.indices.tolist(), strict=True
                )
            ],
            "metrics": {
                name: float(metric(logits, pairs.answers, pairs.distractors)[0])
                for name, metric in METRICS.items()
                if name in METRIC_TITLES
            },
            "answer": {"probability": float(mass(logits, pairs.answers)[0]), "rank": rank},
            "distractor": {"probability": float(mass(logits, pairs.distractors)[0])},
        }

    def heat_map(self, state: State) -> Scores:
        """[layer head example] by the chosen method, on the pair in view or on all listed pairs."""
        pairs, key = (self.listed(), LISTED) if state.average else (self.pair(state.pair), key_of(state.pair))
        return self.swept(state.method, pairs, key, metric=state.metric, position=state.acts)

    def swept(
        self, method: Method, pairs: PromptPairs, key: Key | tuple[str, ...], *, metric: str, position: Position
    ) -> Scores:
        """The sweep of a method over all heads."""
        if method == "path":
            return path_patch(self.model, pairs, metric=metric, position=position)
        if method == "activation":
            return activation_patch(self.model, pairs, "z", metric=metric, positions=(position,))
        return ablate(self.model, pairs, self.replacement(method, pairs, key), metric=metric, position=position)

    @property
    def large(self) -> bool:
        """Whether its maps are estimated first."""
        return self.shape[0] * self.shape[1] > LARGE

    @property
    def pieces(self) -> list[slice]:
        """The pieces that a large model's map is measured in: places in the order of the estimate."""
        total, ends = self.shape[0] * self.shape[1], [0]
        ends += [end for end in (sum(PIECES[: n + 1]) for n in range(len(PIECES))) if end < total]
        return [slice(start, end) for start, end in zip(ends, [*ends[1:], total], strict=True)]

    def estimated_map(self, state: State) -> Scores:
        """What one gradient says of the heat map: [layer head example]."""
        pairs, key = (self.listed(), LISTED) if state.average else (self.pair(state.pair), key_of(state.pair))
        kind: Outside = "counterfactual" if state.method in ("path", "activation") else state.method

        def estimate() -> Scores:
            (scores,) = estimated(
                self.model,
                pairs,
                [self.replacement(kind, pairs, key)],
                metric=metric_named(state.metric),
                position=state.acts,
                direct=state.method == "path",
            )
            return scores

        return self.once(("estimate", key, state.method, state.metric, state.acts), estimate)

    def piece_of_map(self, state: State, piece: slice) -> Scores:
        """The sweep over some heads, those that the estimate takes for the most important first; the others are NaN."""
        pairs, key = (self.listed(), LISTED) if state.average else (self.pair(state.pair), key_of(state.pair))
        heads = self.estimated_map(state).top(self.shape[0] * self.shape[1], by="magnitude")[piece]
        if state.method == "path":
            runs = self.once(("runs", key), lambda: prepared(self.model, pairs), room=1)
            return sweep_heads(runs, Route(position=state.acts), metric=state.metric, senders=heads)
        kind: Outside = "counterfactual" if state.method == "activation" else state.method
        stand_in = self.replacement(kind, pairs, key)
        scores = ablate(self.model, pairs, stand_in, metric=state.metric, heads=heads, position=state.acts)
        if state.method == "activation":  # the same runs: the head's output on the corrupt prompt
            scores = replace(scores, unit=f"fall of {metric_named(state.metric).unit}, z patched")
        return scores

    def impact_estimates(self, pair: Pair, *, metric: str, position: Position) -> dict[Outside, Scores]:
        """What one gradient says of the ablation of every head, by each kind whose replacement is at hand (means over
        reference prompts take longer than the gradient)."""
        pairs = self.pair(pair)
        known = any(kept[0] == "mean" for kept in self._kept)
        kinds: list[Outside] = [kind for kind in self._outsides if kind != "mean" or known]
        stand_ins = [self.replacement(kind, pairs, key_of(pair)) for kind in kinds]
        measured = metric_named(metric)
        scores = estimated(self.model, pairs, stand_ins, metric=measured, position=position, direct=False)
        return dict(zip(kinds, scores, strict=True))

    def edge_estimates(self, pair: Pair, *, metric: str) -> Scores:
        """What one gradient says of every path between two heads (EAP): [sender receiver example]."""
        return attribute_edges(self.model, self.pair(pair), metric=metric)

    @property
    def _outsides(self) -> tuple[Outside, ...]:
        return ("zero", "counterfactual", "mean") if self.material.reference else ("zero", "counterfactual")

    def thumbnails(self, pair: Pair, layer: int, *, weighted: bool) -> Float[Tensor, "head query key"]:
        """Attention of all heads of a layer on the clean prompt, at most `THUMBNAIL` cells along a side."""
        heads = [Head(layer, index) for index in range(self.shape[1])]
        patterns = attention_patterns(self.model, self.pair(pair).clean[0], heads, value_weighted=weighted)
        tokens = patterns.weights.shape[-1]
        if tokens <= THUMBNAIL:
            return patterns.weights
        return torch.nn.functional.adaptive_max_pool2d(patterns.weights, THUMBNAIL)

    def joint(self, circuit: Circuit, role: str, outside: Outside, *, metric: str) -> dict[str, float]:
        """Fall of the metric on the evaluated prompts when the heads of one role are ablated together, and the sum of
        the falls when each is ablated alone; each head at its positions."""
        pairs, measured = self.evaluated(), metric_named(metric)
        stand_in = self.replacement(outside, pairs, EVALUATED)
        full, _ = self._ends(outside, pairs, EVALUATED)
        scope = circuit.where(lambda member: member.role == role).scope

        def fall(some: Mapping[Head, tuple[Position, ...]]) -> float:
            without = ablated_logits(self.model, pairs, some, stand_in)
            return float(
                (
                    measured(full, pairs.answers, pairs.distractors)
                    - measured(without, pairs.answers, pairs.distractors)
                ).mean()
            )

        return {
            "joint": fall(scope),
            "singly": sum(fall({head: where}) for head, where in scope.items()),
            "prompts": len(pairs),
        }

    def attention(self, pair: Pair, head: Head, *, weighted: bool) -> AttentionPatterns:
        """Where the head looks on the clean prompt."""
        return attention_patterns(self.model, self.pair(pair).clean[0], [head], value_weighted=weighted)

    def attribution(self, pair: Pair) -> LogitAttribution:
        """What every head and MLP writes straight to the logit difference."""
        return direct_logit_attribution(self.model, self.pair(pair))

    def impacts(self, pair: Pair, head: Head, *, metric: str, position: Position) -> dict[str, float | None]:
        """Fall of the metric when the head alone is ablated, by each kind of ablation that can be had."""
        pairs = self.pair(pair)
        return {
            kind: float(
                ablate(
                    self.model,
                    pairs,
                    self.replacement(kind, pairs, key_of(pair)),
                    metric=metric,
                    heads=[head],
                    position=position,
                ).at(head)[0]
            )
            for kind in self._outsides
        }

    def reads(self, pair: Pair, head: Head, *, metric: str) -> Scores:
        """Path effect of every head below on this head's q, k and v together: [layer head example]."""
        return self.once(
            ("reads", key_of(pair), head, metric), lambda: self._reads(pair, head, metric, COMPOSITIONS, None)
        )

    def reads_singly(self, pair: Pair, head: Head, *, metric: str, count: int) -> dict[Composition, Scores]:
        """The same through each input alone, of the heads whose effect through all together is largest."""
        senders = strongest(self.reads(pair, head, metric=metric), count)
        return {each: self._reads(pair, head, metric, (each,), senders) for each in COMPOSITIONS}

    def _reads(
        self, pair: Pair, head: Head, metric: str, inputs: Sequence[Composition], senders: Sequence[Head] | None
    ) -> Scores:
        into = [Receiver(head, each) for each in inputs]
        return path_patch(
            self.model,
            self.pair(pair),
            metric=metric,
            position="all",
            receivers=into,
            senders=senders,
        )

    def feeds(self, pair: Pair, head: Head, *, metric: str) -> Scores:
        """Path effect of this head on the logits and on the q, k, v of every head above: [sender receiver example]."""
        return exact_edges(self.model, self.pair(pair), metric=metric, senders=[head], freeze_mlps=False)

    def similarity(self, teacher: "Subject") -> Scores:
        """CKA of every head's output at the last token of the evaluated prompts with every head of the teacher:
        [student teacher]."""
        same = same_vocabulary(self.model.tokenizer, teacher.model.tokenizer)
        return all_head_similarity(
            self.model, teacher.model, replace(self.evaluated(), teacher=None if same else teacher.evaluated())
        )

    def report(self, circuit: Circuit, outside: Outside, *, random_circuits: int = 0) -> CircuitReport:
        """The circuit alone on the evaluated prompts."""
        return self._report(circuit, outside, self.evaluated(), EVALUATED, random_circuits)

    def report_on(self, pair: Pair, circuit: Circuit, outside: Outside) -> CircuitReport:
        """The circuit alone on the pair in view."""
        return self._report(circuit, outside, self.pair(pair), key_of(pair), 0)

    def _report(
        self, circuit: Circuit, outside: Outside, pairs: PromptPairs, key: Key | tuple[str, ...], random_circuits: int
    ) -> CircuitReport:
        stand_in, ends = self.replacement(outside, pairs, key), self._ends(outside, pairs, key)
        return evaluate_circuit(self.model, pairs, circuit, stand_in, random_circuits=random_circuits, ends=ends)

    def _ends(self, outside: Outside, pairs: PromptPairs, key: Key | tuple[str, ...]) -> Ends:
        stand_in = self.replacement(outside, pairs, key)
        return self.once(("ends", outside, key), lambda: circuit_ends(self.model, pairs, self.shape, stand_in))


def strongest(scores: Scores, count: int) -> list[Head]:
    """The heads of the largest |mean|."""
    return scores.top(count, by="magnitude")


def nearest_heads(similarity: Scores, head: Head, *, of: Side, count: int = 3) -> list[tuple[str, float]]:
    """The heads of the other model that are most alike this one, with their similarity."""
    scores = similarity.select(**{"teacher" if of == "teacher" else "student": str(head)})
    names, values = next(iter(scores.labels.values())), scores.values.nan_to_num(-torch.inf)
    best = values.topk(min(count, len(values)))
    return [(names[place], value) for place, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
