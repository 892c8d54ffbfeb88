"""The weight of a rotated layer as other code reads it: rotated, differentiable and lazy."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .._runtime import autocast, internals
from .._runtime.namespace import PACKAGE
from .dropout import MultiplicativeDropout

# Functions that read numbers, or hand out memory, without going through torch's dispatcher.
_READS = (
    *(torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__repr__),
    *(torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage),
    *(torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__, torch.Tensor.__dlpack__),
)
_DATA_GET, _DATA_SET = torch.Tensor.data.__get__, torch.Tensor.data.__set__
_REQUIRES_GRAD_GET = torch.Tensor.requires_grad.__get__
_REQUIRES_GRAD_SET = torch.Tensor.requires_grad.__set__


def rotated_weight(
    compute: Callable[..., torch.Tensor], frozen: torch.Tensor, *trained: torch.Tensor | None
) -> torch.Tensor:
    """The tensor compute(frozen, *trained), which is computed when its numbers are first read.

    Args:
        compute: a differentiable function whose result has the shape, dtype and device of
            ``frozen``; it is called again in backward and must then return the same.
        frozen: the weight that is rotated.
        trained: the other tensors that the result depends on.

    Returns:
        A ``RotatedWeight``; in traced graphs and under functorch the computed tensor; if
        ``frozen`` is a placeholder on the meta device or a shard, ``frozen``.
    """
    # Offloading reads its placeholders in order to replace them, and FSDP its shards.
    if frozen.is_meta or is_sharded(frozen):
        return frozen
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not is_traced and _is_read_by_pipelining():
        return frozen
    if is_traced or internals.has_transforms():
        return compute(frozen, *trained)
    weight = Weight(compute, frozen, trained)
    return Rotate.apply(weight, frozen, *trained)


def _is_read_by_pipelining() -> bool:
    """True if torch.distributed.pipelining reads the attribute ``weight`` of a layer.

    It looks up every parameter by its name, and finds the parameter's stage by its identity.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(f"{PACKAGE}."):
        frame = frame.f_back  # out of this package, to the reader of the property
    reader = "" if frame is None else frame.f_globals.get("__name__", "")
    return reader.startswith("torch.distributed.pipelining")


def is_dense(tensor: torch.Tensor) -> bool:
    """True if the tensor is no subclass, such as a quantized or a sharded one."""
    # a Parameter around a tensor subclass is of that subclass
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.parameter.UninitializedParameter)


def is_sharded(tensor: torch.Tensor) -> bool:
    """True if the tensor is a DTensor, told without importing torch.distributed."""
    return hasattr(tensor, "placements")


def one_draw(dropout: MultiplicativeDropout) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """Return ``dropout.draw`` as a function that draws once: backward needs the same mask."""
    masks: list[torch.Tensor | None] = []

    def draw(skew: torch.Tensor) -> torch.Tensor | None:
        if not masks:
            masks.append(dropout.draw(skew))
        return masks[0]

    return draw


class Weight:
    """The computation of one rotated weight, done at most once."""

    def __init__(self, compute: Callable, frozen: torch.Tensor, trained: tuple) -> None:
        self._compute, self.frozen, self._trained = compute, frozen, trained
        self._numbers: torch.Tensor | None = None

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Weight:
        """A weight that is computed already."""
        return cls(lambda tensor: tensor, numbers, ())

    def compute(self, *sources: torch.Tensor | None) -> torch.Tensor:
        with autocast.disabled(self.frozen.device.type):
            return self._compute(*sources)

    def numbers(self) -> torch.Tensor:
        """The computed weight without a gradient, contiguous."""
        if self._numbers is None:
            with torch.inference_mode(False), torch.no_grad():  # gradients may be wanted later
                self._numbers = self.compute(self.frozen, *self._trained).contiguous()
        return self._numbers

    def check_written(self, value: torch.Tensor) -> None:
        """Raise ValueError if ``value``, a new frozen weight, was made from the rotated one.

        That is told by the numbers: such a value, rounded or masked, is nearer to the rotated
        weight than to the frozen one.
        """
        frozen = self.frozen
        is_similar = value.shape == frozen.shape and value.is_floating_point() and is_dense(value)
        if not is_similar or value.is_meta or frozen.is_meta:
            return
        value = value.detach().to(frozen)
        if torch.dist(value, self.numbers()) < torch.dist(value, frozen.detach()) / 2:
            raise ValueError(
                "weight: expected a new frozen weight, got one that was made from the rotated "
                "weight and would be rotated twice: merge() first, or start from frozen_weight"
            )


