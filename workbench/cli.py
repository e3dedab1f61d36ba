"""`workbench COMMAND`: parse -> recipe -> one call -> run folder. Each stage of the road is a command; `demo` walks all
of it."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench import __version__, storage
from workbench.distillation.processes import launched
from workbench.errors import InputError
from workbench.experiment import CONDITIONS, Run
from workbench.experiment.conditions import METHOD
from workbench.experiment.recipe import Recipe, parse_config, read_recipe
from workbench.experiment.runs import RunFolder
from workbench.explorer import command as explorer
from workbench.storage.yaml import yaml_value

log = logging.getLogger("workbench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or 2 for bad input (the message names the remedy)."""
    options = parser().parse_args(arguments)
    _log_to_screen()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with storage.command():
            options.run(options)
    except InputError as error:
        if options.debug:
            raise
        print(f"workbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("workbench: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line: each command declares itself in a function of its own."""
    top = argparse.ArgumentParser(prog="workbench", description=__doc__.split("\n")[0] if __doc__ else None)
    top.add_argument("--version", action="version", version=f"workbench {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for declare in (
        _declare_stages,
        _declare_distill,
        _declare_evaluate,
        _declare_study,
        _declare_plan,
        _declare_report,
        _declare_check_model,
        _declare_explore,
        _declare_pretrain,
        _declare_finetune,
        _declare_check_task,
    ):
        declare(commands)
    return top


def _declare_stages(commands: Any) -> None:
    _command(
        commands,
        demo,
        "the whole road on the bundled models: discover, match, distil under all conditions, compare, report",
        recipe="demo",
    )
    _command(
        commands,
        discover,
        "find the task's circuit in the teacher (and the student): ablation impact of every head, path patching by "
        "groups",
    )
    matching = _command(
        commands,
        match,
        "match the student's circuit heads to the teacher's (eq 3 to 5), with each pair's CKA, and say if alignment "
        "will help",
    )
    matching.add_argument(
        "--against",
        default="assets/results/study_entity",
        help="the study whose trainings the forecast rests on (default: %(default)s)",
    )


def _declare_distill(commands: Any) -> None:
    made = _command(
        commands,
        distill,
        "train the matched heads under one condition of the paper's table: task loss + lambda * sum (1 - CKA)",
    )
    made.add_argument(
        "--condition",
        default=METHOD,
        choices=sorted(CONDITIONS),
        help="the arm of the table (default: %(default)s)",
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the batches and of the controls' maps (default: 0)")


def _declare_evaluate(commands: Any) -> None:
    summary = (
        "all conditions and seeds of the recipe on held-out prompts: full, circuit and random-circuit accuracy, "
        "faithfulness, CKA, McNemar"
    )
    _command(commands, evaluate, summary)


def _declare_study(commands: Any) -> None:
    summary = (
        "students x data sizes x conditions x seeds, lambda chosen on validation prompts: intervals, tests, and "
        "when alignment helps"
    )
    made = _command(commands, study, summary, recipe="study_entity")
    made.add_argument(
        "--launcher",
        choices=("local", "ray"),
        default="local",
        help="one training after another, or spread over Ray (default: %(default)s)",
    )
    made.add_argument(
        "--workers", type=int, help="processes of a Ray that is started here (default: one for each --threads cores)"
    )


def _declare_plan(commands: Any) -> None:
    summary = (
        "what a recipe or a study costs: parameters, operations, memory, disk and hours of every stage, from the "
        "models' configs alone"
    )
    made = commands.add_parser("plan", help=summary, description=summary[0].upper() + summary[1:] + ".")
    made.add_argument("recipe", help="a YAML file or a bundled recipe's name")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key, e.g. training.steps=20 or student=PATH",
    )
    made.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="MODEL=DIRECTORY",
        help="where the config.json of a model is, by the recipe's name of it",
    )
    made.add_argument(
        "--tokenizer",
        help="a directory, GGUF file or hub id to cut the prompts with (default: the teacher's, where it is a "
        "directory)",
    )
    made.add_argument(
        "--flops",
        type=float,
        default=312e12,
        help="peak operations a second of the accelerator (default: 312e12, an A100 in 16 bits)",
    )
    made.add_argument(
        "--utilisation", type=float, default=0.3, help="share of the peak that is reached (default: %(default)s)"
    )
    made.add_argument("--json", action="store_true", help="print JSON in place of tables")
    _common(made, plan)


def _declare_report(commands: Any) -> None:
    made = commands.add_parser(
        "report",
        help="write report.html of a run folder: heat maps, matching, loss curves, table",
        description="Write report.html of a run folder.",
    )
    made.add_argument("--out", type=Path, required=True, help="the run folder")
    _common(made, report)


def _declare_check_model(commands: Any) -> None:
    made = commands.add_parser(
        "check-model",
        help="whether the workbench computes with your model exactly: the self-check of loading, and patching against "
        "hooked forwards",
        description="Load a model, check it, and patch it: what is supported of it, or why it is refused.",
    )
    made.add_argument("model", help="a directory, hub id, adapter or GGUF file")
    made.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"), help="default: %(default)s"
    )
    made.add_argument("--device", default="cpu", help="default: %(default)s")
    _common(made, check_model)


def _declare_explore(commands: Any) -> None:
    made = commands.add_parser(
        "explore",
        help="the interactive explorer as a page on this machine: heat maps, one head's attention and paths, circuits "
        "picked by hand",
        description="Serve the explorer on loopback: heat maps, one head's attention and paths, circuits picked by "
        "hand and evaluated at once.",
    )
    explorer.add_arguments(made)
    _common(made, explore)


def _declare_pretrain(commands: Any) -> None:
    made = commands.add_parser(
        "pretrain",
        help="train the bundled teacher and students, on entity tracking or on the mixture of tasks",
        description="Train the bundled teacher, its pruned student and the unrelated student.",
    )
    made.add_argument(
        "--bundle", choices=("entity", "mixture"), default="entity", help="which three models (default: %(default)s)"
    )
    made.add_argument(
        "--out", type=Path, default=Path("assets/models"), help="where the models go (default: %(default)s)"
    )
    made.add_argument(
        "--work",
        type=Path,
        default=Path("runs/pretrain"),
        help="where checkpoints go; a killed training goes on from there (default: %(default)s)",
    )
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. lessons.seed=3"
    )
    _common(made, pretrain_models)


def _declare_finetune(commands: Any) -> None:
    made = commands.add_parser(
        "finetune",
        help="fine-tune a model on a task (or some of its layers alone): a teacher that can do it, or a shallower "
        "student of its lineage",
        description="Fine-tune a model on a task by cross-entropy on the answers; a killed training goes on from its "
        "last checkpoint.",
    )
    made.add_argument(
        "--recipe", required=True, help="a YAML file or a bundled recipe's name, e.g. smollm2_boxes_teacher"
    )
    made.add_argument("--out", type=Path, required=True, help="where the model goes, as a Hugging Face directory")
    made.add_argument("--work", type=Path, help="where checkpoints go (default: beside the model, NAME-work)")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. model=PATH or steps=100",
    )
    _common(made, finetune_model)


def _declare_check_task(commands: Any) -> None:
    made = commands.add_parser(
        "check-task",
        help="say what is wrong with a task: leaks, long answers, shortcuts, positions, seeds",
        description="Draw a task's prompts and name every fault: leaks between splits, answers of several tokens, "
        "equal prompts, shortcuts, positions, seeds.",
    )
    made.add_argument("name", help="the task's entry point, e.g. theory_of_mind")
    made.add_argument(
        "--tokenizer",
        help="a directory, GGUF file or hub id (default: a word-level tokenizer of all installed tasks' words)",
    )
    made.add_argument("--scenes", type=int, default=600, help="scenes drawn of each split (default: %(default)s)")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the task, e.g. counterfactual=order",
    )
    _common(made, check_task)


def _command(
    commands: Any, run: Callable[[argparse.Namespace], None], summary: str, *, recipe: str | None = None
) -> argparse.ArgumentParser:
    made = commands.add_parser(run.__name__, help=summary, description=summary[0].upper() + summary[1:] + ".")
    made.add_argument(
        "--recipe",
        default=recipe,
        required=recipe is None,
        help="a YAML file or a bundled recipe's name" + (f" (default: {recipe})" if recipe else ""),
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path(f"runs/{recipe}") if recipe else None,
        required=recipe is None,
        help="the run folder",
    )
    made.add_argument("--resume", action="store_true", help="go on in a run folder that holds a run")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key, e.g. training.steps=20 or student=PATH",
    )
    _common(made, run)
    return made


def _common(made: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    made.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    made.set_defaults(run=run)


def _log_to_screen() -> None:
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings; values are YAML."""
    given = _pairs(pairs, "--set", "training.steps=20")
    return {key: yaml_value(value, where=f"--set {key}") for key, value in given.items()}


def _pairs(pairs: Sequence[str], option: str, example: str = "NAME=DIRECTORY") -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"{option} {pair!r} is not KEY=VALUE; write for example {option} {example}")
    return dict(pair.split("=", 1) for pair in pairs)


