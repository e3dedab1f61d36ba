"""Path patching against a slow, obvious reference: plain `transformers` models, torch hooks on their own modules, no
TransformerLens.

The reference runs one unpadded prompt at a time. Clean and corrupt runs record z, the input of the attention's output
projection. A frozen run on the clean prompt has every head's z fixed: the senders' to corrupt at the sender position,
all else to clean (MLPs are live). The receivers' q, k or v of that run (outputs of the projections, before rotary) are
put into another clean run, at the receiver position; its logits count.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from miniatures import FAMILIES, miniature
from torch import Tensor
from transformers import AutoModelForCausalLM

from workbench.models.hooked_model import Teacher
from workbench.models.sources import quiet
from workbench.patching.path import PathPatcher, path_patch
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs, encode, to_dataset
from workbench.tasks.entity_tracking import EntityTracking
from workbench.values.metrics import log_probability
from workbench.values.refs import Head, Receiver

POST_NORM: dict[str, dict[str, Any]] = {
    "Gemma2": FAMILIES["Gemma2"],  # by replay: norms after attention and MLP, soft caps on scores and logits
    "Olmo2": {},  # through hooks: queries of all heads normed together
}
"""A norm stands between attention and the residual stream."""
ARCHITECTURES = ("llama-mha", "llama", "llama-mqa", "gpt2", "neox", *POST_NORM)
TOLERANCE, NORMED_TOLERANCE, SINGLE_TOLERANCE = 5e-7, 2e-6, 1e-5
"""In float64 (transformers' rotary angles and softmax are float32 all the same), there with norms in float32 (Gemma and
OLMo 2), and in float32; logits count as a share of the largest one."""
RECEIVING = (Head(1, 2), Head(2, 1))
PATHS: dict[str, Any] = {
    "logits": (None, ("last", "all"), ("all", "all")),
    "queries": ("q", ("last", "last"), ("all", "all")),
    "keys": ("k", ("all", "labels"), ("last", "all")),
    "values": ("v", ("all", "all"), ("last", "last")),
}
"""Name -> the receivers' input, and two choices of (sender position, receiver position)."""
JOINT_SENDERS = {"left": [Head(0, index) for index in range(4)], "right": [Head(0, 0), Head(1, 1)]}
"""Padding side -> senders that are patched together."""
SWEPT = {
    "llama-mha": ["logits"],
    "llama": ["keys", "values"],
    "llama-mqa": ["keys"],
    "gpt2": ["queries"],
    "neox": ["values"],
    "Gemma2": ["logits"],
}
"""Architecture -> the paths for which every head is measured on its own."""

Site = tuple[int, str]
"""A layer and "z", "q", "k" or "v"."""
Changes = dict[Site, dict[tuple[int, int], Tensor]]
"""Site -> (a token's index, a head's; of k and v: a key-value head's) -> the new value [d_head]."""


