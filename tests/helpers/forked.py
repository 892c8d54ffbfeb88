"""Runs of pytest that share one import of torch: a server forks a process for each."""

import multiprocessing
import os
import sys
from pathlib import Path

LIBRARIES = ["hypothesis", "numpy", "pytest", "torch"]  # nothing that a run may have a copy of


def run_pytest(arguments: list[str], folder: Path, log: Path, **environment: str) -> int:
    """Run pytest in a folder.

    Args:
        arguments: of pytest.
        folder: working directory. A package in it is the one that is tested.
        log: file to write the output to.
        environment: variables to set.

    Returns:
        The exit status, or minus the number of the signal that ended the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=_run, args=(arguments, folder, log, environment), daemon=True)
    process.start()
    process.join()
    return process.exitcode


def _run(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(1, 2)
    os.chdir(folder)
    os.environ.update(environment)
    sys.path.insert(0, str(folder))
    import pytest

    sys.exit(pytest.main([*arguments, "-q", "-x", "-p", "no:cacheprovider"]))
