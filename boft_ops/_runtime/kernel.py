"""One backend's implementation of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


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
            those that come earlier in PREFERENCE: a GPU ran it in less time. None: for no call.
    """

    supports: Callable[..., bool] | None = None
    launcher: str | Callable[[], Callable] | None = None
    tiles: str | None = None
    preferred: Callable[..., bool] | None = None
