"""A teacher behind an OpenAI-compatible endpoint (vLLM, llama.cpp, SGLang, a hosted model): its answers and its largest
log-probabilities at the answer's token, as a training's teacher outputs.

One completion of one token a prompt, `POST URL/completions` with the prompt's token ids, `max_tokens: 1`,
`temperature: 0` and `logprobs: k`. The k log-probabilities that come back are the kept logits of `TopLogits`, and one
minus their mass is that of all others. An endpoint gives no activations: it labels and teaches by KL, and alignment
needs a teacher that is loaded.

The endpoint must serve a model of the prompts' tokenizer. Tokens are known by id where the server can say it (vLLM:
`return_tokens_as_token_ids`), else by their text; one whose text is not one token counts among the others.
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import storage
from workbench.distillation.top_logits import TopLogits
from workbench.errors import InputError
from workbench.patching.progress import progress_bar
from workbench.tasks.base import PromptPairs

ID = "token_id:"
LEAST_MASS = 1e-12
"""Of the others: what rounding leaves below it is no number that a logarithm takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a teacher answers, and how much of its distribution is asked for."""

    url: str
    """Up to the version: `http://localhost:8000/v1`."""
    model: str
    """As the server calls it."""
    top: int = 20
    """How many log-probabilities; vLLM allows 20 unless started with another `--max-logprobs`."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    timeout: float = 60.0
    """Seconds that a request may take."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"{self.url!r} is no address; give one such as http://localhost:8000/v1.")
        if self.top < 1:
            raise InputError("top counts the log-probabilities that are asked for; give 1 or more.")

    def completions(self, prompts: Sequence[Sequence[int]]) -> list[Mapping[str, float]]:
        """Token (id or text, as the server says it) -> log-probability, of the token after each prompt.

        Errors: `InputError` for a server that can't be reached, refuses, or gives no log-probabilities.
        """
        asked = {
            "model": self.model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self.top,
            "return_tokens_as_token_ids": True,
        }
        choices = sorted(self._answer(asked)["choices"], key=lambda choice: choice["index"])
        try:
            top = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
        except (KeyError, TypeError, IndexError):
            top = []
        if len(top) != len(prompts) or not all(isinstance(each, dict) and each for each in top):
            raise InputError(
                f"{self.url} gives no log-probabilities of {self.model}'s completions; use a server that does, such as "
                "vLLM."
            )
        return top

    def _answer(self, asked: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/completions", data=json.dumps(asked).encode(), headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            raise InputError(
                f"{self.url} refuses {self.model!r} with {self.top} log-probabilities ({error.code}: {said}); check "
                "the model's name, the key, and the server's limit of log-probabilities."
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.url} does not answer ({error}); check that the server runs, and its address."
            ) from None
        if not isinstance(answer, dict) or "choices" not in answer:
            raise InputError(f"{self.url} answers with no completions; give an OpenAI-compatible address (.../v1).")
        return answer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EndpointOutputs:
    """What an endpoint's teacher says of some prompts: `TeacherOutputs` without activations."""

    top: TopLogits
    fingerprint: str
    """Of the prompts, the model's name and all that it said."""

    @property
    def output_weights(self) -> dict[int, Float[Tensor, "head d_head d_model"]]:
        """None of an endpoint's."""
        return {}

    def __len__(self) -> int:
        return len(self.top.tokens)

    def logits_of(self, index: Int[Tensor, " rows"]) -> TopLogits:
        """The largest log-probabilities of some prompts."""
        return self.top.rows(index)

    def labels_of(self, index: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Answers of some prompts."""
        return self.top.tokens[index, 0].long()

    def rows(self, index: Int[Tensor, " rows"], names: Sequence[str]) -> dict[str, Tensor]:
        """Nothing. Errors: `InputError` for any activation."""
        if names:
            raise InputError("an endpoint gives no activations; align to a teacher that is loaded, or set weight 0.")
        return {}


def endpoint_outputs(
    endpoint: Endpoint,
    prompts: PromptPairs,
    tokenizer: Any,
    *,
    d_vocab: int,
    folder: Path | None = None,
    batch: int = 32,
) -> EndpointOutputs:
    """An endpoint's answers and largest log-probabilities on the clean prompts.

    `d_vocab`: of the student (`student.d_vocab`). `folder`: where each batch's answer is kept, so that an interrupted
    run goes on there, and nobody asks twice. Errors: `InputError` where the best token is none of the tokenizer's.
    """
    answers: list[Mapping[str, float]] = []
    for start in progress_bar(range(0, len(prompts), batch), desc="asking the teacher", unit="batch"):
        part = prompts.rows(slice(start, min(start + batch, len(prompts))))
        answers += _kept(endpoint, part, folder)
    rows = [_by_token(answer, tokenizer, d_vocab, endpoint) for answer in answers]
    width = min(endpoint.top, *map(len, rows))
    largest = [sorted(row.items(), key=lambda entry: -entry[1])[:width] for row in rows]
    rest = [math.log(max(1 - math.fsum(math.exp(value) for _, value in row), LEAST_MASS)) for row in largest]
    top = TopLogits(
        tokens=torch.tensor([[token for token, _ in row] for row in largest], dtype=torch.int),
        logits=torch.tensor([[value for _, value in row] for row in largest]),
        rest=torch.tensor(rest),
        d_vocab=d_vocab,
        temperature=1.0,
    )
    said = storage.digest(json.dumps(answers, sort_keys=True))
    return EndpointOutputs(top=top, fingerprint=storage.digest(endpoint.model, prompts.fingerprint(), said))


def _kept(endpoint: Endpoint, prompts: PromptPairs, folder: Path | None) -> list[Mapping[str, float]]:
    """The answers to some prompts, from the folder where they have been asked for before."""
    ids = [tokens[mask].tolist() for tokens, mask in zip(prompts.clean, prompts.mask, strict=True)]
    if folder is None:
        return endpoint.completions(ids)
    key = storage.digest(endpoint.url, endpoint.model, str(endpoint.top), json.dumps(ids))
    file = folder / f"{key[:32]}.json"
    if not file.exists():
        storage.write_json(file, endpoint.completions(ids))
    return storage.read_json(file)


def _by_token(answer: Mapping[str, float], tokenizer: Any, d_vocab: int, endpoint: Endpoint) -> dict[int, float]:
    """Log-probability by token id, of what is a token."""
    numbers = {name: _number(name, tokenizer) for name in answer}
    best = max(answer, key=lambda name: answer[name])
    number = numbers[best]
    if number is None or number >= d_vocab:
        raise InputError(
            f"{endpoint.model} answers {best!r}, which is no token of this vocabulary; serve a model with the prompts' "
            "tokenizer, by a server that says token ids (vLLM)."
        )
    return {number: answer[name] for name, number in numbers.items() if number is not None and number < d_vocab}


def _number(name: str, tokenizer: Any) -> int | None:
    if name.startswith(ID) and name.removeprefix(ID).isdecimal():
        return int(name.removeprefix(ID))
    ids = tokenizer.encode(name, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None