def _begun(options: argparse.Namespace) -> Run:
    recipe: Recipe = read_recipe(options.recipe, overrides=_overrides(options.set))
    run = Run(recipe, RunFolder(options.out))
    run.begin(resume=options.resume)
    return run


def demo(options: argparse.Namespace) -> None:
    """Everything, then the table and the report."""
    evaluate(options)
    report(options)


def discover(options: argparse.Namespace) -> None:
    """Circuits."""
    from workbench.experiment.discover import discover as discover_circuits

    discover_circuits(_begun(options))
    report(options)


def match(options: argparse.Namespace) -> None:
    """Circuits and the head map, and whether alignment is likely to help."""
    from workbench.experiment.match import match as match_circuits
    from workbench.study.diagnostic import forecast_of

    match_circuits(_begun(options))
    report(options)
    found = forecast_of(options.out, options.against)
    if found is not None:
        print(found.text())


def distill(options: argparse.Namespace) -> None:
    """One condition, trained and evaluated."""
    from workbench.experiment.arms import run_conditions
    from workbench.experiment.results import table

    run = _begun(options)
    results = run_conditions(run, [(options.condition, options.seed)], resume=options.resume)
    if launched(run.recipe.device).is_main:
        print(table(results))


def evaluate(options: argparse.Namespace) -> None:
    """All conditions and seeds."""
    from workbench.experiment.arms import run_recipe
    from workbench.experiment.results import table

    print("\n" + table(run_recipe(_begun(options), resume=options.resume)))


