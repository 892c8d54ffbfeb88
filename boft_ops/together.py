"""The rotations of many layers in one launch: a model has hundreds, each of them tiny."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from . import _checks
from ._layer import BOFTLayer
from .rotation import MAX_SIZE, Rotation


def rotations(
    skews: Sequence[torch.Tensor], drops: Sequence[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """Every butterfly matrix R of a list, as its dense groups, all in one launch.

    For ``boft_linear(..., rotation=...)``. R is block-diagonal with groups of S = b 2^(m-1)
    features: this is cayley, multiplicative dropout and the product of the m factors at once.

    Args:
        skews: tensors (m, K, b(b-1)/2), packed as for ``cayley``, with the same m and b and any K;
            S <= 64.
        drops: for each of them a boolean (m, K), true for blocks that are to be the identity, or
            None.

    Returns:
        For each of them (K b / S, S, S), in at least float32.

    Raises:
        TypeError: a skew is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, no butterfly has this shape, or S > 64.
    """
    skews = list(skews)
    drops = [None] * len(skews) if drops is None else list(drops)
    if len(drops) != len(skews):
        raise ValueError(
            f"drops: expected {len(skews)} masks, as there are skews, got {len(drops)}"
        )
    if not skews:
        return []
    for i, (skew, drop) in enumerate(zip(skews, drops, strict=True)):
        _check(f"skews[{i}]", skew, skews[0])
        if drop is not None and (drop.dtype != torch.bool or drop.shape != skew.shape[:2]):
            raise ValueError(
                f"drops[{i}]: expected a boolean {tuple(skew.shape[:2])}, "
                f"got {drop.dtype} {tuple(drop.shape)}"
            )
    mask = None
    if any(drop is not None for drop in drops):
        masks = [
            skew.new_zeros(skew.shape[:2], dtype=torch.bool) if drop is None else drop
            for skew, drop in zip(skews, drops, strict=True)
        ]
        mask = torch.cat(masks, 1)
    stage = Rotation.apply(torch.cat(skews, 1) if len(skews) > 1 else skews[0], mask)
    m = len(skews[0])
    return list(stage.split([skew.shape[1] >> (m - 1) for skew in skews]))


def _check(name: str, skew: torch.Tensor, first: torch.Tensor) -> None:
    _checks.tensor(name, skew)
    if skew.dim() != 3 or skew.shape[::2] != first.shape[::2]:
        raise ValueError(
            f"{name}: expected shape (n_factors, d/block_size, block_size*(block_size-1)/2) with "
            f"the first and last size of skews[0], {tuple(first.shape)}, got {tuple(skew.shape)}"
        )
    if skew.dtype != first.dtype:
        raise TypeError(f"{name}: expected the dtype of skews[0], {first.dtype}, got {skew.dtype}")
    _checks.same_device(name, skew, "skews[0]", first)
    m, n_blocks, packed = skew.shape
    b = _checks.block_size_from_packed(name, packed)
    _checks.butterfly_shape(n_blocks * b, b, m)
    if b << (m - 1) > MAX_SIZE:
        raise ValueError(
            f"{name}: expected groups of block_size * 2**(n_factors-1) <= {MAX_SIZE} features, got "
            f"{b << (m - 1)}"
        )


class _Shared(NamedTuple):
    stage: torch.Tensor
    version: int  # of the skew that it was computed from
    owner: ref[Together]


# Not on the layers: what holds a graph can be neither copied nor pickled with them.
_shared: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()


class Together:
    """Computes the rotations of all BOFTLinear layers of a model at the start of its forward.

    One launch for all layers of equal n_factors and block_size, and one in backward, instead of
    one for each layer. Numbers, gradients and dropout are those of the layers on their own.
    Layers it cannot serve (merged, interpolated, kaleidoscopes, "neumann5", groups of more than 64
    features, inside a compiled graph) compute their own. Activation checkpointing works with
    ``use_reentrant=False``; the reentrant kind runs backward once for every segment, through a
    graph that can be run once.

    Args:
        model: the module whose forward is the step; its layers may change later.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.running = False
        self._handles = (
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        )

    def remove(self) -> None:
        """The layers compute their own rotations again."""
        for handle in self._handles:
            handle.remove()
        for layer in [layer for layer, shared in _shared.items() if shared.owner() is self]:
            del _shared[layer]

    def _before(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        groups = defaultdict(list)
        for layer in model.modules():
            if isinstance(layer, BOFTLayer) and isinstance(layer, nn.Linear) and _fits(layer):
                skew = layer.skew
                groups[skew.shape[0], skew.shape[2], skew.dtype, skew.device].append(layer)
        for layers in groups.values():
            skews = [layer.skew for layer in layers]
            stages = rotations(skews, [layer.dropout.draw(layer.skew) for layer in layers])
            for layer, stage in zip(layers, stages, strict=True):
                _shared[layer] = _Shared(stage, layer.skew._version, ref(self))
        self.running = True

    def _after(self, model: nn.Module, args: tuple, output: object) -> None:
        self.running = False


def _fits(layer: BOFTLayer) -> bool:
    return (
        not layer.merged
        and layer.n_identity == 0
        and not layer.kaleidoscope
        and layer.method == "exact"
        and layer.block_size << (layer.n_factors - 1) <= MAX_SIZE
    )


def shared_rotation(layer: BOFTLayer) -> torch.Tensor | None:
    """The rotation that was computed for this layer and this step, if there is one."""
    # first whether it is a graph that is made: Dynamo would guard on what other models share
    if torch.compiler.is_compiling() or not _shared:
        return None
    shared = _shared.get(layer)
    if shared is None or not _fits(layer) or shared.version != layer.skew._version:
        return None
    owner = shared.owner()
    # In backward: a checkpoint computes a part of the step again, with the masks that it had.
    now = owner is not None and (owner.running or torch._C._current_graph_task_id() != -1)
    trained = torch.is_grad_enabled() and layer.skew.requires_grad
    return shared.stage if now and (shared.stage.requires_grad or not trained) else None
