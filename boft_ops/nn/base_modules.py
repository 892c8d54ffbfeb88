"""Frozen base layers: whether another layer may replace one, and the weight of a quantized one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._runtime.dtypes import HALVES
from .distributed import is_fully_sharded
from .rotated_weight import RotatedWeight, is_dense, is_sharded


def check_numbers(
    tensors: Mapping[str, torch.Tensor | None], x: torch.Tensor | None = None
) -> None:
    """Raise ValueError if a tensor is a placeholder on the meta device, which has no numbers.

    Offloading leaves placeholders between calls, and a model that is built on the meta device has
    them until it is loaded. torch raises for neither: copying into one does nothing, and operators
    that get one beside other tensors return memory that nobody has written to.

    Args:
        tensors: by the names that messages use; None is passed over.
        x: the input that is computed with; if it is a placeholder itself, all may be.
    """
    if x is not None and x.is_meta:
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_meta:
            raise ValueError(
                f"{name}: expected numbers, got a placeholder on the meta device, of a model that "
                "is offloaded or not loaded yet"
            )


def check_forward(base: nn.Module, base_class: type[nn.Module]) -> None:
    """Raise TypeError unless ``base`` computes the forward of torch's ``base_class``."""
    for method in ("forward", "_conv_forward"):
        if getattr(type(base), method, None) is not getattr(base_class, method, None):
            raise TypeError(
                f"expected a plain {base_class.__name__}, got {type(base).__name__} with its own "
                f"{method}(), which another layer in its place would lose"
            )


def check_unmodified(base: nn.Module) -> None:
    """Raise ValueError if ``base`` has hooks, parametrizations or a forward of its instance."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    if (
        any((*hooks, base._backward_pre_hooks))
        or parametrize.is_parametrized(base)
        or "forward" in vars(base)
    ):
        raise ValueError(
            f"expected a {type(base).__name__} without hooks and parametrizations, and with its "
            "class's forward(), got one that has some, which another layer in its place would lose"
        )


def is_quantized(module: nn.Module) -> bool:
    """True if ``module`` is a linear layer whose weight is not a dense floating-point tensor.

    Such layers are made by torchao (an ``nn.Linear`` whose weight is a tensor subclass),
    bitsandbytes (a subclass with a packed weight), GPTQ and AWQ (modules with packed integers and
    no weight).
    """
    features = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(n, int) for n in features):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        if is_sharded(weight):
            weight = weight.to_local()
        is_plain = is_dense(weight) or isinstance(weight, RotatedWeight)
        return not is_plain or not weight.is_floating_point()
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(not tensor.is_floating_point() for tensor in own)


def is_tensor_parallel(module: nn.Module) -> bool:
    """True if torch's or transformers' tensor parallelism has cut the weight of a linear module.

    Both wrap the forward of the module, which the parameters of an FSDP group do not need.
    """
    weight = module._parameters.get("weight")
    classes = (cls.__module__ for cls in type(module).__mro__)
    is_fsdp = any(name.startswith("torch.distributed.fsdp") for name in classes)
    is_wrapped = bool(module._forward_pre_hooks) or "forward" in vars(module)
    return weight is not None and is_sharded(weight) and is_wrapped and not is_fsdp


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The floating-point weight (out_features, in_features) that a linear module multiplies by.

    Raises:
        ValueError: the weight is stored in a form that cannot be read here.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        if weight.is_floating_point() and is_dense(weight):
            return weight.detach()
        state = getattr(weight, "quant_state", None)
        if state is not None:  # bitsandbytes, 4 bits
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, state)
        scales = getattr(weight, "SCB", None)
        if scales is None:  # a forward pass has moved it to the module's state
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is not None and weight.dtype == torch.int8:  # bitsandbytes, 8 bits
            return weight.data.float() * (scales.float() / 127)[:, None]
        if not is_dense(weight) and hasattr(weight, "dequantize"):  # torchao
            return weight.dequantize().detach()
    raise ValueError(
        f"base: expected a weight that can be made dense (plain, torchao's, bitsandbytes'), got "
        f"{type(module).__name__}"
    )


def call_for_scale(
    base: nn.Module, scale: torch.Tensor, x: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The output of a frozen linear module, to be scaled around its bias.

    In half precision a large bias takes the digits of the product that the scale's gradient is
    made of, once both are rounded together. Where that gradient is wanted, the module is therefore
    called with a bias of zeros.

    Returns:
        The output y, the bias that it holds (the center of the scale) or None, and the bias.
    """
    bias = getattr(base, "bias", None)
    bias = bias if isinstance(bias, torch.Tensor) else None
    if bias is not None and is_fully_sharded(base):  # whole inside the call alone
        y = base(x, *args, **kwargs)
        bias = (bias.full_tensor() if is_sharded(bias) else bias).to(y.dtype)
        return y, bias, bias
    is_trained = scale.requires_grad and torch.is_grad_enabled()
    if bias is None or not is_trained or x.dtype not in HALVES or "bias" not in base._parameters:
        return base(x, *args, **kwargs), bias, bias
    zeros = {"bias": torch.zeros_like(bias)}
    return torch.func.functional_call(base, zeros, (x, *args), kwargs), None, bias
