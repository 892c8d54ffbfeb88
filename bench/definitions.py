"""Definitions of the contestants: the weight that each multiplies by, in float64, densely.

Layers of PEFT and LyCORIS are compared with the weight that their own code merges. The layers of
peers.py are compared with matrices built from the definition, and with all gradients through them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contestants import FLOOR, OURS, Shape, batch, build, frozen
from correctness import compare, dense_rotation
from peers import LycorisBOFT

SMALL = Shape(256, 48, 97)


def check_definition(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a contestant's output and gradients with its definition, on a layer of 256 features.

    Raises:
        AssertionError: they differ.
    """
    if name == FLOOR or name in OURS:  # correctness.py checks ours
        return
    base, (x, grad) = frozen(SMALL, device, dtype), batch(SMALL, device, dtype)
    entry = build(name, base)
    leaves = entry.trainable()
    y = entry.layer(x)
    actual = torch.autograd.grad(y, (x, *leaves), grad)

    x64 = x.detach().cpu().double().requires_grad_(True)
    leaves64 = [leaf.detach().cpu().double().requires_grad_(True) for leaf in leaves]
    weight64 = base.weight.detach().cpu().double()
    defined = DEFINITIONS.get(name)
    weight64 = _merged(entry.layer) if defined is None else defined(leaves64, weight64)
    y64 = F.linear(x64, weight64, base.bias.cpu().double())
    wanted = (x64,) if defined is None else (x64, *leaves64)
    expected = torch.autograd.grad(y64, wanted, grad.cpu().double())
    compare(f"{name}: output", y, y64, dtype)
    for i, (one, other) in enumerate(zip(actual, expected)):
        compare(f"{name}: gradient of {'x' if i == 0 else f'parameter {i}'}", one, other, dtype)


def _merged(layer: torch.nn.Module) -> torch.Tensor:
    """The weight that PEFT's own code merges, in float64, or LyCORIS' in its dtype."""
    if isinstance(layer, LycorisBOFT):
        return layer.adapter.get_merged_weight()[0].detach().cpu().double()
    layer = copy.deepcopy(layer).cpu().double()
    layer.merge()
    return layer.get_base_layer().weight.detach()


def _peft_boft(leaves: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    parameter, scale = leaves
    b = parameter.shape[-1]
    i, j = torch.triu_indices(b, b, 1)
    skew = -0.5 * (parameter - parameter.mT)[..., i, j]  # PEFT's block is (I - S)(I + S)^-1
    return scale * (weight @ dense_rotation(skew, b).T)


def _plain_boft(leaves: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    skew, scale = leaves
    return scale[:, None] * (weight @ dense_rotation(skew, 8).T)


def _more(leaves: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    right, left = leaves
    k, rank, _ = right.shape
    mixing = torch.eye(k * rank, dtype=right.dtype).view(k, rank, -1).transpose(0, 1).flatten(0, 1)
    outer = torch.block_diag(*left).view(k, -1, k * rank).transpose(0, 1).flatten(0, 1)
    return weight + outer @ mixing @ torch.block_diag(*right)


DEFINITIONS: dict[str, Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "peft-boft": _peft_boft,
    "peft-boft-activation": _peft_boft,
    "compiled-boft": _plain_boft,
    "more": _more,
}
