"""Which of PEFT's layers have an accelerated form, and giving and taking it. Needs PEFT."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft.tuners import boft, oft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from .boft import BoftConv2d, BoftLinear, BoftRotated, free_permutation, restore_permutation
from .layers import Rotated, RotatedKernel
from .oft import OftConv2d, OftLinear

TUNERS = (boft.layer.BOFTLayer, oft.layer.OFTLayer)
_lock = threading.RLock()
FORMS = {form.peft_class: form for form in (BoftLinear, BoftConv2d, OftLinear, OftConv2d)}

OTHER_FUNCTION = (
    "accelerated, but computing what PEFT's merged model does: PEFT's own unmerged forward of OFT "
    "adds overlapping patches up where a kernel is larger than 1 x 1, and is not the pretrained "
    "layer even at initialisation"
)


def obstacle(kind: type[nn.Module], base: nn.Module) -> str | None:
    """Why a layer of PEFT's class ``kind`` over ``base`` has no accelerated form."""
    if kind not in FORMS:
        return f"there is no accelerated form of {kind.__module__}.{kind.__qualname__}"
    if not issubclass(FORMS[kind], RotatedKernel):
        return None
    if isinstance(base, BaseTunerLayer):
        return "the base layer is itself a layer of PEFT"
    if parametrize.is_parametrized(base):
        return "the base layer is parametrized"
    if not isinstance(base, nn.Conv2d) or not base.weight.is_floating_point():
        return "the base layer is quantised: its kernel cannot be rotated"
    if base.groups > 1:
        return "groups > 1: PEFT's rotation mixes channels of different groups"
    height, width = base.kernel_size
    if height != width:
        return "the kernel is not square, which PEFT takes it to be"
    return None


def obstacle_of(layer: nn.Module) -> str | None:
    """Why this layer has no accelerated form."""
    if "forward" in vars(layer):
        return "its forward was replaced on the instance; accelerate it before that is done"
    return obstacle(type(layer), layer.base_layer)


def computes_otherwise(kind: type[nn.Module], base: nn.Module) -> bool:
    """Whether the accelerated form is not the function of PEFT's unmerged layer."""
    return kind is oft.layer.Conv2d and math.prod(base.kernel_size) > 1


def accelerate_layer(layer: nn.Module) -> None:
    layer.__class__ = FORMS[type(layer)]
    if isinstance(layer, BoftRotated):
        free_permutation(layer)


def restore_layer(layer: Rotated) -> None:
    layer.__class__ = layer.peft_class
    if isinstance(layer, boft.layer.BOFTLayer):
        restore_permutation(layer)


def needs_extension(layer: Rotated) -> bool:
    """Whether PEFT itself can compute this layer with its CUDA extension alone."""
    return isinstance(layer, BoftRotated) and any(len(p) > 1 for p in layer.boft_R.values())


def has_extension() -> bool:
    """Whether PEFT's CUDA extension is there or can be built."""
    return bool(boft.layer.get_fbd_cuda())


@contextmanager
def constructors(note: Callable[[str, str], None]) -> Iterator[None]:
    """PEFT makes accelerated layers where it can; ``note`` is told why not, and of which base."""

    def of(kind: type[nn.Module]) -> Callable:
        def make(base_layer: nn.Module, *args, **kwargs) -> nn.Module:
            why = obstacle(kind, base_layer)
            if why:
                note(f"not accelerated, as {why}", str(base_layer))
            elif computes_otherwise(kind, base_layer):
                note(OTHER_FUNCTION, str(base_layer))
            return (kind if why else FORMS[kind])(base_layer, *args, **kwargs)

        return make

    places = [
        (module, name, getattr(layers, name))
        for module, layers in ((boft.model, boft.layer), (oft.model, oft.layer))
        for name in ("Linear", "Conv2d")
    ]
    with _lock:  # two threads that undid each other's replacements would leave one behind
        before = [getattr(module, name) for module, name, _ in places]
        try:
            for module, name, kind in places:
                setattr(module, name, of(kind))
            yield
        finally:
            for (module, name, _), value in zip(places, before, strict=True):
                setattr(module, name, value)