class Plain:
    """A `transformers` model with hooks on the modules through which its heads' z, q, k and v pass."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        with quiet():
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        self.kind = self.model.config.model_type
        self.n_heads = self.model.config.num_attention_heads
        self.d_head = getattr(self.model.config, "head_dim", None) or self.model.config.hidden_size // self.n_heads
        self.separate = self.kind not in ("gpt2", "gpt_neox")
        if self.separate:
            self.attention = [block.self_attn for block in self.model.model.layers]
        elif self.kind == "gpt2":
            self.attention = [block.attn for block in self.model.transformer.h]
        else:
            self.attention = [block.attention for block in self.model.gpt_neox.layers]

    def kv_head(self, head: Head) -> int:
        """The first key-value head serves the first group of query heads, and so on."""
        return head.index * getattr(self.model.config, "num_key_value_heads", self.n_heads) // self.n_heads

    @torch.no_grad()
    def run(self, tokens: Tensor, changes: Changes) -> tuple[Tensor, dict[Site, Tensor]]:
        """Final logits of one unpadded prompt and every site's values [pos head d_head], some of them changed."""
        seen: dict[Site, Tensor] = {}

        def through(layer: int, name: str, value: Tensor) -> Tensor:
            heads = value.clone()
            for (token, head), new in changes.get((layer, name), {}).items():
                heads[0, token, head] = new
            seen[layer, name] = heads[0]
            return heads

        handles = [handle for layer in range(len(self.attention)) for handle in self._hooks(layer, through)]
        try:
            logits = self.model(tokens[None], use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits[0, -1], seen

    def _hooks(self, layer: int, through: Callable[[int, str, Tensor], Tensor]) -> list[Any]:
        attention, split = self.attention[layer], lambda value: value.unflatten(-1, (-1, self.d_head))

        def z(module: Any, inputs: Any) -> tuple[Tensor]:
            return (through(layer, "z", split(inputs[0])).flatten(2),)

        def gpt2(module: Any, inputs: Any, output: Tensor) -> Tensor:  # all queries, all keys, all values
            return torch.cat(
                [
                    through(layer, name, split(part)).flatten(2)
                    for name, part in zip("qkv", output.chunk(3, -1), strict=True)
                ],
                -1,
            )

        def neox(module: Any, inputs: Any, output: Tensor) -> Tensor:  # query, key and value of head 0, of head 1, ...
            parts = output.unflatten(-1, (self.n_heads, 3, self.d_head)).unbind(3)
            return torch.stack(
                [through(layer, name, part) for name, part in zip("qkv", parts, strict=True)], 3
            ).flatten(2)

        def projection(name: str) -> Callable[..., Tensor]:
            return lambda module, inputs, output: through(layer, name, split(output)).flatten(2)

        if self.separate:
            separate = [getattr(attention, f"{name}_proj").register_forward_hook(projection(name)) for name in "qkv"]
            return [attention.o_proj.register_forward_pre_hook(z), *separate]
        if self.kind == "gpt2":
            return [attention.c_proj.register_forward_pre_hook(z), attention.c_attn.register_forward_hook(gpt2)]
        return [attention.dense.register_forward_pre_hook(z), attention.query_key_value.register_forward_hook(neox)]


class PlainPatcher:
    """The reference on one prompt pair."""

    def __init__(self, plain: Plain, pairs: PromptPairs, row: int) -> None:
        self.plain, self.pairs, self.row = plain, pairs, row
        self.tokens = pairs.clean[row][pairs.mask[row]]
        self.clean_logits, self.clean = plain.run(self.tokens, {})
        self.corrupt_logits, self.corrupt = plain.run(pairs.corrupt[row][pairs.mask[row]], {})

    def indices(self, position: str) -> list[int]:
        """The tokens of a named position, counted without padding."""
        return self.pairs.position(position)[self.row][self.pairs.mask[self.row]].nonzero().flatten().tolist()

    def logits(
        self, senders: Sequence[Head], position: str, receivers: Sequence[Receiver], receiver_position: str
    ) -> Tensor:
        """Path-patched final logits."""
        patched = self.indices(position)
        frozen: Changes = {(layer, "z"): {} for layer in range(len(self.plain.attention))}
        for layer, name in frozen:
            for token in range(len(self.tokens)):
                for head in range(self.plain.n_heads):
                    source = self.corrupt if Head(layer, head) in senders and token in patched else self.clean
                    frozen[layer, name][token, head] = source[layer, name][token, head]
        logits, received = self.plain.run(self.tokens, frozen)
        if not receivers:
            return logits
        changes: Changes = {}
        for receiver in receivers:
            layer, name = receiver.head.layer, receiver.composition
            head = receiver.head.index if name == "q" else self.plain.kv_head(receiver.head)
            for token in self.indices(receiver_position):
                changes.setdefault((layer, name), {})[token, head] = received[layer, name][token, head]
        return self.plain.run(self.tokens, changes)[0]


def uneven_pairs(padding_side: Literal["left", "right"]) -> PromptPairs:
    """Two prompts of 3 boxes and one of 4, in one padded batch."""
    tokenizer = word_tokenizer()
    pairs = [
        pair
        for boxes in (3, 4)
        for pair in list(EntityTracking(boxes=boxes).pairs(tokenizer, split="test", scenes=1, seed=boxes))[: 5 - boxes]
    ]
    return encode(to_dataset(enumerate(pairs), tokenizer, source="3 and 4 boxes"), tokenizer, padding_side=padding_side)


class Subject:
    """The same weights twice: hooked by the workbench on padded batches, and plain on one prompt at a time."""

    def __init__(self, architecture: str, folder: Path, dtype: Literal["float32", "float64"]) -> None:
        self.architecture = architecture
        self.tolerance = NORMED_TOLERANCE if architecture in POST_NORM else TOLERANCE
        # unchecked: eager attention of transformers gives NaN on padding in float64, which the self-check would take
        # for a difference
        self.teacher = Teacher.load(folder, dtype=dtype, check=False)
        self.pairs = {"left": uneven_pairs("left"), "right": uneven_pairs("right")}
        self.patchers = {side: PathPatcher(self.teacher, pairs) for side, pairs in self.pairs.items()}
        plain = Plain(folder, getattr(torch, dtype))
        self.rows = [PlainPatcher(plain, self.pairs["left"], row) for row in range(len(self.pairs["left"]))]
        self.clean = torch.stack([row.clean_logits for row in self.rows])
        self.corrupt = torch.stack([row.corrupt_logits for row in self.rows])

    def reference(
        self, senders: Sequence[Head], position: str, receivers: Sequence[Receiver], receiver_position: str
    ) -> Tensor:
        """Path-patched final logits of every prompt."""
        return torch.stack([row.logits(senders, position, receivers, receiver_position) for row in self.rows])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(
    request: pytest.FixtureRequest, model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    """Each architecture in float64."""
    name = request.param
    normed = name in POST_NORM
    folder = miniature(name, POST_NORM[name], tmp_path_factory.mktemp(name)) if normed else model_folder(name)
    return Subject(name, folder, "float64")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def single_precision(request: pytest.FixtureRequest, model_folder: Callable[..., Path]) -> Subject:
    """Two architectures in float32."""
    return Subject(request.param, model_folder(request.param), "float32")


def assert_same(found: Tensor, expected: Tensor, unpatched: Tensor, *, tolerance: float, scale: float = 1.0) -> None:
    """Equal on every prompt, where every prompt's effect is at least 100 times what is tolerated."""
    assert float((found - expected).abs().max()) <= tolerance * scale
    effects = (expected - unpatched).abs().flatten(1).amax(1)
    assert float(effects.min()) >= 100 * tolerance * scale, (
        "the patch hardly does anything, so this comparison proves nothing"
    )


def receivers_of(path: str) -> list[Receiver]:
    composition = PATHS[path][0]
    return [Receiver(head, composition) for head in RECEIVING] if composition else []


def test_the_replay_takes_norms_after_attention_and_leaves_the_rest_to_hooks(subject):
    engines = {"Olmo2": "hooks"}
    assert subject.patchers["left"].engine == engines.get(subject.architecture, "replay")


def test_the_clean_and_corrupt_runs_are_the_plain_models(subject):
    scale = float(subject.clean.abs().max())
    for patcher in subject.patchers.values():
        assert_same(patcher.clean_logits, subject.clean, subject.corrupt, tolerance=subject.tolerance, scale=scale)
        assert_same(patcher.corrupt_logits, subject.corrupt, subject.clean, tolerance=subject.tolerance, scale=scale)


@pytest.mark.parametrize("path", PATHS)
def test_patched_logits_equal_the_reference_on_left_and_right_padded_prompts(subject, path):
    receivers = receivers_of(path)
    for (side, senders), (position, there) in zip(JOINT_SENDERS.items(), PATHS[path][1:], strict=True):
        found = subject.patchers[side].logits(senders, position, receivers=receivers, receiver_position=there)
        expected = subject.reference(senders, position, receivers, there)
        assert_same(found, expected, subject.clean, tolerance=subject.tolerance, scale=float(subject.clean.abs().max()))


@pytest.mark.parametrize("path", ["logits", "values"])
def test_patched_logits_equal_the_reference_in_single_precision(single_precision, path):
    subject, receivers, (position, there) = single_precision, receivers_of(path), PATHS[path][1]
    for side, senders in JOINT_SENDERS.items():
        found = subject.patchers[side].logits(senders, position, receivers=receivers, receiver_position=there)
        expected = subject.reference(senders, position, receivers, there)
        assert_same(found, expected, subject.clean, tolerance=SINGLE_TOLERANCE, scale=float(subject.clean.abs().max()))


def test_path_patch_scores_every_head_as_the_reference(subject):
    """Log-probability of the answer, clean minus patched, per prompt, for each head that lies below a receiver, on its
    own."""
    pairs, (answers, distractors) = (
        subject.pairs["left"],
        (subject.pairs["left"].answers, subject.pairs["left"].distractors),
    )
    clean = log_probability(subject.clean, answers, distractors)
    for path in SWEPT.get(subject.architecture, []):
        receivers, (position, there) = receivers_of(path), PATHS[path][1]
        scores = path_patch(
            subject.teacher,
            pairs,
            metric="log_probability",
            position=position,
            receivers=receivers,
            receiver_position=there,
        )
        senders = [
            head
            for head in subject.teacher.heads
            if not receivers or head.layer < max(receiver.head.layer for receiver in receivers)
        ]
        assert sorted(scores.ranked()) == senders, "a head without a path is NaN, every other one is measured"
        for head in senders:
            expected = clean - log_probability(
                subject.reference([head], position, receivers, there), answers, distractors
            )
            assert float((scores.at(head) - expected).abs().max()) <= 2 * subject.tolerance
        effects = scores.values.abs().mean(-1).nan_to_num(0).flatten()
        assert float(effects[effects > 0].median()) >= 200 * subject.tolerance


def test_the_reference_tells_live_mlps_from_frozen_ones(subject):
    """Teeth: a path patch that leaves the MLPs at clean is another number."""
    senders, position = JOINT_SENDERS["left"], "last"
    frozen = subject.patchers["left"].logits(senders, position, freeze_mlps=True)
    difference = (frozen - subject.reference(senders, position, [], "all")).abs().amax(-1)
    assert float(difference.min()) >= 100 * subject.tolerance * float(subject.clean.abs().max())
