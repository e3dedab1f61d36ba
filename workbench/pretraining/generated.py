"""Rows of text that a model writes itself, for `workbench finetune` (its `rows`): what heals a pruned student without a
look at the task's answers.

Each row begins with a prompt of the task's train split, cut off at a random token (at none, it begins with the prompt
whole; at the first, with nothing but what begins every text), and goes on with what the model draws. Every batch of
rows is a function of (seed, number of the batch) alone, so an interrupted run goes on to the same rows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench import seeds, storage
from workbench.errors import InputError
from workbench.models import sources
from workbench.models.devices import require_device
from workbench.patching.progress import progress_bar
from workbench.pretraining.config import GenerationConfig
from workbench.storage.provenance import provenance
from workbench.tasks.registry import task_named


def generate(config: GenerationConfig, target: Path) -> Path:
    """Write the rows to `target` (JSONL, the columns prompt and answer), and what made them to `target.json`.

    Rows that are there already stay, and the rest is added. Errors: `InputError` when they were made with other
    settings, or when the model can't be loaded.
    """
    made, about = target.with_name(f"{target.name}.json"), config.described()
    if target.exists() and not made.exists():
        raise InputError(f"{target} is there, and nothing says how it was made; choose another --out.")
    if made.exists() and storage.read_json(made).get("generation") != json.loads(json.dumps(about)):
        raise InputError(f"{target} holds rows that were made with other settings ({made}); choose another --out.")
    storage.write_json(made, {"generation": about, **provenance()})
    lines = target.read_text(encoding="utf-8").splitlines() if target.exists() else []
    done = len(lines) // config.batch
    lines = lines[: config.rows if len(lines) >= config.rows else done * config.batch]
    with progress_bar(total=config.rows, initial=len(lines), desc="generating", unit="row") as bar:
        for rows in _batches(config, done) if len(lines) < config.rows else ():
            rows = rows[: config.rows - len(lines)]
            lines += [json.dumps(row) for row in rows]
            storage.write_text(target, "".join(line + "\n" for line in lines))
            bar.update(len(rows))
    return target


def _batches(config: GenerationConfig, done: int) -> Iterator[list[dict[str, str]]]:
    """Batch after batch of rows, without those that are done."""
    require_device(config.device)
    source = sources.open_source(config.model, dtype=getattr(torch, config.dtype))
    model, tokenizer = source.model.to(config.device), source.tokenizer
    pairs = list(
        task_named(config.task, config.options).pairs(tokenizer, split="train", scenes=config.rows, seed=config.seed)
    )
    for number in range(done, -(-config.rows // config.batch)):
        draw = seeds.chooser(config.seed, "beginnings", number)
        prompts = [_beginning(tokenizer, draw.choice(pairs).clean, draw) for _ in range(config.batch)]
        with seeds.local(config.seed, "generated", number, device=config.device):
            tokens = _continued(model, tokenizer, prompts, config)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        yield [
            {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "answer": text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def _beginning(tokenizer: Any, text: str, draw: Any) -> list[int]:
    """The first tokens of a prompt, so many as are drawn; none is what begins every text."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = tokens[: draw.randint(0, len(tokens))]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return kept or [tokens[0] if start is None else start]


@torch.no_grad()
def _continued(
    model: Any, tokenizer: Any, prompts: list[list[int]], config: GenerationConfig
) -> Int[Tensor, "row token"]:
    """What the model draws after each prompt, padded on the left so that all go on at once."""
    longest = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padding = 0 if padding is None else padding
    tokens = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=config.device)
    there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    whole = model.generate(
        tokens,
        attention_mask=there.to(config.device),
        do_sample=config.temperature > 0,
        **({"temperature": config.temperature, "top_k": 0, "top_p": 1.0} if config.temperature > 0 else {}),
        max_new_tokens=config.tokens,
        pad_token_id=padding,
    )
    return whole[:, longest:].cpu()
