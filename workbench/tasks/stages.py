"""The stages of a task's circuit, apart from the task: a recipe can name its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A group of heads in a backward search: where its heads act and whose input they write to.

    `into=None` means the logits; otherwise `composition` says which input (q, k or v) of the heads of group `into`
    receives.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    title: str = ""
    position: str
    into: str | None = None
    composition: Literal["q", "k", "v"] | None = None

    def __post_init__(self) -> None:
        if (self.into is None) != (self.composition is None):
            raise InputError(
                f"stage {self.name!r}: `into` and `composition` go together (both, or neither for the logits)."
            )
