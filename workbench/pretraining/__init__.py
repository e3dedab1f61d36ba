"""How the bundled models are made: lessons, one file for each family of tasks, a curriculum, pruning, and the bundles
themselves."""

from workbench.pretraining.entity_bundle import BundleConfig, pretrain, word_tokenizer

__all__ = ["BundleConfig", "pretrain", "word_tokenizer"]
