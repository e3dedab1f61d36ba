"""What can be said on the command line: each command declares itself in a function of its own.

Nothing heavy is imported here, so `--help`, a mistyped option and a wrong recipe are answered at once.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from workbench import __version__
from workbench.cli import commands as run
from workbench.errors import InputError, nearest
from workbench.experiment.conditions import CONDITIONS, METHOD
from workbench.explorer import command as explorer

FIRST = """The workbench finds the circuit of a task in a teacher and a student transformer, matches it head by head,
distils it, and measures what that did. Three commands to begin with:

  workbench demo                  the whole road on the bundled models, with a table and a report
  workbench explore --open        heads, attention and circuits of the bundled models on a page
  workbench check-model MODEL     whether a model of your own is supported

workbench recipes lists the bundled recipes, workbench --help all commands."""
DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
QUANTISATIONS = ("int8", "nf4")
RESUMED = "the same command with --resume goes on from here"
CHECKPOINTED = "the same command goes on from its last checkpoint"
Run = Callable[[argparse.Namespace], None]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command. Errors: `InputError` with the nearest for an unknown command or option; `SystemExit`
    for `--help`, and where argparse refuses."""
    top = parser()
    known: dict[str, argparse.ArgumentParser] = top.get_default("known")
    if words and not words[0].startswith("-") and words[0] not in known:
        raise InputError(f"there is no command {words[0]!r}; {nearest(words[0], known)} See workbench --help.")
    options, rest = top.parse_known_args(words)
    if rest:
        command = known.get(words[0], top)
        there = set(re.findall(r"--[a-z][a-z-]*", command.format_help()))
        raise InputError(f"{command.prog} does not take {rest[0]!r}; {nearest(rest[0], there)} See its --help.")
    return options


def parser() -> argparse.ArgumentParser:
    """The whole command line; its default `known` holds the parser of every command by name."""
    top = argparse.ArgumentParser(
        prog="workbench", description="Find, match and distil the circuit of a task; each stage is a command."
    )
    top.add_argument("--version", action="version", version=f"workbench {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for declare in (
        _declare_stages,
        _declare_distill,
        _declare_evaluate,
        _declare_study,
        _declare_plan,
        _declare_report,
        _declare_recipes,
        _declare_explore,
        _declare_check_model,
        _declare_check_task,
        _declare_finetune,
        _declare_generate,
        _declare_pretrain,
        _declare_completion,
    ):
        declare(commands)
    top.set_defaults(known=commands.choices)
    return top


def _declare_stages(commands: Any) -> None:
    demo = _command(
        commands,
        run.demo,
        "the whole road on the bundled models: discover, match, distil under all conditions, compare, report",
        recipe="demo",
    )
    _with_workers(demo)
    _command(
        commands,
        run.discover,
        "find the task's circuit in the teacher (and the student): ablation impact of every head, path patching by "
        "groups",
    )
    matching = _command(
        commands,
        run.match,
        "match the student's circuit heads to the teacher's (eq 3 to 5), with each pair's CKA, and say if alignment "
        "will help",
    )
    matching.add_argument(
        "--against",
        help="the folder of the study whose trainings the forecast rests on (default: the bundled one of the task)",
    )


def _declare_distill(commands: Any) -> None:
    command_parser = _command(
        commands,
        run.distill,
        "train the matched heads under one condition of the paper's table: task loss + lambda * sum (1 - CKA)",
    )
    command_parser.add_argument(
        "--condition",
        default=METHOD,
        choices=sorted(CONDITIONS),
        help="the arm of the table (default: %(default)s)",
    )
    command_parser.add_argument(
        "--seed", type=int, default=0, help="seed of the batches and of the controls' maps (default: 0)"
    )


def _declare_evaluate(commands: Any) -> None:
    summary = (
        "all conditions and seeds of the recipe on held-out prompts: full, circuit and random-circuit accuracy, "
        "faithfulness, CKA, McNemar"
    )
    _with_workers(_command(commands, run.evaluate, summary))


def _declare_study(commands: Any) -> None:
    summary = (
        "students x data sizes x conditions x seeds, lambda chosen on validation prompts: intervals, tests, and "
        "when alignment helps"
    )
    command_parser = _command(commands, run.study, summary, recipe="study_entity", check=run.check_study)
    command_parser.add_argument(
        "--launcher",
        choices=("local", "ray"),
        default="local",
        help="one training after another, or spread over Ray (default: %(default)s)",
    )
    command_parser.add_argument(
        "--workers",
        type=_workers,
        metavar="N",
        help="spread the trainings over so many processes, one thread each, or `auto`: one for each free core; an "
        "accelerator is shared by a number of them that is given; the same numbers for every N (default: one after "
        "another in this process; on Ray one for each --threads cores)",
    )


