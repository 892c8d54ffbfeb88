"""Launches of the Triton kernels, without a new look at arguments that are as they were.

``kernel[grid](...)`` binds its arguments, specializes on them and looks for what it compiled, anew
in every call: more host time than the smaller kernels take to run. Here that is done once for every
kind of call; later ones go straight to the compiled kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch

_launchers: dict[tuple, tuple[Any, tuple]] = {}  # kind of call -> compiled kernel, its constants


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own is a function for kernels, and slow outside of them."""
    return -(-a // b)


def launch(
    kernel: Any,
    grid: int,
    tensors: Sequence[torch.Tensor | None],
    scalars: Sequence[int],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 1,
) -> None:
    """Run ``grid`` programs on the device of the first tensor, on torch's current stream.

    Args:
        tensors: the kernel's first arguments.
        scalars: those that follow: not negative. What Triton may compile for a value of its own are
            ones and multiples of 16.
        constants: its constexpr arguments, by name.
    """
    device = tensors[0].device
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        _launch(kernel, grid, tensors, scalars, constants, num_warps, num_stages, device.index)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, tensors, scalars, constants, num_warps, num_stages, device.index)


def _launch(kernel, grid, tensors, scalars, constants, num_warps, num_stages, index) -> None:
    key = (
        kernel.fn,  # a kernel itself hashes its source, under a lock
        index,
        num_warps,
        num_stages,
        *constants.values(),
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
        *[(i % 16 == 0, i == 1, i < 1 << 31) for i in scalars],
    )
    found = _launchers.get(key)
    if found is not None:
        compiled, rest = found
        compiled[(grid, 1, 1)](*tensors, *scalars, *rest)
        return
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = kernel[(grid,)](*tensors, *scalars, **constants, **options)
    if _is_compiled(compiled):
        names = kernel.arg_names[len(tensors) + len(scalars) :]
        _launchers[key] = compiled, tuple(constants[name] for name in names)


def _is_compiled(result: Any) -> bool:
    """Not in the interpreter, nor while kernels are only being compiled (AsyncCompileMode)."""
    from triton.compiler import CompiledKernel

    return isinstance(result, CompiledKernel)
