"""What each command does: recipe -> one call -> run folder. Whatever is heavy is imported inside its command."""

import argparse
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.experiment.recipe import Recipe
    from workbench.experiment.run import Run
    from workbench.pretraining.config import FinetuningConfig
    from workbench.study.config import StudyConfig

log = logging.getLogger("workbench")


def check_recipe(options: argparse.Namespace) -> None:
    """Refuse a bad recipe before a model room is loaded."""
    _recipe(options)


def check_study(options: argparse.Namespace) -> None:
    """Refuse a bad study before a model room is loaded."""
    _study_config(options)


def check_plan(options: argparse.Namespace) -> None:
    """Refuse a bad recipe or study before a model room is loaded."""
    from workbench.experiment.recipe import read_yaml

    (_study_config if "students" in read_yaml(options.recipe) else _recipe)(options)


def check_finetuning(options: argparse.Namespace) -> None:
    """Refuse a bad recipe of a fine-tuning before a model room is loaded."""
    _finetuning_config(options)


def _recipe(options: argparse.Namespace) -> "Recipe":
    from workbench.experiment.recipe import read_recipe

    return read_recipe(options.recipe, overrides={**_overrides(options.set), **_placement(options)})


def _study_config(options: argparse.Namespace) -> "StudyConfig":
    from workbench.study.config import read_study

    placement = {f"overrides.{key}": value for key, value in _placement(options).items()}
    return read_study(options.recipe, overrides={**_overrides(options.set), **placement})


def _finetuning_config(options: argparse.Namespace) -> "FinetuningConfig":
    from workbench.experiment.recipe import parse_config, read_yaml
    from workbench.pretraining.config import FinetuningConfig

    placement = _placement(options)
    if placement.get("dtype", "float32") not in ("float32", "float64"):
        raise InputError(
            f"--dtype {placement['dtype']}: weights are trained in float32 (or float64); for forwards in half "
            "precision use --set precision=bf16."
        )
    return parse_config(FinetuningConfig, read_yaml(options.recipe), overrides={**_overrides(options.set), **placement})


def _placement(options: argparse.Namespace) -> dict[str, Any]:
    """`--device`, `--dtype` and `--skip-bad-rows` as keys of a recipe, where they are given."""
    placed = {key: value for key in ("device", "dtype") if (value := getattr(options, key, None)) is not None}
    return {**placed, "data.skip_bad_rows": True} if getattr(options, "skip_bad_rows", False) else placed


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings; values are YAML."""
    from workbench.storage.yaml import yaml_value

    given = _pairs(pairs, "--set", "training.steps=20")
    return {key: yaml_value(value, where=f"--set {key}") for key, value in given.items()}


def _pairs(pairs: Sequence[str], option: str, example: str = "NAME=DIRECTORY") -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"{option} {pair!r} is not KEY=VALUE; write for example {option} {example}")
    return dict(pair.split("=", 1) for pair in pairs)


def _begun(options: argparse.Namespace) -> "Run":
    recipe = _recipe(options)
    from workbench.experiment.run import Run
    from workbench.experiment.runs import RunFolder
    from workbench.models.devices import require_device

    require_device(recipe.device)
    run = Run(recipe, RunFolder(options.out))
    run.begin(resume=options.resume)
    return run


def recipes(options: argparse.Namespace) -> None:
    """The bundled recipes."""
    from workbench.experiment.recipe import bundled_recipes

    takers = {
        "run": "demo, discover, match, distill, evaluate, plan",
        "study": "study, plan",
        "finetuning": "finetune",
    }
    for kind, commands in takers.items():
        print(f"{kind}  (workbench {commands})")
        for each in bundled_recipes():
            if each.kind == kind:
                print(f"  {each.name:24} {each.title}")


def completion(options: argparse.Namespace) -> None:
    """A shell's completion script. Errors: `InputError` where the package that writes it is not installed."""
    from workbench.cli.parser import parser

    try:
        import shtab
    except ImportError:
        raise InputError(
            'completion scripts are written by shtab: pip install "circuit-distillation-workbench[completion]".'
        ) from None
    print(shtab.complete(parser(), options.shell))


def demo(options: argparse.Namespace) -> None:
    """Everything, then the table and the report."""
    evaluate(options)
    report(options)


