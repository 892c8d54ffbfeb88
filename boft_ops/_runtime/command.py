"""Runs a command of the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from .build import BuildError

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
