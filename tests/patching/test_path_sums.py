"""In an attention-only model with frozen normalisation the residual stream is a sum, and so path effects sum to the
total effect.

The model is an ordinary GPT-2 in float64 whose MLPs write nothing and whose position embeddings carry a ballast that
outweighs all else a thousand times: the norms divide by a constant, to six digits, whatever is patched.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import entity_pairs
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from workbench.models.hooked_model import Teacher
from workbench.models.sources import quiet
from workbench.patching.activation import activation_patch
from workbench.patching.path import PathPatcher, path_patch
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs
from workbench.values.refs import Composition, Embedding, Head, Receiver

LAYERS, HEADS, WIDTH, BALLAST = 2, 3, 48, 4
HEAVY = 2e3
EXACT = 1e-5
"""What the norms' divisors still move by, relative to the effect."""
COMPOSITIONS: tuple[Composition, ...] = ("q", "k", "v")


def write_model(folder: Path, *, heavy: float) -> Path:
    """Random attention; the last entries of the residual stream hold the ballast, which nothing reads or writes."""
    tokenizer = word_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    free = WIDTH - BALLAST
    with torch.random.fork_rng(), torch.no_grad(), quiet():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double()
        for name, parameter in model.named_parameters():
            silent, scale = ".mlp." in name or name.endswith("bias"), 0.5 if "wte" in name or "wpe" in name else 0.2
            parameter.copy_(torch.zeros_like(parameter) if silent else scale * torch.randn_like(parameter))
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight[:, free:] = 0
        model.transformer.wpe.weight[:, free:] = heavy * torch.tensor([1.0, -1.0, 1.0, -1.0])
        spread = max((BALLAST * heavy**2 / WIDTH) ** 0.5, 1.0)
        for norm in [
            model.transformer.ln_f,
            *(norm for block in model.transformer.h for norm in (block.ln_1, block.ln_2)),
        ]:
            norm.weight.fill_(spread)
        for block in model.transformer.h:
            block.attn.c_attn.weight[free:] = 0
            block.attn.c_proj.weight[:, free:] = 0
        model.lm_head.weight[:, free:] = 0
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Teacher]:
    """The size of the ballast -> a model."""
    return lambda heavy: Teacher.load(write_model(tmp_path_factory.mktemp("sum"), heavy=heavy), dtype="float64")


@pytest.fixture(scope="module")
def linear(write: Callable[[float], Teacher]) -> Teacher:
    """Frozen normalisation."""
    return write(HEAVY)


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    """Nine pairs."""
    return entity_pairs(scenes=3)


def direct_effects(model: Teacher, pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    """Sum of the direct effects of everything that writes, and corrupt minus clean: [batch d_vocab] each."""
    patcher = PathPatcher(model, pairs)
    assert patcher.engine == "replay"
    effects = [patcher.logits([sender]) - patcher.clean_logits for sender in (Embedding(), *model.heads)]
    return torch.stack(effects).sum(0), patcher.corrupt_logits - patcher.clean_logits


def test_direct_effects_sum_to_the_whole_difference_of_the_two_runs(linear, pairs):
    together, whole = direct_effects(linear, pairs)
    assert float(whole.abs().max()) > 1
    assert float((together - whole).abs().max()) < EXACT * float(whole.abs().max())


def test_with_live_normalisation_they_do_not(write, pairs):
    """The engine recomputes the norms: where nothing outweighs the patch, the sum misses by far more than rounding."""
    together, whole = direct_effects(write(0.0), pairs)
    assert float((together - whole).abs().max()) > 1e3 * EXACT * float(whole.abs().max())


@pytest.mark.parametrize("index", range(HEADS))
def test_a_heads_total_effect_is_the_sum_of_its_paths(linear, pairs, index):
    """Straight to the logits, and through each head of the layer above (its q, k and v together)."""
    sender, above = Head(0, index), [Head(1, other) for other in range(HEADS)]
    metric = {"metric": "logit_difference"}
    total = activation_patch(linear, pairs, "z", **metric).at(sender)
    direct = path_patch(linear, pairs, position="all", **metric).at(sender)
    through = [
        path_patch(
            linear,
            pairs,
            position="all",
            receivers=[Receiver(head, composition) for composition in COMPOSITIONS],
            **metric,
        ).at(sender)
        for head in above
    ]
    parts = torch.stack([direct, *through])
    assert float(parts.abs().amax(1).min()) > 1e3 * EXACT * float(total.abs().max()), "every path carries something"
    assert float((parts.sum(0) - total).abs().max()) < EXACT * float(total.abs().max())


def test_paths_into_q_k_and_v_alone_do_not_add_up(linear, pairs):
    """A head's pattern and values multiply: its three inputs have to be patched together."""
    metric = {"metric": "logit_difference"}
    alone = [
        path_patch(linear, pairs, position="all", receivers=[Receiver(Head(1, 0), c)], **metric).values[0].nan_to_num(0)
        for c in COMPOSITIONS
    ]
    together = (
        path_patch(linear, pairs, position="all", receivers=[Receiver(Head(1, 0), c) for c in COMPOSITIONS], **metric)
        .values[0]
        .nan_to_num(0)
    )
    assert float((torch.stack(alone).sum(0) - together).abs().max()) > 0.01 * float(together.nan_to_num(0).abs().max())
