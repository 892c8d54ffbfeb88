"""Learning rates that carry over from one (n_factors, block_size) to another."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from .._runtime import checks
from .adapter_parameters import HasAdapter
from .config import RotationConfig


def param_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Sort the trained parameters of an adapted model into groups for AdamW, with their rates.

    AdamW changes each number of ``skew`` by about its learning rate in a step, so the change of R
    grows with the number of numbers that turn one feature. Here the rate of each skew is chosen so
    that a step changes R equally for every block_size and n_factors: by about 9 lr radians, as
    BOFT(2, 8) with the learning rate lr does (docs/layers.md). Scales and other parameters train
    with lr.

    Weight decay pulls towards zero, which is the pretrained layer for a skew and a scale_offset,
    but an output of zero for PEFT's boft_s. None of them has any; ``weight_decay`` is for the other
    parameters, such as a head.

    Args:
        model: an adapted model, a BOFT layer, or a PEFT model with BOFT or OFT layers, accelerated
            or not, whose ``boft_R`` and ``oft_R`` are the skews.
        lr: the learning rate of BOFT(2, 8), positive.
        weight_decay: that of parameters which are neither skew nor scale, not negative.

    Returns:
        Dicts with "params", "lr" and "weight_decay", as optimizers take them: one for each rate of
        skews, one for the scales, one for the other trained parameters. Empty groups are left out.

    Raises:
        TypeError: ``model`` is not an nn.Module, or a number is none.
        ValueError: a number is out of range, or no skew of the model requires a gradient.
    """
    checks.module("model", model)
    checks.number("lr", lr, positive=True)
    checks.number("weight_decay", weight_decay)
    skews: dict[float, list[nn.Parameter]] = {}
    scales: list[nn.Parameter] = []
    adapters: set[torch.Tensor] = set()  # tensors compare by identity here
    for module in model.modules():
        for skew, scale, config in _rotations(module):
            if skew.requires_grad and skew not in adapters:
                rate = lr * _turn(RotationConfig()) / _turn(config)
                skews.setdefault(rate, []).append(skew)
            if scale is not None and scale.requires_grad and scale not in adapters:
                scales.append(scale)
            adapters |= {skew, scale}
    if not skews:
        raise ValueError("model: expected a BOFT layer whose skew requires a gradient, got none")
    others = [p for p in model.parameters() if p.requires_grad and p not in adapters]
    groups = [{"params": same, "lr": rate, "weight_decay": 0.0} for rate, same in skews.items()]
    groups.append({"params": scales, "lr": lr, "weight_decay": 0.0})
    groups.append({"params": others, "lr": lr, "weight_decay": weight_decay})
    return [group for group in groups if group["params"]]


def _rotations(
    module: nn.Module,
) -> Iterator[tuple[nn.Parameter, nn.Parameter | None, RotationConfig]]:
    """Yield (skew, scale, config) for each rotation that ``module`` itself has.

    The layers of PEFT are known by the names of their parameters. A step changes Q as one of skew
    does: PEFT's Q is half the difference of two numbers of boft_R, which move in opposite
    directions, and the numbers of oft_R up to their sign.
    """
    if isinstance(module, HasAdapter):
        yield module.skew, module.scale_offset, module.config
    if isinstance(boft := getattr(module, "boft_R", None), nn.ParameterDict):
        for name, blocks in boft.items():
            m, _, b, _ = _shape(blocks)
            yield blocks, module.boft_s[name], RotationConfig(block_size=b, n_factors=m)
    if isinstance(oft := getattr(module, "oft_R", None), nn.ModuleDict):
        for rotation in oft.values():
            b = checks.block_size_from_packed("oft_R", _shape(rotation.weight)[-1])
            yield rotation.weight, None, RotationConfig(block_size=b, n_factors=1)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also while it lies in the shards of ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _turn(config: RotationConfig) -> float:
    """The angle, root mean square, by which changing each number of skew by 1 turns a vector.

    Near the identity R changes by 2 dQ for each factor. A feature meets b/2 - 1 neighbors of its
    own chunk in all m factors: their gradients agree, so their steps add up to m. It meets b/2
    features of another chunk in each factor, other ones in each, so these m b/2 steps are
    independent. The 2 l butterflies of a kaleidoscope agree as the factors do.
    """
    m, half = config.n_factors, config.block_size / 2
    if half < 1:
        return 1.0  # a block of one feature has no numbers
    copies = 2 * config.kaleidoscope or 1
    return 2 * copies * math.sqrt(m * m * (half - 1) + m * half)