def _declare_plan(commands: Any) -> None:
    summary = (
        "what a recipe or a study costs: parameters, operations, memory, disk and hours of every stage, from the "
        "models' configs alone"
    )
    command_parser = commands.add_parser("plan", help=summary, description=summary[0].upper() + summary[1:] + ".")
    command_parser.add_argument("recipe", help="a YAML file or a bundled recipe's name")
    _settings(command_parser, "override a recipe key, e.g. training.steps=20 or student=PATH")
    command_parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="MODEL=DIRECTORY",
        help="where the config.json of a model is, by the recipe's name of it",
    )
    command_parser.add_argument(
        "--tokenizer",
        help="a directory, GGUF file or hub id to cut the prompts with (default: the teacher's, where it is a "
        "directory)",
    )
    command_parser.add_argument(
        "--flops",
        type=float,
        default=312e12,
        help="peak operations a second of the accelerator (default: 312e12, an A100 in 16 bits)",
    )
    command_parser.add_argument(
        "--utilisation", type=float, default=0.3, help="share of the peak that is reached (default: %(default)s)"
    )
    command_parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    _skipping(command_parser)
    _common(command_parser, run.plan, check=run.check_plan)


def _declare_report(commands: Any) -> None:
    command_parser = commands.add_parser(
        "report",
        help="write report.html of a run folder: heat maps, matching, loss curves, table",
        description="Write report.html of a run folder.",
    )
    command_parser.add_argument("--out", type=Path, required=True, help="the run folder")
    _common(command_parser, run.report)


def _declare_check_model(commands: Any) -> None:
    command_parser = commands.add_parser(
        "check-model",
        help="whether the workbench computes with your model exactly: the self-check of loading, and patching against "
        "hooked forwards",
        description="Load a model, check it, and patch it: what is supported of it, or why it is refused.",
    )
    command_parser.add_argument(
        "model", nargs="+", help="a directory, hub id, adapter or GGUF file; several are checked one after another"
    )
    command_parser.add_argument(
        "--workers",
        type=_workers,
        metavar="N",
        help="check several models on so many processes, one thread each, or `auto`: one for each free core",
    )
    _on_a_device(command_parser, device="cpu", dtype="float32")
    _quantised(command_parser, "the model's")
    command_parser.add_argument(
        "--device-map",
        help="in place of --device: a device, or how to spread the model over several, as accelerate takes it (auto)",
    )
    _common(command_parser, run.check_model)


def _declare_explore(commands: Any) -> None:
    command_parser = commands.add_parser(
        "explore",
        help="the interactive explorer as a page on this machine: heat maps, one head's attention and paths, circuits "
        "picked by hand",
        description="Serve the explorer on loopback: heat maps, one head's attention and paths, circuits picked by "
        "hand and evaluated at once.",
    )
    explorer.add_arguments(command_parser)
    _on_a_device(command_parser, device="cpu", dtype="float32")
    _quantised(command_parser, "the models'")
    _common(command_parser, run.explore)


def _declare_pretrain(commands: Any) -> None:
    command_parser = commands.add_parser(
        "pretrain",
        help="train the bundled teacher and students: entity tracking, the same with thin heads, or a mixture of tasks",
        description="Train the bundled teacher, its pruned student and the unrelated student.",
    )
    command_parser.add_argument(
        "--bundle",
        choices=("entity", "thin", "mixture"),
        default="entity",
        help="which three models (default: %(default)s)",
    )
    command_parser.add_argument(
        "--out", type=Path, default=Path("runs/models"), help="where the models go (default: %(default)s)"
    )
    command_parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/pretrain"),
        help="where checkpoints go; a killed training goes on from there (default: %(default)s)",
    )
    _settings(command_parser, "override a setting, e.g. lessons.seed=3")
    _common(command_parser, run.pretrain_models, after=CHECKPOINTED)


def _declare_finetune(commands: Any) -> None:
    command_parser = commands.add_parser(
        "finetune",
        help="fine-tune a model on a task (or some of its layers alone): a teacher that can do it, or a shallower "
        "student of its lineage",
        description="Fine-tune a model on a task by cross-entropy on the answers; a killed training goes on from its "
        "last checkpoint.",
    )
    command_parser.add_argument(
        "--recipe", required=True, help="a YAML file or a bundled recipe's name, e.g. smollm2_boxes_teacher"
    )
    command_parser.add_argument(
        "--out", type=Path, required=True, help="where the model goes, as a Hugging Face directory"
    )
    command_parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="put the finished model into this hub repository, made if there is none",
    )
    command_parser.add_argument("--private", action="store_true", help="of --push-to-hub: a private repository")
    command_parser.add_argument("--work", type=Path, help="where checkpoints go (default: beside the model, NAME-work)")
    _settings(command_parser, "override a setting, e.g. model=PATH or steps=100")
    _on_a_device(command_parser)
    _common(command_parser, run.finetune_model, check=run.check_finetuning, after=CHECKPOINTED)


