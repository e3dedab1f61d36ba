"""How a change of the metric is counted, apart from the sweeps: settings name it without loading them."""

from typing import Literal

Effect = Literal["difference", "relative"]
"""clean - patched, or (clean - patched) / clean (Prakash's score for probabilities, with its sign turned)."""
