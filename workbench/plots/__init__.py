"""Figures: a result -> a plotly figure, which is shown, changed or saved like any other.

    workbench.plots.heads(search.scores)
    workbench.plots.save_figure(figure, "heads.svg")

Each figure is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.plots.curves import faithfulness_figure as faithfulness
    from workbench.plots.export import save_figure, to_frame
    from workbench.plots.graph import circuit_graph
    from workbench.plots.head_maps import matches
    from workbench.plots.importance import heads
    from workbench.plots.lens import lens_curves
    from workbench.plots.lens import lens_figure as logit_lens
    from workbench.plots.logit_attribution import attribution_figure as direct_attribution
    from workbench.plots.looks import looks_figure as attention_to_positions
    from workbench.plots.losses import training
    from workbench.plots.matrices import cka_change
    from workbench.plots.operations import operations_figure as accuracy_by_count
    from workbench.plots.patterns import attention_maps as attention
    from workbench.plots.patterns import attention_text
    from workbench.plots.seeds import loss_bands as training_over_seeds
    from workbench.plots.seeds import seeds_chart as results_over_seeds
    from workbench.plots.similarity import cka_matrix
    from workbench.plots.similarity import impact_scatter as impacts
    from workbench.plots.table import results_chart as results
    from workbench.plots.theme import DARK, LIGHT, Theme

_HOMES = {
    "DARK": ("theme", "DARK"),
    "LIGHT": ("theme", "LIGHT"),
    "Theme": ("theme", "Theme"),
    "accuracy_by_count": ("operations", "operations_figure"),
    "attention": ("patterns", "attention_maps"),
    "attention_text": ("patterns", "attention_text"),
    "attention_to_positions": ("looks", "looks_figure"),
    "circuit_graph": ("graph", "circuit_graph"),
    "cka_change": ("matrices", "cka_change"),
    "cka_matrix": ("similarity", "cka_matrix"),
    "direct_attribution": ("logit_attribution", "attribution_figure"),
    "faithfulness": ("curves", "faithfulness_figure"),
    "heads": ("importance", "heads"),
    "impacts": ("similarity", "impact_scatter"),
    "lens_curves": ("lens", "lens_curves"),
    "logit_lens": ("lens", "lens_figure"),
    "matches": ("head_maps", "matches"),
    "results": ("table", "results_chart"),
    "results_over_seeds": ("seeds", "seeds_chart"),
    "save_figure": ("export", "save_figure"),
    "to_frame": ("export", "to_frame"),
    "training": ("losses", "training"),
    "training_over_seeds": ("seeds", "loss_bands"),
}
"""Public name -> the module that holds it, and its name there."""
__all__ = [
    "DARK",
    "LIGHT",
    "Theme",
    "accuracy_by_count",
    "attention",
    "attention_text",
    "attention_to_positions",
    "circuit_graph",
    "cka_change",
    "cka_matrix",
    "direct_attribution",
    "faithfulness",
    "heads",
    "impacts",
    "lens_curves",
    "logit_lens",
    "matches",
    "results",
    "results_over_seeds",
    "save_figure",
    "to_frame",
    "training",
    "training_over_seeds",
]


def __getattr__(name: str) -> Any:
    """A figure, imported when it is asked for. Errors: `AttributeError` with the nearest known name."""
    if name not in _HOMES:
        from workbench.errors import nearest

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {nearest(name, _HOMES)}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
