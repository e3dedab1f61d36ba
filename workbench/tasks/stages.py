"""The stages of a task's circuit, apart from the task: a recipe can name its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from workbench.errors import InputError, nearest


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


def require_stages(stages: Sequence[Stage]) -> None:
    """Refuse stages that write into one that does not stand before them, and two of one name."""
    names: list[str] = []
    for stage in stages:
        if stage.name in names:
            raise InputError(f"there are two stages {stage.name!r}; give each a name of its own (key `stages`).")
        if stage.into is not None and stage.into not in names:
            known = nearest(stage.into, names) if names else "it is the first stage, which writes into the logits."
            raise InputError(
                f"stage {stage.name!r} writes into {stage.into!r}, which is no stage before it; {known} (key `stages`)"
            )
        names.append(stage.name)
