"""Time of the host for a training step on a GPU, measured without a GPU.

    python bench/host.py [--rounds 101] [--native FOLDER]

If a GPU finishes each kernel before the next launch arrives, a layer takes the time that Python and
torch need to make its launches. Here tiny layers run on the CPU through the code for CUDA tensors
with Triton. The compiled kernels are replaced by a stub that does nothing, after about as much
Python as Triton runs at that point. All contestants use torch's own matrix products and additions.

With --native a row shows the layer as one native call, with the bindings of the CUDA kernels in a
library for the CPU whose launches are left out: `python tests/helpers/cuda_emulation.py FOLDER`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from pathlib import Path
from typing import Any

import torch
from contestants import FLOOR, LORA, Job, Shape, batch, build, frozen
from interleave import Contestant, measure, ratios, summary

from boft_ops._runtime import backend, tuned
from boft_ops._runtime.tuned import Choice
from boft_ops.ops import linear_from_skew

SHAPE = Shape(64, 64, 16)
OURS = "boft-2-8"
NAMES = (FLOOR, LORA, "peft-oft", "boft-1-16", OURS, "boft-4-4")


class EmptyKernel:
    """Stub of a compiled Triton kernel: takes the same calls and does nothing."""

    function, packed_metadata = 0, (4, 1, 0)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable:
        def runner(*arguments: Any, stream: int | None = None) -> None:
            metadata = self._metadata(grid, stream)
            self._run(*grid, stream, self.function, self.packed_metadata, metadata, *arguments)

        return runner

    def _metadata(self, *_: object) -> None:
        return None

    def _run(self, *arguments: object) -> None:
        self._launch(0, 0, *arguments)

    def _launch(self, *_: object) -> None:
        return None


class EmptyKernels(dict):
    """Stub of the cache of compiled kernels: every lookup succeeds and returns an EmptyKernel."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: object) -> tuple[EmptyKernel, tuple]:
        return EmptyKernel(), ()


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Let layers on the CPU take the code path of CUDA tensors, and run no kernel.

    Raises:
        RuntimeError: TRITON_INTERPRET is not 1, so Triton would look for a GPU.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET: expected 1, or Triton would look for a GPU")
    backend.ops()["rotate"].launcher()  # imports the module of the launches
    module = importlib.import_module("boft_ops.triton_kernels.launch")
    before = {name: op.defaults["cpu"] for name, op in backend.ops().items()}
    compiled = module._compiled

    def put(defaults: dict[str, Choice], kernels: dict) -> None:
        for name, op in backend.ops().items():
            op.defaults["cpu"] = defaults[name]
        module._compiled = kernels
        # Launches and decisions that were made so far belong to the other kernels.
        for name, loaded in list(sys.modules.items()):
            if name.startswith(module.__package__):
                for value in vars(loaded).values():
                    if isinstance(value, _lru_cache_wrapper):
                        value.cache_clear()
        tuned.forget()

    put(
        {
            name: Choice("triton" if "triton" in op.kernels else "reference")
            for name, op in backend.ops().items()
        },
        EmptyKernels(),
    )
    try:
        yield
    finally:
        put(before, compiled)


@contextmanager
def native_calls(space: Any, library: Path) -> Iterator[None]:
    """Let layers on the CPU take the native call of a GPU, and run no kernel.

    Args:
        space: ``torch.ops.<namespace>`` with the operators of the library.
        library: the emulated library.
    """
    switch = ctypes.CDLL(str(library)).boft_emulated_launches
    ops = [linear_from_skew.linear_from_skew_forward, linear_from_skew.linear_from_skew_backward]
    before = [(op.raw, op.defaults["cpu"]) for op in ops], linear_from_skew.KEEP_OUTPUT
    for op in ops:
        op.raw, op.defaults["cpu"] = getattr(space, op.name).default, Choice("cpu")
    linear_from_skew.KEEP_OUTPUT = ()
    switch(0)
    tuned.forget()  # with the decisions that were made so far
    try:
        yield
    finally:
        for op, (raw, default) in zip(ops, before[0], strict=True):
            op.raw, op.defaults["cpu"] = raw, default
        linear_from_skew.KEEP_OUTPUT = before[1]
        switch(1)
        tuned.forget()


def jobs(names: Sequence[str] = NAMES) -> list[Job]:
    """Build the contestants, all with the same batch."""
    base = frozen(SHAPE, torch.device("cpu"), torch.float32)
    x, grad = batch(SHAPE, torch.device("cpu"), torch.float32)
    return [Job(build(name, base), x, grad) for name in names]


def count_calls(function: Callable[[], object]) -> int:
    """Count the functions that Python calls, in any language, without the calls made by C++."""
    n_calls = 0

    def count(frame: object, event: str, _: object) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n_calls


def table(rounds: int, seconds: float, names: Sequence[str] = NAMES) -> list[dict[str, Any]]:
    """Measure a row for each contestant.

    A row has the microseconds of forward and of both passes, each also divided by LoRA's, and the
    number of function calls.
    """
    entrants, rows = jobs(names), []
    timed = {
        direction: measure(
            [Contestant(j.entry.name, j.runner(direction), j.reset) for j in entrants],
            rounds=rounds,
            seconds=seconds,
            calls=20,
        )
        for direction in ("forward", "both")
    }
    for job in entrants:
        name = job.entry.name
        row: dict[str, Any] = {"name": job.entry.label, "calls": count_calls(job.both)}
        job.reset()
        for direction, durations in timed.items():
            row[direction] = 1e6 * summary(list(durations[name].values()))[0]
            row[f"{direction} of LoRA's"] = summary(ratios(durations, name, LORA))
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="approximate time for each direction"
    )
    parser.add_argument("--native", type=Path, help="folder of an emulated library")
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    with launches_left_out():
        rows = table(options.rounds, options.seconds)
        if options.native:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
            from cuda_emulation import LIB, register

            library = options.native / LIB
            with native_calls(register(library, "boft_emulated"), library):
                natively = table(options.rounds, options.seconds, (LORA, OURS))[-1]
            rows.append(natively | {"name": f"{natively['name']}, native call"})
    print(f"{'':24}{'forward':>10}{'with backward':>15}{'of LoRA [quartiles]':>24}{'calls':>7}")
    for row in rows:
        middle, low, high = row["both of LoRA's"]
        part = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        figures = f"{row['forward']:7.0f} us{row['both']:12.0f} us"
        print(f"{row['name']:24}{figures}{part:>24}{row['calls']:>7}")


if __name__ == "__main__":
    main()
