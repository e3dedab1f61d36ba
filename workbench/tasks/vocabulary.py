"""The words of all installed tasks, and a word-level tokenizer made of words: what a small model for a mixture of tasks
is trained with."""

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from workbench.errors import InputError
from workbench.models import sources
from workbench.tasks.registry import GROUP

SPECIAL = ("<pad>", "<unk>", "<bos>")


def mixture_words(names: Iterable[str] | None = None) -> tuple[str, ...]:
    """The distinct words of some installed tasks (default: all that declare their `words`), sorted."""
    points = [point for point in entry_points(group=GROUP) if names is None or point.name in set(names)]
    return tuple(sorted({word for point in points for word in getattr(point.load(), "words", ())}))


def word_level_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each word or mark, in the order given after <pad>, <unk> and <bos>; text is cut at white space and
    punctuation."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", padding_side="left"
    )


def tokenizer_of(source: str) -> Any:
    """The tokenizer of a local directory, a GGUF file or a hub id. Errors: `InputError` when there is none."""
    directory = sources.local_directory(source)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source} holds no tokenizer ({error}); save one beside the model (tokenizer.save_pretrained)."
        ) from None