def discover(options: argparse.Namespace) -> None:
    """Circuits."""
    from workbench.experiment.discover import discover as discover_circuits
    from workbench.experiment.preflight import preflight

    run = _begun(options)
    preflight(run)
    discover_circuits(run)
    report(options)


def match(options: argparse.Namespace) -> None:
    """Circuits and the head map, and whether alignment is likely to help."""
    from workbench.experiment.match import match as match_circuits
    from workbench.study.diagnostic import BUNDLED, forecast_of

    run = _begun(options)
    match_circuits(run)
    report(options)
    task = run.recipe.data.named_task
    forecast = forecast_of(options.out, options.against, task=task)
    if forecast is not None:
        print(forecast.text())
    elif options.against is None and task not in BUNDLED:
        print(
            f"Whether alignment will help is not forecast: no study of {task or 'these pairs'} comes with the "
            "workbench. Give the folder of one with --against."
        )


def distill(options: argparse.Namespace) -> None:
    """One condition, trained and evaluated."""
    from workbench.distillation.processes import launched
    from workbench.experiment.arms import run_conditions
    from workbench.experiment.results import table

    run = _begun(options)
    results = run_conditions(run, [(options.condition, options.seed)], resume=options.resume)
    if launched(run.recipe.device).is_main:
        print(table(results))


def evaluate(options: argparse.Namespace) -> None:
    """All conditions and seeds."""
    from workbench.experiment.arms import run_recipe
    from workbench.experiment.pool import number_of_workers
    from workbench.experiment.results import table

    run = _begun(options)
    workers = number_of_workers(options.workers, run.recipe.device)
    print("\n" + table(run_recipe(run, resume=options.resume, workers=workers)))


def study(options: argparse.Namespace) -> None:
    """A study, then its summary and page; `report` writes those of the cells that are finished while it runs."""
    from workbench.experiment.pool import number_of_workers
    from workbench.models.devices import require_device
    from workbench.study.grid import Study
    from workbench.study.launch import run_in_processes, run_on_ray

    if options.launcher == "ray" and options.workers == "auto":
        raise InputError("Ray counts its cores itself: leave --workers out, or give a number of processes.")
    running = Study(_study_config(options), options.out)
    require_device(running.recipe.device)
    workers = number_of_workers(options.workers, running.recipe.device)
    running.begin(resume=options.resume)
    if options.launcher == "ray":
        run_on_ray(running, workers=workers)
    elif workers is not None:
        run_in_processes(running, workers)
    else:
        running.run()
    report(options)


def plan(options: argparse.Namespace) -> None:
    """What a recipe costs, without loading a weight."""
    from workbench.experiment.recipe import read_yaml
    from workbench.plan.road import plan_of
    from workbench.storage import located

    is_study = "students" in read_yaml(options.recipe)
    placed = {f"overrides.{key}" if is_study else key: value for key, value in _placement(options).items()}
    forecast = plan_of(
        options.recipe,
        overrides={**_overrides(options.set), **placed},
        configs={name: located(place) for name, place in _pairs(options.config, "--config").items()},
        tokenizer=options.tokenizer,
        flops=options.flops,
        utilisation=options.utilisation,
    )
    print(json.dumps(forecast.to_json(), indent=2) if options.json else forecast.text())


def report(options: argparse.Namespace) -> None:
    """The page of a run folder."""
    from workbench import storage
    from workbench.experiment.runs import RunFolder
    from workbench.report.run import run_report
    from workbench.report.study import study_report

    page = options.out / "report.html"
    if (options.out / "study.json").exists():
        from workbench.study.grid import opened_study
        from workbench.study.summary import summarise, text

        print("\n" + text(summarise(opened_study(options.out))))
        storage.write_text(page, study_report(options.out))
    else:
        storage.write_text(page, run_report(RunFolder(options.out)))
    log.info("report: %s", page)


