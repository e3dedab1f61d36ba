"""A workbench for circuit discovery and circuit distillation (arXiv 2509.25002) on TransformerLens."""

__version__ = "0.1.0"
