"""What it takes a host to make a training step on a GPU, measured without one.

    python bench/host.py [--rounds 101]

Where a GPU is done before the next launch comes, a layer takes the time that Python and torch take
to make its launches. Here tiny layers run on the CPU by the code that runs on CUDA tensors with
Triton, up to the compiled kernels: in their place is something that does nothing, after about the
Python that Triton has there. Everyone's matrix products and additions are torch's own.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from typing import Any

import torch
from contestants import FLOOR, LORA, Job, Shape, batch, build, frozen
from interleave import Contestant, measure, ratios, summary

from boft_ops._runtime import backend, tuned
from boft_ops._runtime.tuned import Choice

SHAPE = Shape(64, 64, 16)
NAMES = (FLOOR, LORA, "peft-oft", "boft-1-16", "boft-2-8", "boft-4-4")


class Nothing:
    """What takes the place of Triton's compiled kernels."""

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


class Compiled(dict):
    """Of whatever kind a launch is, it has been compiled: to ``Nothing``."""

    def __contains__(self, kind: object) -> bool:
        return True

    def __getitem__(self, kind: object) -> tuple[Nothing, tuple]:
        return Nothing(), ()


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Within the block layers on the CPU take the way of CUDA tensors, and no kernel runs."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET: expected 1, or Triton would look for a GPU")
    backend.ops()["rotate"].launcher()  # imports what it belongs to
    module = importlib.import_module("boft_ops.triton_kernels.launch")
    before = {name: op.defaults["cpu"] for name, op in backend.ops().items()}
    compiled = module._compiled

    def put(defaults: dict[str, Choice], kernels: dict) -> None:
        for name, op in backend.ops().items():
            op.defaults["cpu"] = defaults[name]
        module._compiled = kernels
        # launches and decisions made so far belong to the other kernels
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
        Compiled(),
    )
    try:
        yield
    finally:
        put(before, compiled)


def jobs() -> list[Job]:
    base = frozen(SHAPE, torch.device("cpu"), torch.float32)
    x, grad = batch(SHAPE, torch.device("cpu"), torch.float32)
    return [Job(build(name, base), x, grad) for name in NAMES]


def count_calls(function: Callable[[], object]) -> int:
    """How many functions Python calls in it, in whatever language; not what C++ calls."""
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


def table(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row per contestant: microseconds forward and with backward, parts of LoRA's, and calls."""
    entrants, rows = jobs(), []
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
    parser.add_argument("--seconds", type=float, default=10.0, help="for each direction, about")
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    with launches_left_out():
        rows = table(options.rounds, options.seconds)
    print(f"{'':24}{'forward':>10}{'with backward':>15}{'of LoRA [quartiles]':>24}{'calls':>7}")
    for row in rows:
        middle, low, high = row["both of LoRA's"]
        part = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        figures = f"{row['forward']:7.0f} us{row['both']:12.0f} us"
        print(f"{row['name']:24}{figures}{part:>24}{row['calls']:>7}")


if __name__ == "__main__":
    main()
