"""`workbench COMMAND`: parse -> recipe -> one call -> run folder. Each stage of the road is a command; `demo` walks all
of it."""

import argparse
import sys
from collections.abc import Sequence

from workbench.cli import endings
from workbench.cli.parser import FIRST, parsed

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0; 2 for bad input or a file that can't be had (the message names the
    remedy); 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(FIRST)
        return 0
    options = argparse.Namespace(debug="--debug" in words)
    try:
        options = parsed(words)
        with endings.messages(options):
            _carry_out(options)
    except KeyboardInterrupt:
        print(f"workbench: {endings.interrupted(options)}", file=sys.stderr)
        return endings.INTERRUPTED
    except BrokenPipeError:
        endings.close_output()
        return endings.CLOSED
    except Exception as error:
        line = endings.explained(error)
        if line is None or options.debug:
            raise
        print(f"workbench: {line}", file=sys.stderr)
        return endings.INPUT
    return 0


def _carry_out(options: argparse.Namespace) -> None:
    if options.check is not None:
        options.check(options)
    if options.light:
        options.run(options)
        return
    from workbench import storage

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    with storage.command():
        options.run(options)
