"""`workbench explore`: the models and prompts of the command line -> a session on a loopback page."""

import argparse
import math
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.explorer.server import ExplorerServer

BUNDLED = ("teacher", "student")
PROMPTS = 24
"""How many pairs are drawn of a task."""
MEMORY = 4.0
"""GB that the runs of the prompts in view may take."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `workbench explore`."""
    command.add_argument(
        "teacher",
        nargs="?",
        help="a directory, hub id, adapter or GGUF file (default: the bundled teacher beside its student)",
    )
    command.add_argument("--student", help="a second model beside it")
    command.add_argument("--after", help="a third one: the student after distillation")
    command.add_argument(
        "--task", help="prompts of a task, e.g. ioi (default: entity_tracking, or ioi where the model lacks its words)"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the task, e.g. boxes=3"
    )
    command.add_argument("--pairs", help="your own pairs instead: a JSONL, CSV or Parquet file")
    command.add_argument("--reference", help="pairs for the means of mean ablation, with --pairs")
    command.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave bad rows of these files out, with a table of them, in place of refusing the files",
    )
    command.add_argument(
        "--prompts", type=int, default=PROMPTS, help="how many pairs are drawn of a task (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: 0)")
    command.add_argument("--circuit", help="a circuit of the teacher to begin with (JSON)")
    command.add_argument(
        "--run",
        dest="runs",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a run's folder: its circuits can be loaded and stepped along, its matches walked",
    )
    command.add_argument("--folder", type=Path, default=Path(), help="where circuits are saved (default: here)")
    command.add_argument(
        "--memory",
        type=float,
        default=MEMORY,
        metavar="GB",
        help="what the runs of the prompts in view may take (default: %(default)s)",
    )
    command.add_argument("--prepend-bos", action="store_true", help="put the BOS token before every prompt")
    command.add_argument(
        "--chat", choices=("none", "user", "assistant"), default="none", help="put prompts into the chat template"
    )
    command.add_argument("--system", help="the system message, with --chat")
    command.add_argument("--instruction", help="the user's message, with --chat assistant")
    command.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME:PORT",
        help="another address that the page is opened by, e.g. localhost:9000 behind ssh -L 9000:127.0.0.1:PORT",
    )
    command.add_argument("--port", type=int, default=0, help="default: a free one")
    command.add_argument("--open", action="store_true", help="open the page in a browser")


def server_of(options: argparse.Namespace, settings: Mapping[str, Any]) -> "ExplorerServer":
    """The server, not yet serving. Errors: `InputError` for what can't be explored."""
    if options.teacher is None and (options.student or options.after):
        raise InputError("a student needs its teacher: workbench explore TEACHER --student STUDENT.")
    from workbench.circuits.circuit import Circuit
    from workbench.explorer.api import session_of
    from workbench.explorer.server import ExplorerServer
    from workbench.models.hooked_model import Teacher
    from workbench.storage import located
    from workbench.tasks.base import load_pairs
    from workbench.tasks.prompts import PromptSettings

    def loaded(source: str) -> Teacher:
        return Teacher.load(source, device=options.device, dtype=options.dtype, quantisation=options.quantisation)

    def rows(source: str | None) -> Any:
        if source is None or not options.skip_bad_rows:
            return source
        return load_pairs(located(source), first.tokenizer, skip_bad_rows=True)

    teacher, student = (options.teacher, options.student) if options.teacher else BUNDLED
    first = loaded(teacher)
    circuits = {"teacher": Circuit.load(options.circuit)} if options.circuit else None
    session = session_of(
        first,
        loaded(student) if student else None,
        after=loaded(options.after) if options.after else None,
        task=options.task,
        options=settings,
        pairs=rows(options.pairs),
        reference=rows(options.reference),
        prompts=options.prompts,
        seed=options.seed,
        settings=PromptSettings(
            prepend_bos=options.prepend_bos, chat=options.chat, system=options.system, instruction=options.instruction
        ),
        circuits=circuits,  # pyright: ignore[reportArgumentType]
        folder=options.folder,
        runs=options.runs,
        memory=int(options.memory * 2**30) if math.isfinite(options.memory) else 0,
    )
    return ExplorerServer(session, port=options.port, allowed=options.allow_host)


def explore(options: argparse.Namespace, settings: Mapping[str, Any], *, tell: Callable[[str], object]) -> None:
    """Serve the page until interrupted; `tell` is told where it is."""
    server = server_of(options, settings)
    tell(f"the explorer is at {server.url}\n(this machine only; end with ctrl-c)")
    if options.open:
        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        tell("ended")
    finally:
        server.server_close()
        server.session.close()
