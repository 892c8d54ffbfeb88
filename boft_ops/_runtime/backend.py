"""Operators, and the choice of the backend that runs a call.

An operator has a *reference* in plain torch, for any device, and may have kernels: ``cpu``
(csrc/cpu), ``cuda`` (csrc/cuda) and ``triton`` (triton/). It is called from the forward and the
backward of an autograd.Function. It is also registered with torch.library, so that a compiled graph
holds it as one node with a fake.

Which backend runs a call, and with which tile, is one ``Choice``: a forced backend, else the
measured one, else the default of the device. ``Op.choose`` makes it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from . import autocast, internals, native, tuned
from . import flops as flop_formulas
from .device import devices_of
from .gpu import native_fault, native_takes, triton_object, triton_takes
from .library import define
from .namespace import NS
from .tuned import Choice, ShapeClass, Tunable
from .workload import Workload

BACKENDS = ("reference", "cpu", "cuda", "triton")
# The order of preference on each type of device; the reference runs if no kernel can. On an H200
# Triton's kernels of contiguous rows took less time at every size than those in CUDA C++; for the
# calls where it was the other way round see Kernel.preferred (docs/cuda.md).
PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
REFERENCE, CUDA, TRITON = Choice("reference"), Choice("cuda"), Choice("triton")

_forced = os.environ.get("BOFT_OPS_BACKEND") or None
_ops: dict[str, Op] = {}


class Kernel(NamedTuple):
    """One backend's implementation of an operator.

    Attributes:
        supports: the arguments of a call -> True if the kernel takes them; None: it takes all.
        launcher: for Triton, ``"module:function"`` under triton_kernels, or a function that returns
            the launcher. The other backends have their kernels in the native library, under the
            operator's name.
        tiles: for Triton, ``"module:name"`` of the kernel's tiles: their ``type``, a NamedTuple
            whose fields a measurement may set, ``default(structure, dtype)`` and
            ``is_legal(tile, structure, dtype)``. None: a measurement may set nothing.
        preferred: the arguments of a call -> True if this kernel is the default for them, before
            those that come earlier in PREFERENCE: a GPU ran it in less time, or docs/cuda.md says
            that none has run it yet. None: for no call.
    """

    supports: Callable[..., bool] | None = None
    launcher: str | Callable[[], Callable] | None = None
    tiles: str | None = None
    preferred: Callable[..., bool] | None = None


class Op:
    """An operator: everything that is known of it, and the call.

    Args:
        schema: torch.library schema, such as ``"cayley(Tensor skew) -> Tensor"``.
        reference: plain torch, differentiable by autograd, which is the gradient of the raw op.
        fake: shapes and dtypes alone (FakeTensor rule).
        samples: (Workload) -> the arguments of calls that a layer of that shape makes. Tests and
            the tuner run them.
        kernels: implementations by backend. A kernel of the native library that is not listed here
            is not used.
        shape_class: the class of a call, if its backend and tile are worth measuring.
        measured_as: the operator whose measurement decides for this one, instead of its own: a
            backward that has to run where its forward ran. ``shape_class`` is then the class of the
            forward's call.
        comparable: result -> tensors that do not depend on how a backend splits its sums.
        flops: the arguments of a call -> its floating-point operations, see ``flops.declare``.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable,
        fake: Callable,
        samples: Callable[[Workload], Iterator[tuple]],
        kernels: dict[str, Kernel] | None = None,
        shape_class: ShapeClass | None = None,
        measured_as: Op | None = None,
        comparable: Callable[[Any], Any] = lambda result: result,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name, self.schema = schema.partition("(")[0], schema
        self.reference = reference
        self.samples = samples
        self.comparable = comparable
        self.kernels = kernels or {}
        self._library = define(self.name, schema, reference, fake)
        self.raw = getattr(getattr(torch.ops, NS), self.name).default
        flop_formulas.declare(self.raw, flops)
        if {"triton", "cuda"} & self.kernels.keys() and not self.raw.has_kernel_for_dispatch_key(
            internals.DispatchKey.CUDA  # an earlier import of this copy did so already
        ):
            self._library.impl(self.name, self._on_cuda, "CUDA")
        # backend -> the reason why it cannot run this operator
        self.unavailable = {b: why for b in BACKENDS if (why := self._why_unavailable(b))}
        # device type -> the choice where nothing was measured
        self.defaults = {
            device: Choice(next((b for b in order if b not in self.unavailable), "reference"))
            for device, order in PREFERENCE.items()
        }
        self.tunable = None
        if measured_as is not None:
            self.tunable = measured_as.tunable._replace(shape_class=shape_class)
        elif shape_class is not None:
            self.tunable = tuned.register(Tunable(self.name, shape_class, self._accept))
        self._launcher: Callable | None = None
        # device number -> the generation of ``tuned`` in which nothing was measured for it there
        self._unmeasured: dict[int, int] = {}
        _ops[self.name] = self

    @property
    def is_measured(self) -> bool:
        """True if the tuner measures this operator, and not another one in its place."""
        return self.tunable is not None and self.tunable.name == self.name

    # --- The choice -------------------------------------------------------------------------------

    def supports(self, backend: str, args: tuple) -> bool:
        """False if this backend has a kernel that does not take these arguments."""
        takes = {"triton": triton_takes, "cuda": native_takes}.get(backend)
        if takes is not None and not takes(args[0]):
            return False
        supports = self.kernels[backend].supports if backend in self.kernels else None
        return supports is None or supports(*args)

    def kernel_backend(self, *args) -> str | None:
        """The backend whose kernel would run this call, None if the reference would.

        A caller that can do the same by several other operators asks this first.
        """
        backend = self.choose(args, not torch.compiler.is_compiling()).backend
        return None if backend == "reference" else backend

    def choose(self, args: tuple, eager: bool = True) -> Choice:
        """The backend and tile for a call; the reference if no kernel can run it.

        Args:
            args: the arguments of the call.
            eager: False while a graph is made.
        """
        x = args[0]
        number = tuned.CPU if x.is_cpu else x.get_device() if x.is_cuda else tuned.OTHER
        choice = None
        if not eager or self._unmeasured.get(number) != tuned.generation:
            choice = self._measured(args, eager, number)
        if _forced:
            if choice is None or choice.backend != _forced:
                choice = Choice(_forced)
        elif choice is None:
            choice = self.defaults.get(tuned.DEVICE_TYPES.get(number, "cuda"), REFERENCE)
            if choice.backend == "reference" and number == tuned.CPU and "cpu" in self.kernels:
                native.tell_absence()
            elif choice.backend == "triton" and self._prefers_cuda(*args):
                choice = CUDA
        if choice.backend == "cuda" and not native_takes(x):
            choice = REFERENCE if _forced or "triton" in self.unavailable else TRITON
        kernel = self.kernels.get(choice.backend)
        if kernel is None or choice.backend in self.unavailable:
            return REFERENCE
        if choice.backend == "triton" and x.dtype.itemsize == 2 and not triton_takes(x):
            return REFERENCE
        return choice if kernel.supports is None or kernel.supports(*args) else REFERENCE

    def _prefers_cuda(self, *args) -> bool:
        """True if the kernel in CUDA C++ is the default for a call, in the place of Triton's."""
        kernel = self.kernels.get("cuda")
        if kernel is None or kernel.preferred is None or "cuda" in self.unavailable:
            return False
        return args[0].is_cuda and kernel.preferred(*args)

    def _measured(self, args: tuple, eager: bool, number: int) -> Choice | None:
        """The measured choice for a call, or None; notes if there is none for any call."""
        choice = None
        if self.tunable is not None:
            choice = tuned.measured(self.tunable, args[0], args, eager)
            if choice is not None or tuned.knows(self.tunable, number):
                usable = choice is not None and choice.backend not in self.unavailable
                return choice if usable else None
        if eager:  # later calls on this device then skip the look-up: it costs host time
            self._unmeasured[number] = tuned.generation
        return None

    # --- The call ---------------------------------------------------------------------------------

    def __call__(self, *args):
        if _forced:
            self._check_forced(args)
        x = args[0]
        eager = not torch.compiler.is_compiling()
        if eager and (
            torch.is_grad_enabled()  # a gradient of gradients: kernels are not differentiable,
            or internals.has_transforms()  # nor can they be vmapped
        ):
            choice = REFERENCE
        else:
            choice = self.choose(args, eager)
        if choice.backend == "reference":
            # The matrix products of a reference define the operator: autocast must not round them.
            with autocast.disabled(x.device.type):
                return self.reference(*args)
        if choice.backend == "triton" and x.is_cpu:
            return self._run(choice, args)  # in its interpreter; the raw op runs the C++ kernel
        if eager and x.is_cuda and bypasses_dispatch(x):
            return self._run(choice, args)  # the dispatcher would only call _on_cuda
        if eager:
            # Nothing needs a gradient here; asking for it is a call of Python per operator.
            with internals.BelowAutograd():
                return self.raw(*args)
        return self.raw(*args)

    def _on_cuda(self, *args):
        """The raw op on CUDA tensors, maybe as a node of a compiled graph."""
        choice = self.choose(args)
        if choice.backend not in ("triton", "cuda"):
            return self.reference(*args)
        return self._run(choice, args)

    def _run(self, choice: Choice, args: tuple):
        if choice.backend == "triton":
            launcher = self.launcher()
            return launcher(*args, tile=choice.config) if choice.config else launcher(*args)
        return self.native()(*args)

    def launch(self, *args):
        """Launch the Triton kernel in its measured tile, for a call that it supports."""
        choice, x = None, args[0]
        number = x.get_device()  # -1 on a CPU
        if self._unmeasured.get(number) != tuned.generation:
            choice = self._measured(args, True, number)
        if choice is None or choice.backend != "triton":
            return self.launcher()(*args)
        return self.launcher()(*args, tile=choice.config)

    def launcher(self) -> Callable:
        """The function that launches the Triton kernel; imports triton on first use."""
        if self._launcher is None:
            target = self.kernels["triton"].launcher
            self._launcher = target() if callable(target) else triton_object(target)
        return self._launcher

    def native(self) -> Callable:
        """The CUDA kernel of the native library, which registers it in a namespace of its own."""
        return _native_kernel(self.name, self.schema)

    # --- Reasons ----------------------------------------------------------------------------------

    def _check_forced(self, args: tuple) -> None:
        """Raise the reason why the forced backend cannot run this call, if there is one."""
        backend = _forced
        if backend not in BACKENDS:
            raise ValueError(f"BOFT_OPS_BACKEND: expected one of {BACKENDS}, got {backend!r}")
        if backend in self.unavailable:
            why = self.unavailable[backend]
            raise RuntimeError(f"BOFT_OPS_BACKEND={backend}: {self.name}: {why}")
        device, devices = args[0].device.type, devices_of(backend)
        if backend != "reference" and device not in devices:
            raise RuntimeError(
                f"BOFT_OPS_BACKEND={backend}: expected tensors on {' or '.join(devices)}, "
                f"got {device}"
            )
        if backend == "triton" and not triton_takes(args[0]):
            raise RuntimeError(
                f"BOFT_OPS_BACKEND=triton: {self.name}: Triton's kernels take {args[0].dtype} from "
                "compute capability 8.0 on. Without the variable torch runs it"
            )
        if backend == "cuda" and not native_takes(args[0]):
            fault = native_fault(args[0].get_device())
            raise RuntimeError(f"BOFT_OPS_BACKEND=cuda: {self.name}: {fault}")
        if not self.supports(backend, args):
            shapes = [f"{a.dtype} {tuple(a.shape)}" for a in args if isinstance(a, torch.Tensor)]
            raise RuntimeError(
                f"BOFT_OPS_BACKEND={backend}: {self.name}: its kernel does not take {shapes}"
            )

    def _why_unavailable(self, backend: str) -> str | None:
        if backend == "reference":
            return None
        if backend not in self.kernels:
            return f"no {'Triton' if backend == 'triton' else backend} kernel of this op"
        if backend == "triton":
            return None if has_triton() else "triton is not installed"
        if native.library is None:
            return f"native library {native.status}"
        if not native.kernels(backend):
            return f"the native library was built without {backend} kernels"
        if self.name not in native.kernels(backend):
            return f"no {backend} kernel of this op in the native library"
        return None

    def _accept(self, device: str, structure: dict[str, int], choice: Choice) -> None:
        """Raise ValueError for a measured choice that this operator cannot follow."""
        backend, config = choice.backend, dict(choice.config)
        if backend != "reference" and device not in devices_of(backend):
            raise ValueError(f"no backend of {device}: {backend!r}")
        tiles = self.tiles() if backend == "triton" and config else None
        fields = () if tiles is None else tiles.type._fields
        if unknown := config.keys() - set(fields):
            raise ValueError(f"{self.name}: its tiles have no {', '.join(sorted(unknown))}")
        free = ("num_stages", "programs")
        if any(n < 1 or n & (n - 1) for name, n in config.items() if name not in free):
            raise ValueError(f"not a tile, of powers of two: {config}")

    def tiles(self) -> Any:
        """The tiles of the Triton kernel (``Kernel.tiles``), or None."""
        name = self.kernels["triton"].tiles if "triton" in self.kernels else None
        return None if name is None else triton_object(name)


