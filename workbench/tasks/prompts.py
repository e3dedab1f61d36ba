"""How a prompt is put to a model: chat template, BOS, padding, answers of several tokens. All explicit, all off by
default.

A chat template wraps both prompts of a pair in the same turns, so that prompts of equal length stay so, and the named
positions move along:
- `user`: the prompt is the user's message and the answer begins the reply, without the space before it (many words are
  several byte-pair tokens
  then: set `multi_token`);
- `assistant`: the user's message is `instruction`, the reply begins with the prompt, and the answer goes on from it.
Templates that write a BOS themselves are refused together with `prepend_bos`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from datasets import Dataset

from workbench.errors import InputError
from workbench.tasks.base import Pair, PromptPairs, encode, to_dataset
from workbench.tasks.positions import named_positions
from workbench.tasks.records import RowError
from workbench.tasks.settings import PromptConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings(PromptConfig):
    """Settings at work: pairs -> a checked dataset -> tensors."""

    def dataset(
        self,
        pairs: Iterable[tuple[int, Pair]],
        tokenizer: Any,
        *,
        source: str,
        problems: list[RowError] | None = None,
        skip_bad_rows: bool = False,
    ) -> Dataset:
        """Numbered pairs -> a checked dataset, wrapped in the chat template where one is set. `problems` and
        `skip_bad_rows`: as in `to_dataset`."""
        bad = [] if problems is None else problems
        return to_dataset(
            self.wrapped(pairs, tokenizer, problems=bad),
            tokenizer,
            source=source,
            multi_token=self.multi_token,
            problems=bad,
            skip_bad_rows=skip_bad_rows,
        )

    def encode(self, dataset: Dataset, tokenizer: Any) -> PromptPairs:
        """A dataset made with these settings -> tensors."""
        return encode(
            dataset,
            tokenizer,
            padding_side=self.padding_side,
            prepend_bos=self.prepend_bos,
            multi_token=self.multi_token,
        )

    def wrapped(
        self, pairs: Iterable[tuple[int, Pair]], tokenizer: Any, *, problems: list[RowError] | None = None
    ) -> list[tuple[int, Pair]]:
        """The pairs in the chat template; rows that it can't take go to `problems`, where that is given. Errors:
        `InputError` for a tokenizer without one, or a template that changes the prompt."""
        if self.chat == "none":
            return list(pairs)
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "this tokenizer has no chat template; set `chat` to none, or use an instruct model's tokenizer."
            )
        rows = []
        for number, pair in pairs:
            try:
                rows.append((number, self._wrap(number, pair, tokenizer)))
            except RowError as problem:
                if problems is None:
                    raise
                problems.append(problem)
        return rows

    def _wrap(self, number: int, pair: Pair, tokenizer: Any) -> Pair:
        clean, start = self._turns(number, pair.clean, tokenizer)
        corrupt, other = self._turns(number, pair.corrupt, tokenizer)
        answers: dict[str, Any] = {name: getattr(pair, name) for name in ("answer", "distractor", "corrupt_answer")}
        if self.chat == "user":
            answers = {name: None if word is None else word.lstrip() for name, word in answers.items()}
            several = {name: getattr(pair, name) for name in ("more_answers", "more_distractors")}
            answers |= {name: tuple(word.lstrip() for word in words) for name, words in several.items()}
        positions = _moved(number, pair, tokenizer, start)
        moved = None if pair.corrupt_positions is None else _moved(number, pair, tokenizer, other, "corrupt")
        return replace(pair, clean=clean, corrupt=corrupt, positions=positions, corrupt_positions=moved, **answers)

    def _turns(self, number: int, prompt: str, tokenizer: Any) -> tuple[str, int]:
        """The text of all turns, and the character where the prompt begins."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        if self.chat == "user":
            messages += [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            messages += [{"role": "user", "content": self.instruction}, {"role": "assistant", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        start = text.rfind(prompt)
        if start < 0:
            raise RowError(
                number,
                f"the chat template changes the prompt {prompt!r} (does it begin or end with white space?); reword it.",
            )
        if self.prepend_bos and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            raise InputError("this chat template writes the BOS token itself; set `prepend_bos` to false.")
        return text, start


def _moved(
    number: int, pair: Pair, tokenizer: Any, start: int, side: Literal["clean", "corrupt"] = "clean"
) -> dict[str, Any]:
    """The named positions of one of the bare prompts as characters of the wrapped one."""
    text, column = (pair.clean, "positions") if side == "clean" else (pair.corrupt, "corrupt_positions")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    try:
        places = named_positions(pair, offsets, side)
    except InputError as error:
        raise RowError(number, str(error), column) from None
    moved = {name: [offsets[index] for index in tokens] for name, tokens in places.items()}
    return {
        name: tuple((start + _visible(text, *span), start + span[1]) for span in spans) for name, spans in moved.items()
    }


def _visible(text: str, start: int, end: int) -> int:
    """Where a token's text begins, without the space that some tokenizers count to it (the template may put that into
    another token)."""
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()) if piece.strip() else start
