"""The first stage: ablation impacts, path effects and a circuit in each model on its own."""

import logging
import time
from collections.abc import Sequence

from workbench import storage
from workbench.circuits import curves, discovery, evaluation
from workbench.circuits.circuit import Circuit
from workbench.circuits.looks import attention_to_positions
from workbench.errors import InputError
from workbench.experiment.evaluate import evaluate
from workbench.experiment.origins import KEY
from workbench.experiment.run import Run
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablation_profiles, plain_logits
from workbench.patching.attribution import exact_edges
from workbench.patching.execution import Execution
from workbench.values.refs import Head
from workbench.values.scores import Scores

log = logging.getLogger("workbench")


def discover(run: Run) -> dict[str, Circuit]:
    """Ablation impacts, path effects and a circuit in each model on its own; writes scores and circuits."""
    run.prompts.require("reference", "discovery")
    return {name: _discover(run, name, model) for name, model in run.both().items()}


def _discover(run: Run, name: str, model: HookedModel) -> Circuit:
    if run.folder.circuit_file(name).exists():
        return run.circuit(name)
    prompts = run.read_by(model, run.prompts.discovery)
    accuracy = float(evaluation.correct(plain_logits(model, prompts), prompts).float().mean())
    log.info("%s: accuracy %.2f on %d discovery prompts; %d heads", name, accuracy, len(prompts), len(model.heads))
    if run.recipe.discovery.method == "mean_ablation":
        profile = profiles(run, name, model)[run.recipe.discovery.metric]
        circuit, ranking = discovery.top_by_ablation(profile, run.recipe.discovery), profile.ranked()
        groups = ["ablation"]
    else:
        if run.recipe.student is not None:
            profiles(run, name, model)
        circuit, ranking = _searched(run, name, model)
        groups = [stage.name for stage in run.prompts.stages]
    _explain_size(run, name, circuit, groups)
    log.info(
        "%s: circuit of %d heads (%.0f %%): %s",
        name,
        len(circuit.heads),
        100 * circuit.fraction,
        "; ".join(f"{role}: {' '.join(map(str, heads))}" for role, heads in circuit.roles.items()),
    )
    _examine(run, name, model, circuit, ranking)
    _connect(run, name, model, circuit)
    attention_to_positions(model, prompts, circuit.members).save(run.folder.scores_file(name, "looks"))
    found = {**circuit.to_json(), KEY: run.circuit_origin(name)}
    storage.write_json(run.folder.circuit_file(name), found)  # last: it says that this stage is done
    return circuit


def _explain_size(run: Run, name: str, circuit: Circuit, groups: Sequence[str]) -> None:
    """Say why a circuit is smaller than asked for. Errors: `InputError` for an empty one, which nothing can be matched
    with; its scores stay in the folder."""
    reason = discovery.explained_size(circuit, groups, run.recipe.discovery)
    if not circuit.members:
        raise InputError(
            f"{name}: no head is chosen, {reason}. The scores of all heads are in {run.folder.path}/scores."
        )
    if reason is not None:
        log.info("%s: %s", name, reason)


def _searched(run: Run, name: str, model: HookedModel) -> tuple[Circuit, list[Head]]:
    """The backward search; each stage's scores are written as soon as they are there, and not computed again."""
    prompts = run.read_by(model, run.prompts.discovery)
    files = {stage.name: run.folder.scores_file(name, f"path-{stage.name}") for stage in run.prompts.stages}
    resumed = any((run.folder.path / "scores").glob(f"{name}-path-*"))
    found = discovery.backward_search(model, prompts, run.prompts.stages, run.recipe.discovery, files=files)
    if not resumed:
        start = time.perf_counter()
        plain_logits(model, prompts)
        forward = time.perf_counter() - start
        taken = ", ".join(f"{stage} {seconds / forward:.0f}" for stage, seconds in found.seconds.items())
        log.info("%s: searched in %.0f s; in plain forwards, up to stage: %s", name, max(found.seconds.values()), taken)
    return found.circuit, discovery.ranking(found.scores)


def _examine(run: Run, name: str, model: HookedModel, circuit: Circuit, ranking: Sequence[Head]) -> None:
    """The circuit on test prompts: its report, and faithfulness over the size of the ranking, beside random
    ones."""
    if not run.recipe.evaluation.curve or (run.recipe.data.pairs is not None and not run.prompts.has_test):
        return
    metric, file = run.recipe.discovery.metric, run.folder.examined_file(name)
    report, _ = evaluate(run, model, circuit)
    partial = file.with_suffix(".partial")
    whole = curves.Faithfulness(
        model,
        run.read_by(model, run.prompts.test),
        run.outside(model),
        metric=metric,
        execution=Execution(file=partial),
    )
    curve = curves.faithfulness_curve(whole, ranking, random_rankings=run.recipe.evaluation.random_circuits)
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


def _connect(run: Run, name: str, model: HookedModel, circuit: Circuit) -> None:
    """Exact path effects of the circuit's heads on each other and on the logits, where the recipe wants them."""
    if run.recipe.evaluation.edges and circuit.heads:
        prompts, metric = (
            run.read_by(model, run.prompts.discovery).rows(slice(0, run.recipe.evaluation.edges)),
            run.recipe.discovery.metric,
        )
        execution = Execution(file=run.folder.scores_file(name, "edges"))
        exact_edges(model, prompts, metric=metric, senders=circuit.heads, execution=execution)


def profiles(run: Run, name: str, model: HookedModel) -> dict[str, Scores]:
    """Ablation impacts of every head on the discovery prompts, in each metric that a later stage asks for."""
    wanted = sorted({run.recipe.matching.metric, run.recipe.discovery.metric, "accuracy", "log_probability"})
    files = {metric: run.folder.scores_file(name, f"ablation-{metric}") for metric in wanted}
    prompts = run.read_by(model, run.prompts.discovery)
    return ablation_profiles(model, prompts, run.means(model), metrics=wanted, files=files)