def check_model(options: argparse.Namespace) -> None:
    """What is supported of a model, or of several: then all are said before the first that is refused is an error."""
    from workbench.experiment.pool import Pool, number_of_workers
    from workbench.models.devices import require_device

    require_device(options.device)
    workers = number_of_workers(options.workers, options.device) or 1
    how = {name: getattr(options, name) for name in ("device", "dtype", "quantisation", "device_map")}
    jobs = [(model, how) for model in options.model]
    faults: list[str] = []

    def tell(number: int, said: tuple[str, str]) -> None:
        text, fault = said
        print(text or f"{jobs[number][0]}: refused, {fault}" if len(jobs) > 1 else text, flush=True)
        faults.extend([fault] if fault else [])

    if workers > 1 and len(jobs) > 1:
        Pool(workers=workers, unit="model", what="models", device=options.device).run(_checked, jobs, tell)
    else:
        for number, job in enumerate(jobs):
            tell(number, _checked(*job))
    if len(jobs) > 1 and faults:
        raise InputError(
            f"{len(faults)} of {len(jobs)} models are not supported exactly; see above. First: {faults[0]}"
        )
    if faults:
        raise InputError(faults[0])


def _checked(model: str, how: Mapping[str, Any]) -> tuple[str, str]:
    """What is said of a model, and why it is refused (empty where it is not); in a worker, where there are some."""
    from workbench.patching import conformance

    text = ""
    try:
        supported = conformance.check_model(model, **how)
        text = supported.text()
        conformance.require_conformance(supported)
    except InputError as error:
        return text, str(error)
    return text, ""


def explore(options: argparse.Namespace) -> None:
    """The explorer's page."""
    from workbench.explorer import command
    from workbench.models.devices import require_device

    require_device(options.device)
    command.explore(options, _overrides(options.set), tell=functools.partial(print, flush=True))


def pretrain_models(options: argparse.Namespace) -> None:
    """The bundled models."""
    from workbench.experiment.recipe import parse_config
    from workbench.pretraining import BundleConfig, pretrain
    from workbench.pretraining.entity_bundle import THIN
    from workbench.pretraining.mixture import report_table
    from workbench.pretraining.mixture_bundle import MixtureConfig, pretrain_mixture

    if options.bundle == "mixture":
        mixture = parse_config(MixtureConfig, {}, overrides=_overrides(options.set))
        print(report_table(pretrain_mixture(mixture, options.out, options.work)).to_string(index=False))
        return
    own = THIN if options.bundle == "thin" else {}
    config = parse_config(BundleConfig, own, overrides=_overrides(options.set))
    for name, accuracy in pretrain(config, options.out, options.work).items():
        print(f"{name}: accuracy {accuracy:.3f} on 7 boxes, held-out test scenes")


def finetune_model(options: argparse.Namespace) -> None:
    """A model fine-tuned on a task."""
    from workbench.pretraining.finetuning import finetune

    config = _finetuning_config(options)
    training = finetune(config, options.out, options.work or options.out.with_name(f"{options.out.name}-work"))
    where = f"test scenes of {config.task}" if config.rows is None else f"test rows of {config.rows}"
    print(
        f"{options.out}: accuracy {training['test_accuracy']:.3f} on held-out {where} after {training['steps']} steps"
    )
    if options.push_to_hub is not None:
        from workbench.storage.hub import push_folder

        print(push_folder(options.out, options.push_to_hub, private=options.private or None, token=None))


def generate_rows(options: argparse.Namespace) -> None:
    """Rows of text that a model writes itself."""
    from workbench.experiment.recipe import parse_config
    from workbench.pretraining.config import GenerationConfig
    from workbench.pretraining.generated import generate

    own = {"model": options.model, "task": options.task}
    chosen = {key: getattr(options, key) for key in ("device", "dtype") if getattr(options, key) is not None}
    config = parse_config(GenerationConfig, own | chosen, overrides=_overrides(options.set))
    print(f"{generate(config, options.out)}: {config.rows} rows, for `workbench finetune --set rows={options.out}`")


def check_task(options: argparse.Namespace) -> None:
    """Whether a task is sound. Errors: `InputError` after the report when it is not."""
    from workbench.tasks.check import check
    from workbench.tasks.registry import task_named
    from workbench.tasks.vocabulary import mixture_words, tokenizer_of, word_level_tokenizer

    tokenizer = tokenizer_of(options.tokenizer) if options.tokenizer else word_level_tokenizer(mixture_words())
    report = check(task_named(options.name, _overrides(options.set)), tokenizer, scenes=options.scenes)
    print(report)
    if not report.sound:
        raise InputError(f"the task {options.name} has {len(report.faults)} fault(s); see above.")
