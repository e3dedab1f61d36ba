"""Words for how a model is run, for settings that are read before any model room is loaded."""

from typing import Literal

Attention = Literal["eager", "sdpa"]
"""Step by step, with a hook on each, or in one kernel (`workbench.models.fused`)."""