class RotatedWeight(torch.Tensor):
    """The weight that an unmerged layer multiplies by, computed when its numbers are first read.

    Code that only asks for a shape, a dtype or a device therefore costs no rotation.
    Operators get the computed tensor, and gradients of this tensor reach skew and scale.
    Writing into it raises, because nobody would see the result.
    Assigning ``data`` or ``requires_grad`` is passed on to the frozen weight, as code that moves,
    swaps or unfreezes weights means that one.
    """

    _weight: Weight
    _is_moved = False  # True after .to() another device

    def check_written(self, value: torch.Tensor) -> None:
        """Raise ValueError if ``value``, a new frozen weight, was made from this one."""
        self._weight.check_written(value)

    @staticmethod
    def wrap(weight: Weight) -> RotatedWeight:
        like = weight.frozen
        tensor = torch.Tensor._make_wrapper_subclass(
            RotatedWeight, like.shape, dtype=like.dtype, device=like.device
        )
        tensor._weight = weight
        return tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        first, kwargs = args[0] if args else None, kwargs or {}
        if isinstance(first, RotatedWeight):
            if func == _DATA_GET:
                return RotatedWeight.wrap(first._weight)
            if func == _DATA_SET:
                value = tree_map_only(RotatedWeight, _numbers, args[1])
                first._weight.check_written(value)
                first._weight.frozen.data = value
                return None
            if func is torch.Tensor.requires_grad_ or func == _REQUIRES_GRAD_SET:
                first._weight.frozen.requires_grad_(*args[1:], **kwargs)
                return first
            if func is torch.Tensor.__setitem__:
                raise _written()
            if func == _REQUIRES_GRAD_GET and first._is_moved:
                # Code that moves a model gives the new Parameter what it reads here.
                return first._weight.frozen.requires_grad
        if func in _READS or func == _DATA_SET:
            args = tree_map_only(RotatedWeight, _numbers, args)
        with internals.NoTorchFunction():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                index = func._schema.arguments.index(argument)
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                if isinstance(value, RotatedWeight):
                    raise _written()
        device = kwargs.get("device")
        is_moved = func is torch.ops.aten._to_copy.default and device not in (None, args[0].device)
        if is_moved:
            args[0]._is_moved = True
            if device.type == "meta":  # offloading puts a placeholder in, which needs no numbers
                return torch.empty_like(args[0]._weight.frozen.detach(), **kwargs)
        read, kwargs = tree_map_only(RotatedWeight, _numbers, (args, kwargs))
        result = func(*read, **kwargs)
        if is_moved and not torch.equal(read[0], args[0]._weight.frozen):
            # Code that moves a model by reading its weights makes a Parameter of the result, and
            # the layer would rotate it twice. Torch refuses to make a Parameter of this class.
            return RotatedWeight.wrap(Weight.of(result))
        return result


class Rotate(torch.autograd.Function):
    """The lazy weight as a function of its sources."""

    @staticmethod
    def forward(ctx, weight, frozen, *trained):
        # A detached frozen weight keeps its numbers if the Parameter gets other ``data``.
        frozen = frozen if frozen.requires_grad else frozen.detach()
        ctx.save_for_backward(frozen, *trained)
        ctx.weight = weight
        return RotatedWeight.wrap(weight)

    @staticmethod
    def backward(ctx, grad):
        sources = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        wanted = [s for s, need in zip(sources, needed, strict=True) if need]
        with torch.enable_grad():
            weight = ctx.weight.compute(*sources)
        create_graph = torch.is_grad_enabled()
        options = {"create_graph": create_graph, "allow_unused": True}
        grads = iter(torch.autograd.grad(weight, wanted, grad, **options))
        return None, *(next(grads) if need else None for need in needed)


def _numbers(tensor: RotatedWeight) -> torch.Tensor:
    return tensor._weight.numbers()


def _written() -> RuntimeError:
    return RuntimeError(
        "weight: expected no writing into the rotated weight of a layer, where it would be lost, "
        "got some: write into frozen_weight, or merge() first"
    )
