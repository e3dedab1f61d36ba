"""The settings of how a prompt is put to a model, apart from what does it (`workbench.tasks.prompts`)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from workbench.errors import InputError

Chat = Literal["none", "user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """How prompts are put to a model."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    prepend_bos: bool = False
    padding_side: Literal["left", "right"] = "left"
    chat: Chat = "none"
    """Put prompts into the tokenizer's chat template: as the user's message, or as the beginning of the reply to
    `instruction`."""
    system: str | None = None
    """The system message; None leaves it to the template, which may have one of its own."""
    instruction: str | None = None
    """With `chat: assistant`, the user's message."""
    multi_token: bool = False
    """Let answers have several tokens: metrics score the first, `workbench.tasks.scoring` the whole."""

    def __post_init__(self) -> None:
        if (self.chat == "assistant") != (self.instruction is not None):
            raise InputError(
                "`chat: assistant` and `instruction` go together: the prompt goes on a reply to that instruction."
            )
        if self.system is not None and self.chat == "none":
            raise InputError("a system message needs a chat template; set `chat` to user or assistant.")
