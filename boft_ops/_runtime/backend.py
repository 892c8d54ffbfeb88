"""Which implementation serves an op.

Every op has a *reference* in plain torch (any device, also the fallback) and may have kernels:
``cpu`` (csrc/cpu), ``cuda`` (csrc/cuda) and ``triton`` (triton/). An ``Op`` picks one by the device
of its first tensor and is called from the forward and backward of an autograd.Function; the same op
is registered with torch.library, so that compiled graphs hold it as one node with a fake.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from . import autocast, native, tuned
from .device import devices_of
from .namespace import NS, PACKAGE

BACKENDS = ("reference", "cpu", "cuda", "triton")
# The order of preference on each device type; the reference serves wherever nothing else does.
# On an H200 Triton's kernels of the rows were faster at every size than those in CUDA C++, as these
# were then; BOFT_OPS_BACKEND=cuda chooses the latter (docs/cuda.md).
PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_forced = os.environ.get("BOFT_OPS_BACKEND") or None
_ops: dict[str, Op] = {}


class Op:
    """One operator: its schema, its plain-torch reference, and the kernels that were found for it.

    Args:
        schema: torch.library schema, e.g. ``"cayley(Tensor skew) -> Tensor"``.
        reference: plain-torch implementation of that schema, differentiable by autograd.
        fake: shapes and dtypes only (FakeTensor rule).
        triton: ``"module:function"`` under ``triton_kernels``, if there is such a kernel, or what
            makes that function of other ops' launchers.
        supports: per backend, a predicate on the op's arguments (any, if there is none).
    """

    def __init__(
        self,
        schema: str,
        reference: Callable,
        fake: Callable,
        triton: str | Callable[[], Callable] | None = None,
        supports: dict[str, Callable[..., bool]] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.schema = schema
        self.reference = reference
        self._triton = triton
        self._supports = supports or {}
        self._library = _define(self.name, schema, reference, fake)
        self.raw = getattr(getattr(torch.ops, NS), self.name).default
        if (triton is not None and has_triton()) or self.name in native.kernels("cuda"):
            _register(self._library, self.name, self._cuda)
        self.missing = {b: why for b in BACKENDS if (why := self._why_missing(b))}
        self.serving = {
            device: next((b for b in order if b not in self.missing), "reference")
            for device, order in PREFERENCE.items()
        }
        _ops[self.name] = self

    def kernel_backend(self, *args) -> str | None:
        """Return the backend whose kernel would run this call, None if the reference would.

        Callers use it to decide between this op and an equivalent sequence of other ops.
        """
        backend = _forced or self._chosen(args, eager=not torch.compiler.is_compiling())
        if backend == "reference" or backend in self.missing:
            return None
        return backend if self.takes(backend, args) else None

    def takes(self, backend: str, args: tuple) -> bool:
        """Whether the kernel of a backend that has one is made for this call."""
        return backend not in self._supports or self._supports[backend](*args)

    def __call__(self, *args):
        x = args[0]
        eager = not torch.compiler.is_compiling()
        if eager and (
            torch.is_grad_enabled()  # a gradient of gradients: kernels are not differentiable,
            or torch._C._are_functorch_transforms_active()  # nor do they know of vmap
        ):
            if _forced:
                self._checked(_forced, args)
            backend = "reference"
        else:
            backend = self._checked(_forced, args) if _forced else self._chosen(args, eager=eager)
            if not self.takes(backend, args):
                backend = "reference"
        if backend == "reference":
            # its matmuls define the op, never to be downcast
            with autocast.disabled(x.device.type):
                return self.reference(*args)
        if backend == "triton" and x.is_cpu:
            return self.launcher()(*args)  # the interpreter; the raw op has the C++ kernel there
        if eager and x.is_cuda and _is_plain(x):
            return self._run(backend, args)  # the raw op would come back to Python for that
        return self.raw(*args)

    def _chosen(self, args: tuple, measure: bool = True, eager: bool = True) -> str:
        """What was measured to be best for such a call, or what serves the device by default.

        ``measure``: whether BOFT_OPS_AUTOTUNE=1 may measure it now. ``eager``: not in a graph that
        is being made.
        """
        measured = tuned.backend(self, args, measure, eager)
        if measured and measured not in self.missing:
            return measured
        x = args[0]  # the type of its device takes longer to find out
        device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else ""
        return self.serving.get(device, "reference")

    def _cuda(self, *args):
        """What the raw op runs on CUDA tensors: one of two sets of kernels, or the reference."""
        backend = _forced or self._chosen(args, measure=False)  # maybe inside a compiled graph
        there = backend in ("triton", "cuda") and backend not in self.missing
        if not there or not self.takes(backend, args):
            return self.reference(*args)
        return self._run(backend, args)

    def _run(self, backend: str, args: tuple):
        return self.launcher()(*args) if backend == "triton" else self._native()(*args)

    def _native(self) -> Callable:
        """The CUDA kernel of the native library, which registers them in a namespace beside."""
        return _native_kernel(self.name, self.schema)

    def launcher(self) -> Callable:
        """The function that launches the Triton kernel; imports triton on first use."""
        return _launcher(self._triton)

    def _checked(self, backend: str, args: tuple) -> str:
        """The forced backend, or the reason why it cannot serve this call."""
        if backend not in BACKENDS:
            raise ValueError(f"BOFT_OPS_BACKEND: expected one of {BACKENDS}, got {backend!r}")
        if backend in self.missing:
            raise RuntimeError(f"BOFT_OPS_BACKEND={backend}: {self.name}: {self.missing[backend]}")
        device, devices = args[0].device.type, devices_of(backend)
        if backend != "reference" and device not in devices:
            raise RuntimeError(
                f"BOFT_OPS_BACKEND={backend}: expected tensors on {' or '.join(devices)}, "
                f"got {device}"
            )
        if not self.takes(backend, args):
            shapes = [f"{a.dtype} {tuple(a.shape)}" for a in args if isinstance(a, torch.Tensor)]
            raise RuntimeError(
                f"BOFT_OPS_BACKEND={backend}: {self.name}: its kernel does not take {shapes}"
            )
        return backend

    def _why_missing(self, backend: str) -> str | None:
        if backend == "reference":
            return None
        if backend == "triton":
            if self._triton is None:
                return "no Triton kernel of this op"
            return None if has_triton() else "triton is not installed"
        if native.library is None:
            return f"native library {native.status}"
        if not native.kernels(backend):
            return f"the native library was built without {backend} kernels"
        if self.name not in native.kernels(backend):
            return f"no {backend} kernel of this op in the native library"
        return None


def forced() -> str | None:
    """The backend that every op is to run on, if one was named."""
    return _forced


@contextmanager
def force(backend: str | None) -> Iterator[None]:
    """Within the block every op runs on ``backend``, or raises why it cannot (None: no force).

    The programmatic form of the environment variable BOFT_OPS_BACKEND: for the whole process, and
    read when an op is called, so a backward pass belongs inside the block too. Gradients of
    gradients and torch.func transforms run the reference all the same.
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
    """One row per op and device: what serves it, and why each other backend does not."""
    rows = []
    for op in _ops.values():
        for device, order in PREFERENCE.items():
            if _forced is None:
                serving = op.serving[device]
                others = {b: op.missing.get(b, "not preferred") for b in order if b != serving}
            elif _forced not in op.missing and _forced in ("reference", *order):
                serving, others = _forced, {}
            else:
                why = op.missing.get(_forced, f"not a backend of {device}")
                serving, others = "nothing", {_forced: f"BOFT_OPS_BACKEND={_forced}: {why}"}
            rows.append({"op": op.name, "device": device, "serving": serving, "others": others})
    return rows


