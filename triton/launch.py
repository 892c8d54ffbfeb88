"""Launches of the Triton kernels with little host time.

``kernel[grid](...)`` binds its arguments, specializes on them and looks up the compiled kernel, in
every call. That takes the host longer than a GPU needs for the smaller kernels. A ``Launch`` does
it once for each signature of the tensors; later calls go straight to the compiled kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

# A measured tile, as the launchers take it: fields of the kernel's config that replace the
# default's. Hashable, because it is a part of what launches are cached by.
MeasuredTile = tuple[tuple[str, int], ...]

# dtype of the rows -> dtype of sums, blocks and stages; a look-up takes no call
COMPUTE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}

# Cached launches per builder; bounds memory if the sizes keep changing.
LAUNCHES = 1024

_compiled: dict[tuple, tuple[Any, tuple]] = {}  # signature of a call -> compiled kernel, constants
_too_large: set[str] = set()  # kernels with their tiles of which it was said


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv is slow outside of kernels."""
    return -(-a // b)


def expect(name: str, tensor: torch.Tensor | None, *shape: int) -> None:
    """Raise ValueError unless a tensor has this shape, or is None.

    A kernel gets no shape of a tensor: one that is too small would be read beyond its end, and of
    one that is cut otherwise than x, as under tensor parallelism, the wrong entries.
    """
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


class Launch:
    """A kernel with its grid and all its arguments except the tensors, with which it is called.

    It runs on the device of the first tensor, on torch's current stream. The tensors must have the
    shapes and strides that the grid and the scalars were computed for.

    Args:
        kernel: the ``triton.jit`` function. Its arguments are tensors, scalars, constants, in this
            order.
        grid: number of programs; 0 launches nothing.
        scalars: arguments after the tensors, not negative. Triton may compile a kernel of its own
            for scalars that are 1 or multiples of 16.
        constants: constexpr arguments by name.
        num_warps: warps per program.
        num_stages: stages of software pipelining.
        device: number of the device of the tensors; None: looked up in every call.
        smaller: makes the launch that takes the place of this one if the device has too little
            shared memory for it. The error is raised if there is none.
    """

    def __init__(
        self,
        kernel: Any,
        grid: int,
        scalars: tuple[int, ...],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int = 1,
        device: int | None = None,
        smaller: Callable[[], Launch | None] = lambda: None,
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._scalars, self._constants = scalars, constants
        self._options = {"num_warps": num_warps, "num_stages": num_stages}
        self._device, self._smaller = device, smaller
        self._replacement: Launch | None = None
        # signature of the tensors -> compiled kernel with its grid, arguments after the tensors
        self._runs: dict[tuple, tuple[Callable, tuple]] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        if self._grid == 0:
            return
        device = self._device
        if device is None:
            device = tensors[0].get_device()
        signature = (
            device,
            *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
        )
        run = self._runs.get(signature)
        if run is None:
            with nullcontext() if device < 0 else torch.cuda.device(device):
                self._run_first_that_fits(signature, tensors)
        elif device < 0:
            run[0](*tensors, *run[1])
        elif device == torch.cuda.current_device():
            stream = torch._C._cuda_getCurrentRawStream(device)
            run[0](*tensors, *run[1], stream=stream)
        else:
            with torch.cuda.device(device):
                stream = torch._C._cuda_getCurrentRawStream(device)
                run[0](*tensors, *run[1], stream=stream)

    def _run_first_that_fits(
        self, signature: tuple, tensors: tuple[torch.Tensor | None, ...]
    ) -> None:
        """Run in this tile, or else in the next one that the device has enough memory for."""
        launch = first = self._replacement or self
        while True:
            try:
                launch._run_first(signature, tensors)
                break
            except Exception as error:
                smaller = launch._smaller() if _is_out_of_resources(error) else None
                if smaller is None:
                    raise
                launch, why = smaller, error
        if launch is not first:
            self._replacement = launch
            self._tell_replacement(why)
        if signature in launch._runs:
            self._runs[signature] = launch._runs[signature]

    def _run_first(self, signature: tuple, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Run with the first tensors of this signature; launches of other sizes share kernels."""
        kernel, constants, grid = self._kernel, self._constants, (self._grid, 1, 1)
        arguments = *tensors, *self._scalars
        call_signature = (
            kernel.fn,  # a Triton kernel hashes its source, under a lock
            *self._options.values(),
            *constants.values(),
            *[(i % 16 == 0, i == 1, i < 1 << 31) for i in self._scalars],
            *signature,
            # On AMD's GPUs Triton uses offsets of 32 bits in tensors of less than 2 GiB. The size
            # follows from the shape, so one Launch need not look at it again.
            *[None if t is None else t.untyped_storage().nbytes() < 1 << 31 for t in tensors],
        )
        if call_signature in _compiled:
            compiled, rest = _compiled[call_signature]
            compiled[grid](*arguments, *rest)
        else:
            compiled = kernel[grid](*arguments, **constants, **self._options)
            if not _is_compiled(compiled):
                return
            rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            _compiled[call_signature] = compiled, rest
        self._runs[signature] = compiled[grid], (*self._scalars, *rest)

    def _tell_replacement(self, error: Exception) -> None:
        """Warn once for each kernel and tile that another tile is taken from now on."""
        tile = f"{self._kernel.fn.__name__} {self._constants | self._options}"
        if tile not in _too_large:
            _too_large.add(tile)
            other = self._replacement._constants | self._replacement._options
            message = f"{tile} does not fit this GPU ({error}). Taken instead: {other}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _is_out_of_resources(error: Exception) -> bool:
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def _is_compiled(kernel: Any) -> bool:
    """True for a compiled kernel, which later calls may launch directly.

    False in the interpreter, and while kernels are being compiled ahead (AsyncCompileMode).
    """
    from triton.compiler import CompiledKernel

    return isinstance(kernel, CompiledKernel)
