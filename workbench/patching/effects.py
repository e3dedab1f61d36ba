"""How a change of the metric is counted, apart from the sweeps: settings name it without loading them."""

from typing import Literal

Effect = Literal["difference", "relative"]
"""patched - clean, or (patched - clean) / clean (Prakash's score for probabilities)."""