def _declare_generate(commands: Any) -> None:
    command_parser = commands.add_parser(
        "generate",
        help="rows of text that a model writes itself after beginnings of a task's prompts, to heal a pruned student",
        description="Let a model continue beginnings of a task's train prompts; the rows are for `workbench finetune` "
        "(its `rows`).",
    )
    command_parser.add_argument("model", help="a directory, hub id or GGUF file")
    command_parser.add_argument("--task", default="entity_tracking", help="whose prompts begin the rows (%(default)s)")
    command_parser.add_argument("--out", type=Path, required=True, help="the rows, a JSONL file")
    _settings(command_parser, "override a setting, e.g. rows=500 or options.boxes=5")
    _on_a_device(command_parser)
    _common(command_parser, run.generate_rows, after="the same command goes on with the rows that are missing")


def _declare_check_task(commands: Any) -> None:
    command_parser = commands.add_parser(
        "check-task",
        help="say what is wrong with a task: leaks, long answers, shortcuts, positions, seeds",
        description="Draw a task's prompts and name every fault: leaks between splits, answers of several tokens, "
        "equal prompts, shortcuts, positions, seeds.",
    )
    command_parser.add_argument("name", help="the task's entry point, e.g. theory_of_mind")
    command_parser.add_argument(
        "--tokenizer",
        help="a directory, GGUF file or hub id (default: a word-level tokenizer of all installed tasks' words)",
    )
    command_parser.add_argument(
        "--scenes", type=int, default=600, help="scenes drawn of each split (default: %(default)s)"
    )
    _settings(command_parser, "an option of the task, e.g. counterfactual=order")
    _common(command_parser, run.check_task)


def _declare_recipes(commands: Any) -> None:
    summary = "the bundled recipes by name, what each is, and the commands that take it"
    command_parser = commands.add_parser("recipes", help=summary, description=summary[0].upper() + summary[1:] + ".")
    _common(command_parser, run.recipes, light=True)


def _declare_completion(commands: Any) -> None:
    command_parser = commands.add_parser(
        "completion",
        help="a script that completes commands and options in your shell",
        description="Print a completion script, for example: workbench completion bash > "
        "~/.local/share/bash-completion/completions/workbench",
    )
    command_parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    _common(command_parser, run.completion, light=True)


def _command(
    commands: Any, command: Run, summary: str, *, recipe: str | None = None, check: Run = run.check_recipe
) -> argparse.ArgumentParser:
    """A command that works on a recipe in a run folder."""
    command_parser = commands.add_parser(
        command.__name__, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    command_parser.add_argument(
        "--recipe",
        default=recipe,
        required=recipe is None,
        help="a YAML file or a bundled recipe's name" + (f" (default: {recipe})" if recipe else ""),
    )
    command_parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"runs/{recipe}") if recipe else None,
        required=recipe is None,
        help="the run folder",
    )
    command_parser.add_argument("--resume", action="store_true", help="go on in a run folder that holds a run")
    _settings(command_parser, "override a recipe key, e.g. training.steps=20 or student=PATH")
    _skipping(command_parser)
    _on_a_device(command_parser)
    _common(command_parser, command, check=check, after=RESUMED)
    return command_parser


def _skipping(command_parser: argparse.ArgumentParser) -> None:
    command_parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="of a file of pairs (data.pairs): leave bad rows out, with a table of them, in place of refusing the file",
    )


def _workers(word: str) -> int | str:
    if word == "auto":
        return word
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: give a number of processes, 1 or more, or auto")
    return int(word)


def _with_workers(command_parser: argparse.ArgumentParser) -> None:
    command_parser.add_argument(
        "--workers",
        type=_workers,
        metavar="N",
        help="train conditions and seeds on so many processes, one thread each, or `auto`: one for each free core, "
        "none where fewer than two are free; an accelerator is shared by a number of them that is given; the same "
        "numbers for every N (default: one after another in this process)",
    )


def _settings(command_parser: argparse.ArgumentParser, what: str) -> None:
    command_parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)


def _on_a_device(
    command_parser: argparse.ArgumentParser, *, device: str | None = None, dtype: str | None = None
) -> None:
    command_parser.add_argument(
        "--device", default=device, help=f"where the models are (default: {device or 'as the recipe'})"
    )
    command_parser.add_argument(
        "--dtype",
        default=dtype,
        choices=DTYPES,
        help=f"of the models' weights; auto: as they were saved (default: {dtype or 'as the recipe'})",
    )


def _quantised(command_parser: argparse.ArgumentParser, whose: str) -> None:
    command_parser.add_argument(
        "--quantisation",
        choices=QUANTISATIONS,
        help=f"hold {whose} matrices in 8 bits (torchao) or 4 (bitsandbytes), of the extra `quantised`",
    )


def _common(
    command_parser: argparse.ArgumentParser,
    command: Run,
    *,
    check: Run | None = None,
    after: str | None = None,
    light: bool = False,
) -> None:
    """What every command takes. `check`: what is refused before anything heavy is loaded; `after`: what an interruption
    advises; `light`: it works in no folder and needs no torch."""
    if not light:
        command_parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    command_parser.add_argument("--quiet", action="store_true", help="print results and errors alone, no progress")
    command_parser.add_argument(
        "--log-file", type=Path, metavar="FILE", help="append all messages, with their time, to a file"
    )
    command_parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command_parser.set_defaults(run=command, check=check, after=after, light=light)
