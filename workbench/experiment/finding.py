"""The first stage: ablation impacts, path effects and a circuit in each model on its own."""

import logging
import time
from collections.abc import Sequence

from workbench import storage
from workbench.circuits import curves, discovery, evaluation
from workbench.circuits.circuit import Circuit
from workbench.circuits.looks import attention_to_positions
from workbench.experiment.setting import Setting
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablation_profiles, plain_logits
from workbench.patching.attribution import exact_edges
from workbench.patching.execution import Execution
from workbench.values.refs import Head
from workbench.values.scores import Scores

log = logging.getLogger("workbench")


class Finding(Setting):
    """A recipe whose circuits can be found."""

    def discover(self) -> dict[str, Circuit]:
        """Ablation impacts, path effects and a circuit in each model on its own; writes scores and circuits."""
        return {name: self._discover(name, model) for name, model in self.models().items()}

    def _discover(self, name: str, model: HookedModel) -> Circuit:
        if self.folder.circuit_file(name).exists():
            return self.folder.circuit(name)
        prompts = self.read_by(model, self.prompts.discovery)
        accuracy = float(evaluation.correct(plain_logits(model, prompts), prompts).float().mean())
        log.info("%s: accuracy %.2f on %d discovery prompts; %d heads", name, accuracy, len(prompts), len(model.heads))
        if self.recipe.discovery.method == "mean_ablation":
            profile = self._profiles(name, model)[self.recipe.discovery.metric]
            circuit, ranking = discovery.top_by_ablation(profile, self.recipe.discovery), profile.ranked()
        else:
            if self.recipe.student is not None:
                self._profiles(name, model)
            circuit, ranking = self._searched(name, model)
        log.info(
            "%s: circuit of %d heads (%.0f %%): %s",
            name,
            len(circuit.heads),
            100 * circuit.fraction,
            "; ".join(f"{role}: {' '.join(map(str, heads))}" for role, heads in circuit.roles.items()),
        )
        self._examine(name, model, circuit, ranking)
        self._connect(name, model, circuit)
        if circuit.members:
            attention_to_positions(model, prompts, circuit.members).save(self.folder.scores_file(name, "looks"))
        storage.write_json(self.folder.circuit_file(name), circuit.to_json())  # last: it says that this stage is done
        return circuit

    def _searched(self, name: str, model: HookedModel) -> tuple[Circuit, list[Head]]:
        """The backward search; each stage's scores are written as soon as they are there, and not computed again."""
        prompts = self.read_by(model, self.prompts.discovery)
        files = {stage.name: self.folder.scores_file(name, f"path-{stage.name}") for stage in self.prompts.stages}
        resumed = any((self.folder.path / "scores").glob(f"{name}-path-*"))
        found = discovery.backward_search(model, prompts, self.prompts.stages, self.recipe.discovery, files=files)
        if not resumed:
            start = time.perf_counter()
            plain_logits(model, prompts)
            forward = time.perf_counter() - start
            taken = ", ".join(f"{stage} {seconds / forward:.0f}" for stage, seconds in found.seconds.items())
            log.info(
                "%s: searched in %.0f s; in plain forwards, up to stage: %s", name, max(found.seconds.values()), taken
            )
        return found.circuit, discovery.ranking(found.scores)

    def _examine(self, name: str, model: HookedModel, circuit: Circuit, ranking: Sequence[Head]) -> None:
        """The circuit on test prompts: its report, and faithfulness over the size of the ranking, beside random
        ones."""
        if not self.recipe.evaluation.curve or (self.recipe.data.pairs is not None and not self.prompts.has_test):
            return
        metric, file = self.recipe.discovery.metric, self.folder.examined_file(name)
        report, _ = self.evaluate(model, circuit)
        partial = file.with_suffix(".partial")
        whole = curves.Faithfulness(
            model,
            self.read_by(model, self.prompts.test),
            self.outside(model),
            metric=metric,
            execution=Execution(file=partial),
        )
        curve = curves.faithfulness_curve(whole, ranking, random_rankings=self.recipe.evaluation.random_circuits)
        storage.write_json(file, {"report": report.to_json(), "curve": curve.to_json()})
        partial.unlink(missing_ok=True)
        log.info(
            "%s: circuit alone %.3f of %.3f accuracy (random circuits %.3f); CPR %.2f (random %.2f), CMD %.2f (random "
            "%.2f)",
            name,
            report.circuit_accuracy,
            report.full_accuracy,
            report.random_circuit_accuracy,
            curve.cpr,
            curve.random_cpr[0],
            curve.cmd,
            curve.random_cmd[0],
        )

    def _connect(self, name: str, model: HookedModel, circuit: Circuit) -> None:
        """Exact path effects of the circuit's heads on each other and on the logits, where the recipe wants them."""
        if self.recipe.evaluation.edges and circuit.heads:
            prompts, metric = (
                self.read_by(model, self.prompts.discovery).rows(slice(0, self.recipe.evaluation.edges)),
                self.recipe.discovery.metric,
            )
            execution = Execution(file=self.folder.scores_file(name, "edges"))
            exact_edges(model, prompts, metric=metric, senders=circuit.heads, execution=execution)

    def _profiles(self, name: str, model: HookedModel) -> dict[str, Scores]:
        wanted = sorted({self.recipe.matching.metric, self.recipe.discovery.metric, "accuracy", "log_probability"})
        files = {metric: self.folder.scores_file(name, f"ablation-{metric}") for metric in wanted}
        return ablation_profiles(
            model, self.read_by(model, self.prompts.discovery), self.means(model), metrics=wanted, files=files
        )
