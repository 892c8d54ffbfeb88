"""Compiling the candidates of a problem at once: on a GPU that is most of the time of tuning."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .._runtime.tuned_table import Choice
from .problems import Problem


def compile_ahead(problem: Problem, choices: Sequence[Choice], args: tuple) -> None:
    """Compile the Triton kernels of these choices on all cores; what is compiled is launched.

    What fails to compile fails again, with its error, when it is launched.
    """
    try:
        from triton import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:  # Triton before 3.5: they are compiled one by one, as they are launched
        return
    launch = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = warm_up
    try:
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            for choice in choices:
                with contextlib.suppress(Exception), problem.apply(choice):
                    problem.run(*args)
    finally:
        JITFunction.run = launch