def study(options: argparse.Namespace) -> None:
    """A study, then its summary and page; `report` writes those of the cells that are finished while it runs."""
    from workbench.study.grid import Study, read_study

    running = Study(read_study(options.recipe, overrides=_overrides(options.set)), options.out)
    running.begin(resume=options.resume)
    if options.launcher == "ray":
        from workbench.study.launch import run_on_ray

        run_on_ray(running, workers=options.workers)
    else:
        running.run()
    report(options)


def plan(options: argparse.Namespace) -> None:
    """What a recipe costs, without loading a weight."""
    from workbench.plan.road import plan_of

    found = plan_of(
        options.recipe,
        overrides=_overrides(options.set),
        configs=_pairs(options.config, "--config"),
        tokenizer=options.tokenizer,
        flops=options.flops,
        utilisation=options.utilisation,
    )
    print(json.dumps(found.to_json(), indent=2) if options.json else found.text())


def report(options: argparse.Namespace) -> None:
    """The page of a run folder."""
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
    """What is supported of a model."""
    from workbench.patching import conformance

    found = conformance.check_model(options.model, device=options.device, dtype=options.dtype)
    print(found.text())
    conformance.require_conformance(found)


def explore(options: argparse.Namespace) -> None:
    """The explorer's page."""
    explorer.explore(options, _overrides(options.set))


def pretrain_models(options: argparse.Namespace) -> None:
    """The bundled models."""
    from workbench.pretraining import BundleConfig, pretrain
    from workbench.pretraining.mixture import report_table
    from workbench.pretraining.mixture_bundle import MixtureConfig, pretrain_mixture

    if options.bundle == "mixture":
        mixture = parse_config(MixtureConfig, {}, overrides=_overrides(options.set))
        print(report_table(pretrain_mixture(mixture, options.out, options.work)).to_string(index=False))
        return
    config = parse_config(BundleConfig, {}, overrides=_overrides(options.set))
    for name, accuracy in pretrain(config, options.out, options.work).items():
        print(f"{name}: accuracy {accuracy:.3f} on 7 boxes, held-out test scenes")


def finetune_model(options: argparse.Namespace) -> None:
    """A model fine-tuned on a task."""
    from workbench.experiment.recipe import read_yaml
    from workbench.pretraining.finetuning import FinetuningConfig, finetune

    config = parse_config(FinetuningConfig, read_yaml(options.recipe), overrides=_overrides(options.set))
    made = finetune(config, options.out, options.work or options.out.with_name(f"{options.out.name}-work"))
    print(
        f"{options.out}: accuracy {made['test_accuracy']:.3f} on held-out test scenes of {config.task} after "
        f"{made['steps']} steps"
    )


def check_task(options: argparse.Namespace) -> None:
    """Whether a task is sound. Errors: `InputError` after the report when it is not."""
    from workbench.tasks.check import check
    from workbench.tasks.registry import task_named
    from workbench.tasks.vocabulary import mixture_words, tokenizer_of, word_level_tokenizer

    tokenizer = tokenizer_of(options.tokenizer) if options.tokenizer else word_level_tokenizer(mixture_words())
    found = check(task_named(options.name, _overrides(options.set)), tokenizer, scenes=options.scenes)
    print(found)
    if not found.sound:
        raise InputError(f"the task {options.name} has {len(found.faults)} fault(s); see above.")


if __name__ == "__main__":
    sys.exit(main())
