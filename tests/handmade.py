"""Ordinary GPT-2 directories whose weights are written by hand, for models whose circuit is known because somebody made
it.

Everything that is not written is zero. A constant ballast in every position embedding dominates the norm, so LayerNorm
is the identity to within a few percent; every embedding and every write should have mean 0.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from scipy.linalg import hadamard
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from workbench.models.sources import quiet
from workbench.pretraining import word_tokenizer

BLOCK = 16
"""Entries of a code."""
HEAVY = 30.0
"""Size of the ballast; a code has entries of size 1."""
FIRST, SECOND = torch.cat([torch.ones(8), torch.zeros(8)]), torch.cat([torch.zeros(8), torch.ones(8)])
"""Which part of a code a head copies."""


def code(index: int) -> Tensor:
    """A balanced code of 16 signs: two of 14 rows (7 of a Hadamard matrix and their negatives), so that different
    tokens match by half at most."""
    rows = torch.tensor(hadamard(8)[1:], dtype=torch.float32)
    rows = torch.cat([rows, -rows])
    return torch.cat([rows[index % 14], rows[(index // 14 + index) % 14]])


def write_gpt2(
    folder: Path,
    fill: Callable[[GPT2LMHeadModel, Mapping[str, int]], None],
    *,
    layers: int,
    heads: int,
    width: int,
    ballast: slice,
    length: int,
) -> Path:
    """A directory with a GPT-2 of zeros but for what `fill(model, vocabulary)` writes, the ballast and the norms; the
    word-level tokenizer."""
    tokenizer = word_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(), torch.no_grad(), quiet():
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            parameter.zero_()
        fill(model, tokenizer.get_vocab())
        model.transformer.wpe.weight[:length, ballast] = HEAVY * torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
        usual = (BLOCK * HEAVY**2 + BLOCK) ** 0.5
        for norm in [
            model.transformer.ln_f,
            *(norm for block in model.transformer.h for norm in (block.ln_1, block.ln_2)),
        ]:
            norm.weight.fill_(usual / width**0.5)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
