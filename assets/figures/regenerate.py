"""Draw the gallery anew from the bundled models and the committed results: `make figures`."""

import os
import runpy
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from plotly import graph_objects as go

from workbench.circuits.circuit import Circuit
from workbench.circuits.discovery import DiscoveryConfig, backward_search
from workbench.matching import MatchingConfig, match_heads
from workbench.matching.aligned_pairs import AlignedPair, aligned_pairs
from workbench.matching.head_similarity import head_similarity
from workbench.matching.pair_cka import PairCka, pair_ckas
from workbench.models.hooked_model import HookedModel, Teacher
from workbench.patching.ablation import ablation_profiles, reference_means
from workbench.patching.attribution import exact_edges
from workbench.plots.export import save_figure
from workbench.plots.graph import circuit_graph
from workbench.plots.lens import lens_curves, lens_figure
from workbench.plots.logit_attribution import attribution_figure
from workbench.plots.patterns import attention_maps, attention_text
from workbench.plots.similarity import cka_matrix, impact_scatter
from workbench.plots.theme import DARK, LIGHT, Theme
from workbench.readouts.logit_attribution import direct_logit_attribution
from workbench.readouts.logit_lens import lens_scores, logit_lens
from workbench.readouts.patterns import attention_patterns
from workbench.tasks.base import PromptPairs, Stage, encode, task_dataset
from workbench.tasks.entity_tracking import EntityTracking
from workbench.values.metrics import METRICS

HERE = Path(__file__).parent
STAGES = (
    Stage(name="A", title="value fetcher", position="last"),
    Stage(name="B", title="position transmitter", position="last", into="A", composition="q"),
    Stage(name="K", title="label reader", position="earlier_label", into="A", composition="k"),
    Stage(name="V", title="object binder", position="earlier_label", into="A", composition="v"),
)
METRIC = METRICS["logit_difference"]
COMMITTED = ("circuit", "attention", "logit_attribution", "logit_lens", "cka_matrix", "impacts")
NARROW = DiscoveryConfig(metric="logit_difference", heads=8, confidence=0.8)


class Scene:
    """Everything that the gallery draws, measured once: both bundled models on entity tracking with seven boxes."""

    def __init__(self) -> None:
        self.teacher, self.student = (Teacher.load(name) for name in ("teacher", "student"))
        self.pairs = self._prompts("calibration", 4, 0)
        self.circuits = {name: self._circuit(model) for name, model in self.models.items()}
        means = {
            name: reference_means(model, self._prompts("calibration", 8, 1)) for name, model in self.models.items()
        }
        metrics = {"logit_difference": METRIC}
        self.impacts = {
            name: ablation_profiles(model, self.pairs, means[name], metrics=metrics)["logit_difference"]
            for name, model in self.models.items()
        }
        student, teacher = self.circuits["student"], self.circuits["teacher"]
        similar = head_similarity(self.student, self.teacher, self.pairs, student, teacher)
        config = MatchingConfig(rule="similarity", one_to_one=len(student.heads) <= len(teacher.heads))
        self.head_map = match_heads(
            self.impacts["student"], self.impacts["teacher"], student, teacher, config, similarity=similar
        )

    @property
    def models(self) -> dict[str, HookedModel]:
        return {"teacher": self.teacher, "student": self.student}

    def _prompts(self, split: str, scenes: int, seed: int) -> PromptPairs:
        rows = task_dataset(EntityTracking(boxes=7), self.teacher.tokenizer, split=split, scenes=scenes, seed=seed)  # pyright: ignore[reportArgumentType]
        return encode(rows, self.teacher.tokenizer)

    def _circuit(self, model: HookedModel) -> Circuit:
        return backward_search(model, self.pairs, STAGES, NARROW).circuit

    def all_ckas(self) -> list[PairCka]:
        """CKA of every circuit head with every one of the other model, at the last token."""
        heads = product(self.circuits["student"].heads, self.circuits["teacher"].heads)
        pairs = [
            AlignedPair(student=a, teacher=b, student_positions=("last",), teacher_positions=("last",))
            for a, b in heads
        ]
        return pair_ckas(self.student, self.teacher, self.pairs, pairs)

    def matched_ckas(self) -> list[PairCka]:
        """CKA of the matched pairs, each where its heads act."""
        aligned = aligned_pairs(self.head_map, self.circuits["student"], self.circuits["teacher"], self.pairs)
        return pair_ckas(self.student, self.teacher, self.pairs, aligned)


def drawn(scene: Scene, theme: Theme) -> Iterator[tuple[str, go.Figure]]:
    """Name and figure of the whole gallery."""
    circuit, prompt = scene.circuits["teacher"], scene.pairs.clean[0][scene.pairs.mask[0]]
    fetchers = circuit.roles["A"][::-1]
    few = scene.pairs.rows(slice(0, 14))
    edges = exact_edges(scene.teacher, few, metric=METRIC, senders=circuit.heads)
    yield "circuit", circuit_graph(circuit, edges, theme=theme, title="The teacher's circuit for entity tracking")
    yield (
        "attention",
        attention_text(attention_patterns(scene.teacher, prompt, fetchers[:3], value_weighted=True), theme=theme),
    )
    yield "attention_maps", attention_maps(attention_patterns(scene.teacher, prompt, fetchers[:4]), theme=theme)
    yield "logit_attribution", attribution_figure(direct_logit_attribution(scene.teacher, scene.pairs), theme=theme)
    yield "logit_lens", lens_figure(logit_lens(scene.teacher, prompt, int(scene.pairs.answers[0])), theme=theme)
    curves = {name: lens_scores(model, scene.pairs, metric="probability") for name, model in scene.models.items()}
    yield "lens_curves", lens_curves(curves, theme=theme)
    yield "cka_matrix", cka_matrix(scene.all_ckas(), head_map=scene.head_map, theme=theme)
    impacts = {"student": scene.impacts["student"], "teacher": scene.impacts["teacher"]}
    yield "impacts", impact_scatter(scene.head_map, student_circuit=scene.circuits["student"], theme=theme, **impacts)


def _shrink(path: Path) -> None:
    """256 colours are enough for a figure and halve its file."""
    Image.open(path).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)


def example() -> go.Figure:
    """What the README's first lines draw."""
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)  # they write a page
        try:
            return runpy.run_path(str(HERE.parents[1] / "docs/examples/heat_map.py"))["figure"]
        finally:
            os.chdir(before)


def main(folder: Path, theme: Theme) -> None:
    """Write every picture into a folder (the repository's own holds those of `COMMITTED`), and that of the README's
    first lines."""
    _shrink(save_figure(example(), folder / "heat_map.png", scale=2))
    for name, figure in drawn(Scene(), theme):
        if folder != HERE or name in COMMITTED:
            _shrink(save_figure(figure, folder / f"{name}.png", scale=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE, DARK if "dark" in sys.argv[2:] else LIGHT)
