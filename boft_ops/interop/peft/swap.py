"""Replaces PEFT's layers by their accelerated forms, and back. Needs PEFT."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import boft, oft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from .boft import (
    BoftConv2d,
    BoftLinear,
    BoftRotated,
    free_permutation,
    restore_permutation,
    uses_extension,
)
from .layers import Rotated, RotatedKernel
from .oft import OftConv2d, OftLinear
from .rows import MODEL_FORMS, TakesRows

TUNERS = (boft.layer.BOFTLayer, oft.layer.OFTLayer)
_lock = threading.RLock()
FORMS = {form.peft_class: form for form in (BoftLinear, BoftConv2d, OftLinear, OftConv2d)}

OTHER_FUNCTION = (
    "accelerated, but computing what PEFT's merged model does: PEFT's own unmerged forward of OFT "
    "adds overlapping patches up where a kernel is larger than 1 x 1, and is not the pretrained "
    "layer even at initialisation"
)


def obstacle(peft_class: type[nn.Module], base: nn.Module) -> str | None:
    """The reason why a layer of PEFT's class over ``base`` has no accelerated form, or None."""
    if peft_class not in FORMS:
        return f"there is no accelerated form of {peft_class.__module__}.{peft_class.__qualname__}"
    if not issubclass(FORMS[peft_class], RotatedKernel):
        return None
    if isinstance(base, BaseTunerLayer):
        return "the base layer is itself a layer of PEFT"
    if parametrize.is_parametrized(base):
        return "the base layer is parametrized"
    if not isinstance(base, nn.Conv2d) or not base.weight.is_floating_point():
        return "the base layer is quantized: its kernel cannot be rotated"
    if base.groups > 1:
        return "groups > 1: PEFT's rotation mixes channels of different groups"
    height, width = base.kernel_size
    if height != width:
        return "the kernel is not square, which PEFT takes it to be"
    return None


def obstacle_of(layer: nn.Module) -> str | None:
    """The reason why this layer has no accelerated form, or None."""
    if has_replaced_forward(layer):
        return "its forward was replaced on the instance; accelerate it before that is done"
    return obstacle(type(layer), layer.base_layer)


def has_replaced_forward(layer: nn.Module) -> bool:
    """True if the instance has a forward that may call the one of the layer's present class.

    Device hooks keep the bound method, which is wrong once the layer has another class.
    """
    return "forward" in vars(layer)


def computes_otherwise(peft_class: type[nn.Module], base: nn.Module) -> bool:
    """True if the accelerated form is another function than PEFT's unmerged layer."""
    return peft_class is oft.layer.Conv2d and math.prod(base.kernel_size) > 1


def accelerate_layer(layer: nn.Module) -> None:
    """Give a layer of PEFT, which has no ``obstacle_of``, its accelerated class."""
    layer.__class__ = FORMS[type(layer)]
    layer.note_shards()
    if isinstance(layer, BoftRotated):
        free_permutation(layer)


def restore_layer(layer: Rotated) -> None:
    """Give an accelerated layer PEFT's class again."""
    layer.__class__ = layer.peft_class
    if isinstance(layer, boft.layer.BOFTLayer):
        restore_permutation(layer)


def accelerate_tuners(model: nn.Module) -> None:
    """Give PEFT's BOFT and OFT models in ``model``, or itself, their accelerated classes."""
    for module in model.modules():
        module.__class__ = MODEL_FORMS.get(type(module), type(module))


def restore_tuners(model: nn.Module) -> None:
    """Give accelerated BOFT and OFT models PEFT's classes again."""
    for module in model.modules():
        if isinstance(module, TakesRows):
            module.__class__ = module.peft_class


def needs_extension(layer: Rotated) -> bool:
    """True if PEFT computes this layer with its CUDA extension only."""
    several = isinstance(layer, BoftRotated) and any(len(p) > 1 for p in layer.boft_R.values())
    return several and uses_extension()


def has_extension() -> bool:
    """True if PEFT's CUDA extension, which the installed PEFT uses, is built or can be built."""
    return bool(boft.layer.get_fbd_cuda())


@contextmanager
def constructors(note: Callable[[str, str], None]) -> Iterator[None]:
    """Context manager: PEFT makes accelerated layers where there is a form for them.

    ``note`` is called with the reason and the base layer of each other layer.
    """

    def constructor(peft_class: type[nn.Module]) -> Callable:
        def make(base_layer: nn.Module, *args, **kwargs) -> nn.Module:
            reason = obstacle(peft_class, base_layer)
            if reason:
                note(f"not accelerated, as {reason}", str(base_layer))
            elif computes_otherwise(peft_class, base_layer):
                note(OTHER_FUNCTION, str(base_layer))
            return (peft_class if reason else FORMS[peft_class])(base_layer, *args, **kwargs)

        return make

    names = [
        (module, name, getattr(layers, name))
        for module, layers in ((boft.model, boft.layer), (oft.model, oft.layer))
        for name in ("Linear", "Conv2d")
    ]
    tuners = {key: cls for key, cls in PEFT_TYPE_TO_TUNER_MAPPING.items() if cls in MODEL_FORMS}
    # Without it, one of two threads that undo each other's replacements would leave its own behind.
    with _lock:
        before = [getattr(module, name) for module, name, _ in names]
        try:
            for module, name, peft_class in names:
                setattr(module, name, constructor(peft_class))
            PEFT_TYPE_TO_TUNER_MAPPING.update({k: MODEL_FORMS[cls] for k, cls in tuners.items()})
            yield
        finally:
            PEFT_TYPE_TO_TUNER_MAPPING.update(tuners)
            for (module, name, _), value in zip(names, before, strict=True):
                setattr(module, name, value)