def ops() -> dict[str, Op]:
    """Every operator by its name."""
    return dict(_ops)


def forced() -> str | None:
    """The backend that every operator has to run on, if one was named."""
    return _forced


@contextmanager
def force(backend: str | None) -> Iterator[None]:
    """Within the block every operator runs on ``backend``, or raises why it cannot.

    None forces nothing. This is the programmatic form of the variable BOFT_OPS_BACKEND. It holds
    for the process and is read when an operator is called: a backward pass belongs inside the
    block too. Gradients of gradients and torch.func transforms run the reference all the same.
    """
    global _forced
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def report() -> list[dict]:
    """One row per operator and device: the backend that runs it, and why each other does not."""
    rows = []
    for op in _ops.values():
        for device, order in PREFERENCE.items():
            if _forced is None:
                serving = op.defaults[device].backend
                others = {b: op.unavailable.get(b, "not preferred") for b in order if b != serving}
            elif _forced not in op.unavailable and _forced in ("reference", *order):
                serving, others = _forced, {}
            else:
                why = op.unavailable.get(_forced, f"not a backend of {device}")
                serving, others = "nothing", {_forced: f"BOFT_OPS_BACKEND={_forced}: {why}"}
            rows.append({"op": op.name, "device": device, "serving": serving, "others": others})
    return rows


@cache
def has_triton() -> bool:
    """True for the real triton, not for a namespace package made of a folder of that name."""
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def bypasses_dispatch(tensor: torch.Tensor) -> bool:
    """True if nothing but the kernel sees a call with this tensor: no subclass, no mode."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and internals.n_dispatch_modes() == 0
        and internals.n_function_modes() == 0
    )


@cache
def _native_kernel(name: str, schema: str) -> Callable:
    define(name, schema, namespace=native.CUDA_NS)
    return getattr(getattr(torch.ops, native.CUDA_NS), name).default


native.load()
