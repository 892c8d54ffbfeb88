"""PEFT's BOFT layers through this package's operators. Needs PEFT."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.boft import layer as peft_boft
from torch import nn
from torch.overrides import TorchFunctionMode

from ..._runtime import checks
from ...ops.rotation import SkewRotation
from .layers import Rotated, RotatedInput, RotatedKernel
from .parameters import boft_skew


class BoftRotated(Rotated):
    """m factors (boft_R), a scale (boft_s), and dropout of blocks of one factor."""

    def _names(self):
        return self.boft_R

    def _adapter(self, name):
        return SkewRotation(boft_skew(self.boft_R[name]))

    def _drop(self, name, adapter):
        dropout = self.boft_dropout[name]
        if isinstance(dropout, nn.Identity) or not dropout.training:
            return None
        m, n_blocks, _ = adapter.skew.shape
        return draw_mask(m, n_blocks, dropout.p, adapter.skew.device)

    def _scale(self, name):
        return self.boft_s[name].flatten()

    def get_delta_weight(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense matrix R (d, d) and the scale (n, 1) of an adapter, for any m. For inspection:
        merging does not need it."""
        return self._dense_rotation(adapter), self._scale(adapter)[:, None]

    def update_layer(self, *args, **kwargs) -> None:
        """PEFT's, but m is what the config says, and no dense permutation is made."""
        with _no_dense_permutation():
            super().update_layer(*args, **kwargs)
        free_permutation(self)
        for name in self.boft_R:
            m, n_blocks, b, _ = self.boft_R[name].shape
            checks.butterfly_shape(n_blocks * b, b, m)

    def block_butterfly_perm(self, *args, **kwargs) -> None:
        """Nothing: the permutation is part of the indexing."""

    def perm2mat(self, indices: None) -> torch.Tensor:
        return torch.empty((), device="meta")


class BoftLinear(BoftRotated, RotatedInput, peft_boft.Linear):
    peft_class = peft_boft.Linear


class BoftConv2d(BoftRotated, RotatedKernel, peft_boft.Conv2d):
    peft_class = peft_boft.Conv2d

    def _rotated(self, adapters, scale, x, args, kwargs):
        x = x.to(self.base_layer.weight.dtype)
        return super()._rotated(adapters, scale, x, args, kwargs)


def draw_mask(m: int, n_blocks: int, p: float, device: torch.device) -> torch.Tensor:
    """A boolean (m, n_blocks), true for int(p n_blocks) blocks of one factor, chosen as PEFT does:
    the same draws from the CPU's generator, but in a compiled graph, where they are made on the
    device."""
    source = device if torch.compiler.is_compiling() else torch.device("cpu")
    factor = torch.randint(0, m, (1,), device=source)
    order = torch.randperm(n_blocks, device=source)
    chosen = torch.arange(m, device=source)[:, None] == factor
    return (chosen & (order < int(p * n_blocks))).to(device, non_blocking=True)


def free_permutation(layer: nn.Module) -> None:
    """Drop the dense (m, d, d) buffer."""
    layer._buffers.pop("boft_P", None)
    layer._non_persistent_buffers_set.discard("boft_P")


def restore_permutation(layer: nn.Module) -> None:
    """Make PEFT's buffer again, for the adapter that it was last made for, in its own class."""
    if not layer.boft_R:  # all were deleted: PEFT makes one with the next adapter
        return
    boft_R = list(layer.boft_R.values())[-1]
    m, n_blocks, b, _ = boft_R.shape
    layer.fbd_cuda_available = m > 1 or peft_boft._FBD_CUDA is not None
    d = n_blocks * b
    permutations = [
        layer.block_butterfly_perm(d, n_blocks >> i, b // 2, m - 1).to(boft_R.device)
        for i in range(m)
    ]
    eye = torch.eye(d, device=boft_R.device)
    layer.register_buffer("boft_P", eye[torch.stack(permutations)], persistent=False)


class _Diverted(TorchFunctionMode):
    """Sends PEFT's uninitialised (m, d, d) to the meta device, where nothing is allocated."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and len(args) == 1 and isinstance(args[0], tuple):
            size = args[0]
            if len(size) == 3 and size[1] == size[2]:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


_lock = threading.RLock()


@contextmanager
def _no_dense_permutation() -> Iterator[None]:
    """PEFT sets up a layer as if it had its CUDA extension, without which it would make m 1."""
    with _lock:
        before, peft_boft.get_fbd_cuda = peft_boft.get_fbd_cuda, lambda: True
        try:
            with _Diverted():
                yield
        finally:
            peft_boft.get_fbd_cuda = before
