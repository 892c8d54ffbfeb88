"""Frozen base layers: whether another layer may replace one, and the weight of a quantized one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._runtime.checks import FLOATING
from .._runtime.dtypes import HALVES
from .distributed import compute_device, is_fully_sharded
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


def check_initialized(base: nn.Module) -> None:
    """Raise ValueError if ``base`` is a lazy layer that has no shape yet."""
    if isinstance(base.weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"expected an initialized layer, got {type(base).__name__} without a shape yet "
            "(run it once)"
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


# The attributes that hold the sizes of linear layers: torch's and most others', AutoGPTQ's, and
# Conv1D's of transformers (GPT-2).
_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf"))
_CONV1D = "transformers.pytorch_utils.Conv1D"  # a name, as importing transformers takes seconds


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """The numbers of input and output features that a linear layer says it has, else None."""
    for names in _SIZES:
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(n, int) for n in sizes):
            return sizes
    return None


def is_conv1d(module: nn.Module) -> bool:
    """True for the Conv1D of transformers: a linear layer that stores its weight transposed."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}" == _CONV1D


def is_quantized(module: nn.Module) -> bool:
    """True if ``module`` is a linear layer whose weight is not a dense tensor of 16 bits or more.

    Such layers are made by torchao (an ``nn.Linear`` whose weight is a tensor subclass),
    bitsandbytes (a subclass with a packed weight), transformers (a subclass with a weight of 8 bits
    and its scales), GPTQ, AWQ and HQQ (modules with packed integers and no weight).
    """
    if linear_features(module) is None:
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        if is_sharded(weight):
            weight = weight.to_local()
        is_plain = is_dense(weight) or isinstance(weight, RotatedWeight)
        return not is_plain or weight.dtype not in FLOATING
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
        if weight.dtype in FLOATING and is_dense(weight):
            return weight.detach().mT if is_conv1d(module) else weight.detach()
        block_scales = getattr(module, "weight_scale_inv", None)
        if isinstance(block_scales, torch.Tensor) and weight.is_floating_point():
            return _scaled_by_blocks(weight, block_scales, getattr(module, "block_size", None))
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


def _scaled_by_blocks(
    weight: torch.Tensor, scales: torch.Tensor, block_size: tuple[int, int] | None
) -> torch.Tensor:
    """The weight that 8-bit floats with a scale for each block stand for, float32.

    Args:
        weight: (n, d), in a format of 8 bits, as in transformers' fine-grained fp8.
        scales: one for each block, or one for all; blocks at the end of a row or column may be cut.
        block_size: rows and columns of a block, or None for one scale.
    """
    scales = scales.detach().float()
    if block_size is not None:
        for dim, size in enumerate(block_size):
            scales = scales.repeat_interleave(size, dim)
        scales = scales[: weight.shape[0], : weight.shape[1]]
    return weight.detach().float() * scales


def like_base(base: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A frozen layer with the weight (n, d): a Conv1D if the base is one, else an nn.Linear."""
    n, d = weight.shape
    with torch.device("meta"):
        layer = type(base)(n, d) if is_conv1d(base) else nn.Linear(d, n, dtype=weight.dtype)
    weight = weight.mT.contiguous() if is_conv1d(base) else weight
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer.train(base.training)


def adapter_factory_kwargs(base: nn.Module) -> dict[str, torch.device | torch.dtype]:
    """The device of an adapter beside ``base``, and float64 beside float64, as keyword arguments.

    Where accelerate offloads the base, it is the device that the base is computed on.
    """
    kwargs: dict[str, torch.device | torch.dtype] = {}
    for tensor in (*base.parameters(), *base.buffers()):
        kwargs.setdefault("device", torch.device(compute_device(tensor)))
        if tensor.dtype == torch.float64:
            kwargs["dtype"] = torch.float64
    hook = getattr(base, "_hf_hook", None)
    if "device" in kwargs and kwargs["device"].type == "meta" and hook is not None:
        kwargs["device"] = torch.device(getattr(hook, "execution_device", None) or "cpu")
    return kwargs


def _offloaded_bias(base: nn.Module, device: torch.device) -> torch.Tensor:
    """The bias of a module that accelerate has offloaded, on ``device``."""
    stored = getattr(getattr(base, "_hf_hook", None), "weights_map", None)
    if stored is None:
        check_numbers({"bias": base.bias})
    return stored["bias"].to(device)


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
    if bias is not None and bias.is_meta and not x.is_meta:  # it is there during the call alone
        bias = _offloaded_bias(base, x.device)
        return base(x, *args, **kwargs), bias, bias
    is_trained = scale.requires_grad and torch.is_grad_enabled()
    if bias is None or not is_trained or x.dtype not in HALVES or "bias" not in base._parameters:
        return base(x, *args, **kwargs), bias, bias
    zeros = {"bias": torch.zeros_like(bias)}
    return torch.func.functional_call(base, zeros, (x, *args), kwargs), None, bias
