"""Runs the commands of the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .build import BuildError
from .namespace import PACKAGE

Command = Callable[[argparse.Namespace, argparse.ArgumentParser], int]


def run(command: Command, args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Return the exit status of ``command(args, parser)``; bad input is one line and status 1."""
    try:
        return command(args, parser)
    except BrokenPipeError:  # `| head` has closed the pipe: no second error at exit, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, BuildError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


def main(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    command: Command,
    argv: Sequence[str] | None,
) -> int:
    """Run `python -m boft_ops.<name>`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(command, parser.parse_args(argv), parser)
