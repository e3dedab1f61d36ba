"""`workbench check-model` on miniatures of the families it should know, with random weights; the rest is refused with
the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from workbench.cli import main
from workbench.errors import InputError
from workbench.models.sources import quiet
from workbench.patching import conformance
from workbench.patching.conformance import check_model
from workbench.patching.path import PathPatcher
from workbench.pretraining import word_tokenizer

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WIDE_HEADS: dict[str, Any] = {"head_dim": 16}
SUPPORTED: dict[str, dict[str, Any]] = {
    "Llama": {"rope_scaling": LLAMA_3, "rope_theta": 5e5},
    "Mistral": {},
    "Qwen2": {},  # biases on q, k and v
    "Qwen3": WIDE_HEADS,  # a norm on every query and key
    "Gemma": WIDE_HEADS,
    "Phi": {"num_key_value_heads": 4},  # parallel blocks, rotary on a part of the head
    "Phi3": {},  # q, k and v in one matrix
    "Olmo": {},  # norms without weights
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "GPTNeoX": {"num_key_value_heads": 4},  # parallel blocks
}
WINDOW: dict[str, Any] = {"sliding_window": 4}
REFUSED: dict[str, dict[str, Any]] = {
    "Gemma2": {**WIDE_HEADS, **WINDOW},
    "Gemma3Text": {**WIDE_HEADS, **WINDOW},
    "Olmo2": {},
}
"""A norm stands between their attention and the residual stream, so that heads' outputs do not add up in it."""


def miniature(family: str, settings: dict[str, Any], folder: Path) -> Path:
    """Three layers of a family's own config class, grouped-query attention where it has any."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": None,
    }
    chosen = {**({} if family == "GPT2" else sizes), **settings}
    tokenizer = word_tokenizer()
    special: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**chosen, **special)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_known_family_passes_and_is_fast(family, tmp_path):
    found = check_model(miniature(family, SUPPORTED[family], tmp_path / family))
    assert found.passed, found.text()
    assert found.engine == "replay"
    assert len(found.checks) == 6
    assert all(check.effect > 100 * check.difference for check in found.checks)


@pytest.mark.parametrize("family", ["Mistral", "Phi3"])
def test_a_sliding_window_is_exact_through_hooks(family, tmp_path):
    """The replay knows no windows: it notices that it does not agree, and leaves the patching to hooked forwards."""
    found = check_model(miniature(family, WINDOW, tmp_path / family))
    assert found.passed, found.text()
    assert found.engine == "hooks"


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_with_norms_after_attention_is_refused_with_the_reason(family, tmp_path):
    with pytest.raises(InputError, match="a norm stands between its attention and the residual stream"):
        check_model(miniature(family, REFUSED[family], tmp_path / family))


def test_the_command_says_what_is_supported(model_folder: Callable[..., Path], capsys):
    assert main(["check-model", str(model_folder("neox"))]) == 0
    shown = capsys.readouterr().out
    assert "parallel blocks" in shown
    assert "replay, exact and fast" in shown
    assert shown.count("  ok: ") == 6


def test_a_model_that_is_patched_wrongly_fails(model_folder: Callable[..., Path], monkeypatch, capsys):
    """The checks have teeth: an engine that is off by a thousandth of the effect is caught."""
    right = PathPatcher.logits
    monkeypatch.setattr(PathPatcher, "logits", lambda self, *given, **named: right(self, *given, **named) + 1e-3)
    found = conformance.check_model(model_folder("llama"))
    assert not any(check.passed for check in found.checks)
    assert main(["check-model", str(model_folder("llama"))]) == 2
    assert "not supported exactly" in capsys.readouterr().err
