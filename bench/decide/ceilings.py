"""Section "ceilings": device and software, the rates that bound everything, and one launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from environment import facts

from boft_ops._runtime import backend

from .contest import Part, Rival, Setting, by_clock, of_host, on_device
from .lines import Writer

LAUNCHES = 50  # between two readings of the clock


def parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield the facts, then the rates of the device, then the host's time of a launch."""
    yield "environment", lambda: writer.write("facts", **_facts(setting))
    share = setting.seconds / 2
    rates = f"rates, {setting.bulk} rows of {setting.width}"
    yield rates, lambda: on_device(writer, rates, [*_rates(setting)], setting, share)
    yield "launches", lambda: of_host(writer, "launches", [*_launches(setting)], setting, share / 2)
    # An empty launch takes the device no time, so a loop of them is bound by the host.
    yield "loops", lambda: by_clock(writer, "loops", [*_launches(setting)], setting, share / 2)


def _facts(setting: Setting) -> dict[str, Any]:
    dtype = str(setting.dtype).removeprefix("torch.")
    return {"part": "environment", "dtype": dtype, **facts(setting.device)}


def _rates(setting: Setting) -> Iterator[Rival]:
    def rows(columns: int) -> list[torch.Tensor]:
        shape = setting.bulk, columns
        sets = range(setting.sets)
        return [torch.randn(shape, device=setting.device, dtype=setting.dtype) for _ in sets]

    def each(call: Callable, tensors: list[torch.Tensor]) -> list[Callable]:
        return [lambda t=t: call(t) for t in tensors]

    n_bytes = setting.bulk * setting.width * setting.dtype.itemsize
    yield Rival(
        "clone",
        f"x.clone() of {n_bytes >> 20} MiB",
        lambda: each(torch.clone, rows(setting.width)),
        facts={"bytes": 2 * n_bytes},
    )

    def copies() -> list[Callable]:
        a, b = (
            torch.randint(255, (setting.copied,), device=setting.device, dtype=torch.uint8)
            for _ in range(2)
        )
        return [lambda: b.copy_(a)]

    yield Rival(
        "copy",
        f"copy of {setting.copied >> 20} MiB",
        copies,
        facts={"bytes": 2 * setting.copied},
    )

    def sums() -> list[Callable]:
        x = torch.randn(setting.copied // 4, device=setting.device)
        return [x.sum]

    yield Rival("sum", f"sum of {setting.copied >> 20} MiB", sums, facts={"bytes": setting.copied})

    def products() -> list[Callable]:
        weight = torch.randn(
            setting.width, setting.width, device=setting.device, dtype=setting.dtype
        )
        return each(lambda x: x @ weight, rows(setting.width))

    yield Rival(
        "mm",
        f"product {setting.width}x{setting.width}x{setting.bulk}",
        products,
        facts={"flops": 2 * setting.bulk * setting.width**2},
    )


def _launches(setting: Setting) -> Iterator[Rival]:
    """Yield functions that make ``LAUNCHES`` launches, as one call."""

    def repeated(launch: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(LAUNCHES):
                launch()

        return run

    more = {"launches": LAUNCHES}
    label = f"{LAUNCHES} times"

    def add() -> Callable[[], None]:
        x = torch.zeros(64, device=setting.device)
        return repeated(lambda: x.add_(1))

    yield Rival("add", f"x.add_(1), {label}", add, facts=more)

    def empty() -> Callable[[], None]:
        return repeated(lambda: torch.empty(64, device=setting.device))

    yield Rival("empty", f"torch.empty(64), {label}", empty, facts=more)
    if setting.device.type != "cuda":
        return

    def driver() -> Callable[[], None]:
        from .empty_kernel import compiled

        kernel, tensors = compiled(setting.device)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        pointers += [ctypes.c_void_p(0)] * 2  # memory for scratch and for profiling, of no size
        arguments = (ctypes.c_void_p * len(pointers))(
            *[ctypes.cast(ctypes.pointer(p), ctypes.c_void_p) for p in pointers]
        )
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = ctypes.c_void_p(kernel.function)
        sizes = (1, 1, 1, 32 * kernel.metadata.num_warps, 1, 1, kernel.metadata.shared)

        def call() -> None:
            if code := launch(function, *sizes, stream, arguments, None):
                raise RuntimeError(f"cuLaunchKernel: error {code}")

        run = repeated(call)
        # the array of arguments has addresses alone, and a kernel that is freed is unloaded
        run.kept = kernel, pointers, tensors
        return run

    def triton(as_integers: bool) -> Callable[[], None]:
        from .empty_kernel import compiled

        kernel, tensors = compiled(setting.device)
        arguments = [t.data_ptr() for t in tensors] if as_integers else tensors
        launch = kernel[(1, 1, 1)]
        run = repeated(lambda: launch(*arguments))
        run.kept = tensors
        return run

    yield Rival("driver", f"cuLaunchKernel by ctypes, {label}", driver, facts=more)
    if backend.has_triton():
        yield Rival(
            "tensors", f"compiled Triton kernel, 4 tensors, {label}", lambda: triton(False),
            facts=more,
        )  # fmt: skip
        yield Rival(
            "integers", f"compiled Triton kernel, 4 addresses, {label}", lambda: triton(True),
            facts=more,
        )  # fmt: skip
