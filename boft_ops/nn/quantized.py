"""Which linear modules are quantised, and the weight that one stands for."""

from __future__ import annotations

import torch
from torch import nn


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer whose weight is no plain floating-point matrix.

    As torchao makes them (an ``nn.Linear`` with a weight of a tensor subclass), bitsandbytes (a
    subclass with a packed weight), GPTQ or AWQ (modules with packed integers and no weight at all).
    """
    features = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(n, int) for n in features):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return not weight.is_floating_point() or not _is_plain(weight)
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(not tensor.is_floating_point() for tensor in own)


def _is_plain(weight: torch.Tensor) -> bool:
    # a Parameter around a tensor subclass is of that subclass
    return type(weight) in (torch.Tensor, nn.Parameter, nn.parameter.UninitializedParameter)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The (n, d) floating-point weight that a linear module multiplies with.

    Raises:
        ValueError: there is no way known here to read it.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        if weight.is_floating_point() and _is_plain(weight):
            return weight.detach()
        state = getattr(weight, "quant_state", None)
        if state is not None:  # bitsandbytes, 4 bits
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, state)
        scales = getattr(weight, "SCB", None)
        if scales is None:  # a forward pass has moved it there
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is not None and weight.dtype == torch.int8:  # bitsandbytes, 8 bits
            return weight.data.float() * (scales.float() / 127)[:, None]
        if not _is_plain(weight) and hasattr(weight, "dequantize"):  # torchao
            return weight.dequantize().detach()
    raise ValueError(
        f"base: expected a weight that can be made dense (plain, torchao's, bitsandbytes'), got "
        f"{type(module).__name__}"
    )
