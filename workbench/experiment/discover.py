"""The first stage: ablation impacts, path effects and a circuit in each model on its own."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from workbench import storage
from workbench.circuits import curves, evaluation
from workbench.circuits.circuit import Circuit
from workbench.circuits.looks import attention_to_positions
from workbench.circuits.methods.base import Inquiry, search_by
from workbench.circuits.methods.registry import method_named
from workbench.circuits.search_result import CircuitSearch
from workbench.errors import InputError
from workbench.experiment.evaluate import evaluate
from workbench.experiment.origins import KEY
from workbench.experiment.run import Run
from workbench.models.hooked_model import HookedModel
from workbench.patching.ablation import ablation_profiles, plain_logits
from workbench.patching.attribution import exact_edges
from workbench.patching.execution import Execution
from workbench.patching.shared import shared_prefixes
from workbench.values.metrics import metric_named
from workbench.values.scores import Scores

log = logging.getLogger("workbench")


def discover(run: Run) -> dict[str, Circuit]:
    """Ablation impacts, path effects and a circuit in each model on its own; writes scores and circuits."""
    return {name: discover_one(run, name) for name in run.both()}


def discover_one(run: Run, name: str) -> Circuit:
    """The same in one of the models, `teacher` or `student`: what several processes share out."""
    run.prompts.require("reference", "discovery")
    with shared_prefixes(run.recipe.evaluation.shared_prefixes):
        return _discover(run, name, run.both()[name])


def _discover(run: Run, name: str, model: HookedModel) -> Circuit:
    if run.folder.circuit_file(name).exists():
        return run.circuit(name)
    prompts = run.read_by(model, run.prompts.discovery)
    accuracy = float(evaluation.correct(plain_logits(model, prompts), prompts).float().mean())
    log.info("%s: accuracy %.2f on %d discovery prompts; %d heads", name, accuracy, len(prompts), len(model.heads))
    search = _searched(run, name, model)
    circuit = search.circuit
    if not circuit.members:
        reasons, scores = "; ".join(search.notes), run.folder.path / "scores"
        raise InputError(f"{name}: no head is chosen; {reasons}. The scores of all heads are in {scores}.")
    _say(name, circuit, search.notes)
    storage.write_json(run.folder.search_file(name), search.to_json())
    _examine(run, name, model, search)
    _connect(run, name, model, circuit)
    attention_to_positions(model, prompts, circuit.members).save(run.folder.scores_file(name, "looks"))
    described = {**circuit.to_json(), KEY: run.circuit_origin(name)}
    storage.write_json(run.folder.circuit_file(name), described)  # last: it says that this stage is done
    return circuit


def say(run: Run, name: str) -> None:
    """What `discover_one` said where nobody heard it, of a model whose circuit is there."""
    search, examined = storage.read_json(run.folder.search_file(name)), run.folder.examined_file(name)
    _say(name, run.circuit(name), search.get("notes", ()))
    if examined.exists():
        report = evaluation.CircuitReport.from_json(storage.read_json(examined)["report"])
        log.info("%s: %s", name, report.line())


def _say(name: str, circuit: Circuit, notes: Sequence[str]) -> None:
    log.info(
        "%s: circuit of %d heads (%.0f %%): %s",
        name,
        len(circuit.heads),
        100 * circuit.fraction,
        "; ".join(f"{role}: {' '.join(map(str, heads))}" for role, heads in circuit.roles.items()),
    )
    for note in notes:
        log.info("%s: %s", name, note)


def _searched(run: Run, name: str, model: HookedModel) -> CircuitSearch:
    """The search by the recipe's method; what it finds on the way is written as it goes, and not computed again."""
    config = run.recipe.discovery
    if run.recipe.student is not None or config.method == "mean_ablation":
        profiles(run, name, model)  # matching reads them
    resumed = any(f"{name}-ablation-" not in file.name for file in (run.folder.path / "scores").glob(f"{name}-*"))
    start = time.perf_counter()
    search = search_by(method_named(config.method, config.options), inquiry_of(run, name, model))
    if not resumed:
        seconds, clock = search.seconds or {config.method: time.perf_counter() - start}, time.perf_counter()
        plain_logits(model, run.read_by(model, run.prompts.discovery))
        forward = time.perf_counter() - clock
        taken = ", ".join(f"{part} {each / forward:.0f}" for part, each in seconds.items())
        log.info("%s: searched in %.0f s; in plain forwards, up to stage: %s", name, max(seconds.values()), taken)
    return search


def inquiry_of(run: Run, name: str, model: HookedModel, *, keep: bool = True) -> Inquiry:
    """What a run asks of its method; `keep=False`: of another model in the place of one of its own, with no files."""
    config = run.recipe.discovery
    prompts = run.read_by(run.both()[name], run.prompts.discovery)
    return Inquiry(
        model=model,
        pairs=prompts,
        metric=metric_named(config.metric),
        config=config,
        stand_in=lambda some: run.stand_in(name, model, config.replacement, some),
        stages=run.prompts.stages,
        file_of=(lambda part: run.folder.scores_file(name, part)) if keep else None,
        impacts=(lambda: profiles(run, name, model)[config.metric]) if keep and config.replacement == "mean" else None,
    )


def _examine(run: Run, name: str, model: HookedModel, search: CircuitSearch) -> None:
    """The circuit on test prompts: its report, and where the recipe wants it faithfulness over the size of the ranking,
    beside random ones."""
    if run.recipe.data.pairs is not None and not run.prompts.has_test:
        return
    report, _ = evaluate(run, model, search.circuit)
    log.info("%s: %s", name, report.line())
    file = run.folder.examined_file(name)
    curve = _curve(run, model, search, file.with_suffix(".partial")) if run.recipe.evaluation.curve else None
    storage.write_json(file, {"report": report.to_json(), "curve": None if curve is None else curve.to_json()})
    file.with_suffix(".partial").unlink(missing_ok=True)
    if curve is None:
        return
    log.info(
        "%s: over all sizes, heads kept %s (%s ablation): CPR %.2f (random %.2f), CMD %.2f (random %.2f)",
        name,
        "at their own positions" if curve.scope == "positions" else "at all positions",
        curve.ablation,
        curve.cpr,
        curve.random_cpr[0],
        curve.cmd,
        curve.random_cmd[0],
    )


def _curve(run: Run, model: HookedModel, search: CircuitSearch, partial: Path) -> curves.FaithfulnessCurve:
    config = run.recipe.evaluation
    prompts = run.read_by(model, run.prompts.test).rows(slice(0, config.curve_prompts))
    own = config.scope == "positions" and config.curve_scope == "same"
    whole = curves.Faithfulness(
        model,
        prompts,
        run.outside(model, prompts),
        metric=run.recipe.discovery.metric,
        acting=search.acting if own else None,
        execution=Execution(file=partial),
    )
    return curves.faithfulness_curve(whole, search.ranking, random_rankings=config.random_circuits)


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
