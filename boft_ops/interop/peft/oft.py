"""Accelerated forms of PEFT's OFT layers. Needs PEFT."""

from __future__ import annotations

import torch
from peft.tuners.oft import layer as peft_oft
from torch import nn

from ..._runtime import autocast
from ...ops.rotation import DenseRotation, SkewRotation
from .base import is_unhooked
from .layers import Rotated, RotatedInput, RotatedKernel
from .parameters import TERMS, oft_skew


class OftRotated(Rotated):
    """PEFT's OFT: one factor, no scale. Its ``module_dropout`` has no effect in PEFT, nor here."""

    def _names(self):
        return self.oft_R

    def _adapter(self, name):
        module = self.oft_R[name]
        if not is_unhooked(module, peft_oft.OFTRotationModule):
            return DenseRotation(blocks_by_call(module), orthogonal=not module.use_cayley_neumann)
        if module.coft:
            with torch.no_grad():
                module.weight.copy_(module._project_batch(module.weight, eps=module.eps))
        weight = self.of_all_ranks(module.weight)
        if module.coft:
            weight = weight.clone()  # saved for backward; the next call projects in place
        if module.block_share:
            weight = weight.expand(module.in_features // module.block_size, -1).contiguous()
        neumann, terms = module.use_cayley_neumann, module.num_cayley_neumann_terms
        if neumann and terms != TERMS:
            blocks = module._cayley_batch(weight, module.block_size, True, terms)
            return DenseRotation(blocks, orthogonal=False)
        method = "neumann5" if neumann else "exact"
        return SkewRotation(oft_skew(weight, neumann=neumann), method)

    def _sources(self, name):
        return (self.oft_R[name].weight,)

    def update_layer(self, *args, **kwargs) -> None:
        super().update_layer(*args, **kwargs)
        self.note_shards()

    def _nearest_first(self, names):
        # x meets the first active adapter first, although PEFT merges as if x met the last first.
        return names[::-1]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The dense matrix R (d, d) of an adapter, for inspection; merging does not use it."""
        return self.dense_rotation(adapter)


class OftLinear(OftRotated, RotatedInput, peft_oft.Linear):
    peft_class = peft_oft.Linear


class OftConv2d(OftRotated, RotatedKernel, peft_oft.Conv2d):
    peft_class = peft_oft.Conv2d


def blocks_by_call(module: nn.Module) -> torch.Tensor:
    """The blocks (K, b, b) of PEFT's rotation module, by its own forward.

    Hooks of the module bring its numbers in (offload), gather them (FSDP) or look at them, and run
    only when it is called.
    Its output for a row of all blocks' unit vectors e_i is row i of every block.
    """
    weight, b = module.weight, module.block_size
    n_blocks = module.in_features // b
    device = "cpu" if weight.is_meta else weight.device  # an offload hook moves the rows
    rows = torch.eye(b, dtype=weight.dtype, device=device).repeat(1, n_blocks)
    with autocast.disabled(rows.device.type):
        return module(rows).reshape(b, n_blocks, b).transpose(0, 1).contiguous()
