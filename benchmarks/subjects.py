"""Random models and prompts of the sizes that the benchmarks name."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, PretrainedConfig

from workbench import seeds
from workbench.models.hooked_model import Teacher
from workbench.models.sources import quiet
from workbench.pretraining import word_tokenizer
from workbench.tasks.base import PromptPairs, encode, task_dataset
from workbench.tasks.entity_tracking import EntityTracking

VOCABULARY = 1000
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def llama(
    *, layers: int, heads: int, kv_heads: int, d_model: int, d_head: int, vocabulary: int = VOCABULARY
) -> Teacher:
    """A random Llama-style model with an MLP of four times its width (Mistral's class: Llama's config ties d_head to
    d_model)."""
    return _saved(
        MistralConfig(
            vocab_size=vocabulary,
            hidden_size=d_model,
            intermediate_size=4 * d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=d_head,
            max_position_embeddings=256,
            initializer_range=0.06,
            **IDS,
        )
    )


def gpt2(*, layers: int, heads: int, d_model: int) -> Teacher:
    """A random GPT-2-style model."""
    return _saved(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=d_model,
            n_layer=layers,
            n_head=heads,
            n_positions=256,
            initializer_range=0.06,
            **IDS,
        )
    )


def _saved(config: PretrainedConfig) -> Teacher:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        return Teacher.load(Path(folder))


def random_pairs(prompts: int, length: int) -> PromptPairs:
    """Pairs of random tokens."""
    draw = seeds.generator(0, "benchmark prompts")
    clean, corrupt = (torch.randint(3, VOCABULARY, (prompts, length), generator=draw) for _ in range(2))
    mask = torch.ones(prompts, length, dtype=torch.bool)
    last = torch.zeros_like(mask)
    last[:, -1] = True
    answers = torch.randint(3, VOCABULARY // 2, (prompts,), generator=draw)
    return PromptPairs(
        clean=clean,
        corrupt=corrupt,
        mask=mask,
        answers=answers,
        distractors=answers + VOCABULARY // 2,
        positions={"last": last, "all": mask},
    )


def entity_pairs(prompts: int) -> PromptPairs:
    """Entity tracking with 7 boxes."""
    tokenizer = word_tokenizer()
    rows = task_dataset(EntityTracking(boxes=7), tokenizer, split="calibration", scenes=-(-prompts // 7), seed=0)
    return encode(rows, tokenizer).rows(slice(0, prompts))
