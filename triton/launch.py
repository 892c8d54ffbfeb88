"""Launches of the Triton kernels, without a new look at arguments that are as they were.

``kernel[grid](...)`` binds its arguments, specializes on them and looks for what it compiled, anew
in every call: more host time than the smaller kernels take to run. Here that is done once for every
kind of call; later ones go straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

# that are remembered, of each function that makes some: ever new sizes must not fill the memory
LAUNCHES = 1024

_compiled: dict[tuple, tuple[Any, tuple]] = {}  # kind of call -> compiled kernel, its constants
_remembering: list[Any] = []


def remembered(build: Callable) -> Callable:
    """Make a function that makes a Launch remember what it made, until ``forget`` is called."""
    cached = lru_cache(LAUNCHES)(build)
    _remembering.append(cached)
    return cached


def forget() -> None:
    """For when other tiles are to be launched: ``config.measured`` says something else now."""
    for cached in _remembering:
        cached.cache_clear()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own is a function for kernels, and slow outside of them."""
    return -(-a // b)


class Launch:
    """A kernel with everything that it is launched with but its tensors; these it is called with.

    It runs on the device of the first of them, on torch's current stream. Their shapes and strides
    are those that the grid and the scalars were made for.

    Args:
        grid: how many programs; nothing happens if there are none.
        scalars: the kernel's arguments after the tensors: not negative. What Triton may compile for
            a value of its own are ones and multiples of 16.
        constants: its constexpr arguments, by name.
    """

    def __init__(
        self,
        kernel: Any,
        grid: int,
        scalars: tuple[int, ...],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int = 1,
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._scalars, self._constants = scalars, constants
        self._options = {"num_warps": num_warps, "num_stages": num_stages}
        self._runs: dict[tuple, tuple[Callable, tuple]] = {}  # kind of tensors -> what to call

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if self._grid == 0:
            return
        device = tensors[0].get_device()
        kind = (
            device,
            *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
        )
        found = self._runs.get(kind)
        if found is None:
            with nullcontext() if device < 0 else torch.cuda.device(device):
                self._first(kind, tensors)
        elif device < 0:
            found[0](*tensors, *found[1])
        elif device == torch.cuda.current_device():
            stream = torch._C._cuda_getCurrentRawStream(device)
            found[0](*tensors, *found[1], stream=stream)
        else:
            with torch.cuda.device(device):
                stream = torch._C._cuda_getCurrentRawStream(device)
                found[0](*tensors, *found[1], stream=stream)

    def _first(self, kind: tuple, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Launch with such tensors for the first time; other sizes may share what is compiled."""
        kernel, constants, grid = self._kernel, self._constants, (self._grid, 1, 1)
        arguments = *tensors, *self._scalars
        kind_of_call = (
            kernel.fn,  # a kernel itself hashes its source, under a lock
            *self._options.values(),
            *constants.values(),
            *[(i % 16 == 0, i == 1, i < 1 << 31) for i in self._scalars],
            *kind,
            # On AMD's GPUs the offsets in what is smaller are of 32 bits. Which tensors are larger
            # follows from their shapes, and so needs no second look in one Launch.
            *[None if t is None else t.untyped_storage().nbytes() < 1 << 31 for t in tensors],
        )
        if kind_of_call in _compiled:
            compiled, rest = _compiled[kind_of_call]
            compiled[grid](*arguments, *rest)
        else:
            compiled = kernel[grid](*arguments, **constants, **self._options)
            if not _is_compiled(compiled):
                return
            rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            _compiled[kind_of_call] = compiled, rest
        self._runs[kind] = compiled[grid], (*self._scalars, *rest)


def _is_compiled(result: Any) -> bool:
    """Not in the interpreter, nor while kernels are only being compiled (AsyncCompileMode)."""
    from triton.compiler import CompiledKernel

    return isinstance(result, CompiledKernel)