@cache
def has_triton() -> bool:
    """The real triton, not a namespace package made of some folder of that name on sys.path."""
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


@cache
def _native_kernel(name: str, schema: str) -> Callable:
    _define(name, schema, namespace=native.CUDA_NS)
    return getattr(getattr(torch.ops, native.CUDA_NS), name).default


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing but the kernel itself is interested in a call: no subclass, no mode."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
    )


@cache
def _launcher(target: str | Callable[[], Callable]) -> Callable:
    if callable(target):
        return target()
    module, _, function = target.partition(":")
    importlib.import_module(f"{PACKAGE}.triton_kernels.config").measured = tuned.tile
    forget = importlib.import_module(f"{PACKAGE}.triton_kernels.launch").forget
    if forget not in tuned.on_change:
        tuned.on_change.append(forget)
    return getattr(importlib.import_module(f"{PACKAGE}.triton_kernels.{module}"), function)


def _define(
    name: str,
    schema: str,
    reference: Callable | None = None,
    fake: Callable | None = None,
    namespace: str = NS,
) -> torch.library.Library:
    """Define the op under this copy's namespace, once per process.

    The library is kept on torch's own object: torch drops the operators of one that is freed, and a
    second import of the same copy must find them, not define them again.
    """
    holder = getattr(torch.ops, namespace)
    libraries = holder.__dict__.setdefault("_boft_libraries", {})
    if name not in libraries:
        library = libraries[name] = torch.library.Library(namespace, "FRAGMENT")
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        if reference is not None:
            # every device; a kernel registered for a device key wins over it
            library.impl(name, reference, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return libraries[name]


def _register(library: torch.library.Library, name: str, cuda: Callable) -> None:
    """Serve CUDA tensors of the raw op, unless an earlier import of this copy did so already."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NS}::{name}", "CUDA"):
        library.impl(name, cuda, "CUDA")


native.load()
