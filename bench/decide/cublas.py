"""Section "cublas": can a product of cublasLt multiply each output feature by the scale?

cublasLt has a pointer mode in which alpha is a vector on the device, a number for each row of the
result. Column-major, as it computes, these rows are the output features of a layer, and alpha is
the scale. Then the scale needs no pass of its own in the forward pass, if there is an algorithm in
half precision.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .contest import Part, Rival, Setting, on_device
from .lines import Writer

# Numbers of cublasLt.h, cublas_api.h and library_types.h of CUDA 13.
POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO = 3
DESC_POINTER_MODE, DESC_TRANSA, DESC_EPILOGUE, DESC_BIAS_POINTER = 2, 3, 7, 8
EPILOGUE_BIAS = 4
PREF_MAX_WORKSPACE_BYTES = 1
COMPUTE_32F, OP_T = 68, 1
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
WORKSPACE = 32 << 20  # bytes
TOLERANCE = 1e-2  # relative error in the Frobenius norm, which bfloat16 keeps by far


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, which begins with the algorithm."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def loaded_library(maps: Path = Path("/proc/self/maps")) -> ctypes.CDLL:
    """Return the cublasLt that torch has loaded.

    Raises:
        RuntimeError: there is none.
    """
    for line in maps.read_text().splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith("libcublasLt.so"):
            return ctypes.CDLL(f"/{path}")
    raise RuntimeError("no libcublasLt.so is loaded")


class Product:
    """A call computes y = scale * (x W^T) + bias, in one product of cublasLt.

    Args:
        library: cublasLt.
        x, weight: (N, d) and (n, d).
        scale: (n,) in float32, or None.
        bias: (n,) in the dtype of x, or None.

    Attributes:
        algorithms: number of algorithms that cublasLt has found, at most one.

    Raises:
        RuntimeError: a function of cublasLt failed.
    """

    def __init__(
        self,
        library: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        self._library = library
        self._kept = x, weight, scale, bias
        (rows, d), n = x.shape, weight.shape[0]
        self._y = x.new_empty(rows, n)
        self._workspace = x.new_empty(WORKSPACE, dtype=torch.uint8)
        self._session = self._made("cublasLtCreate")
        type_ = TYPES[x.dtype]
        self._desc = self._made("cublasLtMatmulDescCreate", COMPUTE_32F, TYPES[torch.float32])
        self._set(DESC_TRANSA, ctypes.c_int32(OP_T))
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._factors = ctypes.addressof(self._one), ctypes.addressof(self._zero)
        if scale is not None:
            self._set(DESC_POINTER_MODE, ctypes.c_int32(POINTER_MODE_ALPHA_DEVICE_VECTOR_BETA_ZERO))
            self._factors = scale.data_ptr(), None
        if bias is not None:
            self._set(DESC_EPILOGUE, ctypes.c_uint32(EPILOGUE_BIAS))
            self._set(DESC_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        sizes = (d, n, d), (d, rows, d), (n, rows, n)  # rows, columns and distance of columns
        self._layouts = [
            self._made("cublasLtMatrixLayoutCreate", type_, *map(ctypes.c_uint64, of))
            for of in sizes
        ]
        preference = self._made("cublasLtMatmulPreferenceCreate")
        most = ctypes.c_size_t(WORKSPACE)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference, PREF_MAX_WORKSPACE_BYTES, ctypes.byref(most), ctypes.c_size_t(8),
        )  # fmt: skip
        self._found, count = Heuristic(), ctypes.c_int(0)
        a, b, c = self._layouts
        self._status = library.cublasLtMatmulAlgoGetHeuristic(
            self._session, self._desc, a, b, c, c, preference, 1,
            ctypes.byref(self._found), ctypes.byref(count),
        )  # fmt: skip
        self.algorithms = count.value if self._status == 0 and self._found.state == 0 else 0

    def __call__(self) -> torch.Tensor:
        """Compute y on torch's current stream.

        Raises:
            RuntimeError: there is no algorithm, or the product failed.
        """
        if not self.algorithms:
            raise RuntimeError(f"cublasLt has no algorithm for it (status {self._status})")
        (x, weight, *_), (a, b, c) = self._kept, self._layouts
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        pointer = ctypes.c_void_p
        self._call(
            "cublasLtMatmul",
            self._session, self._desc, pointer(self._factors[0]), pointer(weight.data_ptr()), a,
            pointer(x.data_ptr()), b, pointer(self._factors[1]), pointer(self._y.data_ptr()), c,
            pointer(self._y.data_ptr()), c, ctypes.byref(self._found),
            pointer(self._workspace.data_ptr()), ctypes.c_size_t(WORKSPACE), pointer(stream),
        )  # fmt: skip
        return self._y

    def check(self) -> None:
        """Compare y with torch.

        Raises:
            RuntimeError: there is no algorithm, or y is wrong.
        """
        x, weight, scale, bias = self._kept
        want = x.float() @ weight.float().mT
        want = want if scale is None else want * scale
        want = want if bias is None else want + bias.float()
        error = float((self().float() - want).norm() / want.norm())
        if not error <= TOLERANCE:
            raise RuntimeError(f"cublasLt's product has a relative error of {error:.1e}")

    def _made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Return a new object of the library."""
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *arguments)
        return made

    def _set(self, attribute: int, value: Any) -> None:
        where = ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
        self._call("cublasLtMatmulDescSetAttribute", self._desc, attribute, *where)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: status {status}")


def parts(setting: Setting, writer: Writer, library: Any = None) -> Iterator[Part]:
    """Yield the contest of products with and without the scale.

    Args:
        setting: device and sizes.
        writer: takes the lines.
        library: cublasLt; None: the one that torch has loaded.
    """
    part = f"products {setting.width}x{setting.width}x{setting.bulk}"
    yield part, partial(_measure, part, setting, writer, library)


def _measure(part: str, setting: Setting, writer: Writer, library: Any) -> None:
    library = loaded_library() if library is None else library
    on, n = {"device": setting.device, "dtype": setting.dtype}, setting.width
    weight, bias = torch.randn(n, n, **on) / n**0.5, torch.randn(n, **on)
    scale = 1 + 0.1 * torch.randn(n, device=setting.device)
    sets = [torch.randn(setting.bulk, n, **on) for _ in range(setting.sets)]

    def make(name: str, scaled: bool, biased: bool) -> list[Callable[[], object]]:
        with_ = scale if scaled else None, bias if biased else None
        made = [Product(library, x, weight, *with_) for x in sets]
        writer.write("facts", part=part, name=name, algorithms=made[0].algorithms)
        made[0].check()
        return made

    contestants = (
        ("plain", "product", False, False),
        ("alpha vector", "product times the scale", True, False),
        ("plain, bias", "product and bias", False, True),
        ("alpha vector, bias", "product times the scale and bias", True, True),
    )
    rivals = [
        Rival(name, f"cublasLt: {label}", partial(make, name, *how))
        for name, label, *how in contestants
    ]
    mm = [lambda x=x: torch.nn.functional.linear(x, weight) for x in sets]
    rivals.append(Rival("torch", "torch: product", lambda: mm))
    on_device(writer, part, rivals, setting, setting.seconds)
