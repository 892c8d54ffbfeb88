"""Accelerated forms of PEFT's BOFT layers. Needs PEFT.

PEFT's code has two shapes. Up to 0.21 it composes dense matrices by a CUDA extension, and keeps
its permutations as matrices. Its pull request 3540 rotates activations by indices: there is no
extension, and ``boft_P`` has integers. ``uses_extension`` tells them apart, and only where that is
true is a name looked up that belongs to the first shape alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.boft import layer as peft_boft
from torch import nn
from torch.overrides import TorchFunctionMode

from ..._runtime import checks
from ...ops.rotation import SkewRotation
from .base import onloaded
from .layers import Rotated, RotatedInput, RotatedKernel
from .parameters import boft_skew


class BoftRotated(Rotated):
    """PEFT's BOFT: m factors (boft_R), a scale (boft_s), and dropout of blocks of one factor."""

    def _names(self):
        return self.boft_R

    def _adapter(self, name):
        with onloaded(self.boft_R):
            return SkewRotation(boft_skew(self.of_all_ranks(self.boft_R[name])))

    def _sources(self, name):
        return self.boft_R[name], self.boft_s[name]

    def _drop(self, name, adapter):
        dropout = self.boft_dropout[name]
        if isinstance(dropout, nn.Identity) or not dropout.training:
            return None
        m, n_blocks, _ = adapter.skew.shape
        return draw_mask(m, n_blocks, dropout.p, adapter.skew.device)

    def _scale(self, name):
        with onloaded(self.boft_s):
            return self.of_all_ranks(self.boft_s[name]).flatten()

    def get_delta_weight(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense matrix R (d, d) and the scale (n, 1) of an adapter, for inspection.

        Merging does not use it.
        """
        return self.dense_rotation(adapter), self.at_strength(adapter)[1][:, None]

    def update_layer(self, *args, **kwargs) -> None:
        """Add an adapter as PEFT does, with the m of the config and no dense permutation.

        Raises:
            ValueError: there is no such butterfly; the message lists the nearest valid ones.
        """
        with _no_dense_permutation(self):
            super().update_layer(*args, **kwargs)
        free_permutation(self)
        self.note_shards()
        for name in self.boft_R:
            m, n_blocks, b, _ = self.boft_R[name].shape
            checks.butterfly_shape(n_blocks * b, b, m)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Load as torch does, with one factor where there is one to load.

        Without its CUDA extension PEFT lowers m to 1, saves that, and says m > 1 in the config.
        """
        for name, parameter in self.boft_R.items():
            loaded = state_dict.get(f"{prefix}boft_R.{name}")
            if loaded is not None and loaded.shape == (1, *parameter.shape[1:]) != parameter.shape:
                one = nn.Parameter(parameter.detach()[:1].clone(), parameter.requires_grad)
                self.boft_R[name] = one
                _note_lowered(name, len(parameter), args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)


class BoftLinear(BoftRotated, RotatedInput, peft_boft.Linear):
    peft_class = peft_boft.Linear


class BoftConv2d(BoftRotated, RotatedKernel, peft_boft.Conv2d):
    peft_class = peft_boft.Conv2d

    def _rotated(self, adapters, scale, x, args, kwargs):
        x = x.to(self.base_layer.weight.dtype)  # as PEFT does
        return super()._rotated(adapters, scale, x, args, kwargs)


_last_load: list | None = None


def _note_lowered(name: str, wanted: int, load: list) -> None:
    """Warn that an adapter has one factor, once for each load of a state dict.

    Args:
        name: of the adapter.
        wanted: the number of factors in its config.
        load: the list of errors, which torch makes anew for each load; all layers share it.
    """
    global _last_load
    if load is not _last_load:
        _last_load = load  # the list is kept, so that no other load can have its identity
        warnings.warn(
            f"boft_ops: adapter {name!r}: n_factors is 1, as in the tensors loaded, not {wanted} "
            "as in the config: PEFT lowered it where its CUDA extension could not be built",
            stacklevel=2,
        )


def draw_mask(m: int, n_blocks: int, p: float, device: torch.device) -> torch.Tensor:
    """Draw a boolean mask (m, n_blocks) with int(p n_blocks) blocks of one factor, as PEFT does.

    The draws are PEFT's, from the CPU's generator. In a compiled graph they are made on ``device``.
    """
    source = device if torch.compiler.is_compiling() else torch.device("cpu")
    factor = torch.randint(0, m, (1,), device=source)
    order = torch.randperm(n_blocks, device=source)
    chosen = torch.arange(m, device=source)[:, None] == factor
    return (chosen & (order < int(p * n_blocks))).to(device, non_blocking=True)


def uses_extension() -> bool:
    """True if the installed PEFT multiplies several factors by its CUDA extension alone."""
    return hasattr(peft_boft, "get_fbd_cuda")


def free_permutation(layer: nn.Module) -> None:
    """Delete PEFT's buffer if it is dense, (m, d, d); indices (m, d) stay."""
    permutation = layer._buffers.get("boft_P")
    if permutation is not None and permutation.dim() == 3:
        del layer._buffers["boft_P"]
        layer._non_persistent_buffers_set.discard("boft_P")


def restore_permutation(layer: nn.Module) -> None:
    """Make PEFT's dense buffer again, for the last adapter; the layer must be of PEFT's class.

    There is nothing to do if PEFT keeps indices, or if all adapters were deleted: PEFT makes the
    buffer with the next one.
    """
    if not uses_extension() or not layer.boft_R:
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


class _PermutationOnMeta(TorchFunctionMode):
    """Moves PEFT's uninitialized (m, d, d) to the meta device, where nothing is allocated."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and len(args) == 1 and isinstance(args[0], tuple):
            size = args[0]
            if len(size) == 3 and size[1] == size[2]:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


_lock = threading.RLock()


@contextmanager
def _no_dense_permutation(layer: BoftRotated) -> Iterator[None]:
    """Context manager: PEFT sets up ``layer`` without a dense permutation.

    PEFT sees its CUDA extension, without which it would set m to 1, and makes its permutation
    matrices on the meta device. A PEFT without the extension makes none, and is left alone.
    """
    if not uses_extension():
        yield
        return
    makers = {
        "block_butterfly_perm": lambda *args: None,
        "perm2mat": lambda indices: torch.empty((), device="meta"),
    }
    with _lock:
        before, peft_boft.get_fbd_cuda = peft_boft.get_fbd_cuda, lambda: True
        vars(layer).update(makers)
        try:
            with _PermutationOnMeta():
                yield
        finally:
            peft_boft.get_fbd_cuda = before
            for name in makers:
                del vars(layer)[name]
