"""Many adapters on one model, for serving: load them, and choose one for each request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..multi import MultiAdapterLinear
from .adapter import Base, LayerAdapter
from .convert import PREFIX, read_checkpoint


def load_adapters(
    model: nn.Module,
    checkpoints: Mapping[str, str | os.PathLike],
    *,
    base: Base | None = None,
    prefix: str = PREFIX,
) -> nn.Module:
    """Put the adapters of several checkpoints on one pretrained model, which they share.

    Every linear layer that one of them rotates becomes a ``MultiAdapterLinear`` with all of them;
    an adapter that leaves a layer alone is the identity there. None is active.

    Args:
        model: the pretrained model, changed in place, or one that has adapters already.
        checkpoints: by the adapters' names: files of ``save_adapter`` or PEFT folders.
        base, prefix: as for ``convert``.

    Returns:
        ``model``, frozen but for the adapters.

    Raises:
        FileNotFoundError, ValueError: a checkpoint cannot be read, rotates what is no linear layer
            or its outputs, or holds more than rotations (trained heads, biases): they cannot be
            chosen for each request. The model is then as it was.
    """
    read = {
        name: read_checkpoint(path, base=base, prefix=prefix) for name, path in checkpoints.items()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, MultiAdapterLinear] = {}
    for name, adapter in read.items():
        if adapter.others:
            raise ValueError(
                f"{name}: expected rotations and scales alone, got {next(iter(adapter.others))!r}"
            )
        for place, layer in adapter.layers.items():
            _check_place(name, place, modules.get(place), layer)
            if place not in layers:
                module = modules[place]
                known = isinstance(module, MultiAdapterLinear)
                layers[place] = module if known else MultiAdapterLinear(module)
                if taken := set(layers[place].names) & read.keys():
                    raise ValueError(f"{taken.pop()}: expected a new name, {place!r} has it")
    for place, layer in layers.items():
        parent, _, attribute = place.rpartition(".")
        setattr(modules[parent], attribute, layer)
        for name, adapter in read.items():
            if place in adapter.layers:
                _add(layer, name, adapter.layers[place])
    return model


def _check_place(name: str, place: str, module: nn.Module | None, layer: LayerAdapter) -> None:
    if layer.side == "out":
        raise ValueError(f"{name}: {place}: expected a rotation of inputs, got one of outputs")
    if not place:
        raise ValueError(f"{name}: expected rotated layers inside a model, got a bare one")
    if isinstance(module, nn.Conv2d) or not hasattr(module, "in_features"):
        kind = "none of that name" if module is None else type(module).__name__
        raise ValueError(f"{name}: {place}: expected a linear layer in the model, got {kind}")
    if layer.features != module.in_features:
        raise ValueError(
            f"{name}: {place}: expected a rotation of {module.in_features} features, got one of "
            f"{layer.features}"
        )
    if layer.scale is not None and len(layer.scale) != module.out_features:
        raise ValueError(
            f"{name}: {place}: expected a scale of {module.out_features}, got {len(layer.scale)}"
        )


@torch.no_grad()
def _add(target: MultiAdapterLinear, name: str, layer: LayerAdapter) -> None:
    added = target.add_adapter(name, active=False, **layer.options())
    added.skew.copy_(layer.skew)
    if layer.scale is not None:
        added.scale.copy_(layer.scale)


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, each request of a batch goes through its own adapter, in every layer.

    Args:
        model: with ``MultiAdapterLinear`` layers.
        names: one for each entry of the first dimension of the layers' inputs; None is the
            pretrained model.

    Raises:
        ValueError: the model has no such layers, or none of them an adapter of that name.
    """
    layers = [m for m in model.modules() if isinstance(m, MultiAdapterLinear)]
    if not layers:
        raise ValueError("model: expected MultiAdapterLinear layers, got none")
    names = tuple(names)
    known = {name for layer in layers for name in layer.names} | {None}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"names: expected some of {sorted(known - {None})}, got {unknown[0]!r}")
    for layer in layers:  # as tensors: inputs of a compiled graph, which any names go through
        own = [name if name in layer.adapters else None for name in names]
        layer._rows = layer.index_of(own)
    try:
        yield
    finally:
        for layer in layers:
            layer._rows = None
