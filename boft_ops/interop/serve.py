"""Many adapters on one model, for serving: load them, and choose one for each request."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .._runtime import checks
from ..nn.adapt import check_parent, put_in, unfrozen_on_error
from ..nn.base import BOFTLayer
from ..nn.linear_adapter import LinearAdapter
from ..nn.multi_adapter import MultiAdapterLinear
from .convert import PREFIX, read_checkpoint
from .formats.adapter import Base, LayerAdapter


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
            chosen for each request; or a name is taken or impossible. The model is then as it was.
    """
    checks.module("model", model)
    read = {
        name: read_checkpoint(path, base=base, prefix=prefix) for name, path in checkpoints.items()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[nn.Module, MultiAdapterLinear] = {}  # what each module becomes, or is already
    added: dict[tuple[MultiAdapterLinear, str], LinearAdapter] = {}
    adapted = [m for m in modules.values() if isinstance(m, (LinearAdapter, BOFTLayer))]
    trained = [p for m in adapted for p in (m.skew, m.scale) if p is not None and p.requires_grad]
    with unfrozen_on_error(model):
        for name, checkpoint in read.items():
            if checkpoint.others:
                other = next(iter(checkpoint.others))
                raise ValueError(f"{name}: expected rotations and scales alone, got {other!r}")
            for place, rotation in checkpoint.layers.items():
                module = modules.get(place)
                _check_place(name, place, module, rotation)
                check_parent(f"{name}: {place}", modules[place.rpartition(".")[0]])
                if module not in layers:
                    known = isinstance(module, MultiAdapterLinear)
                    layers[module] = module if known else MultiAdapterLinear(module)
                adapter = _adapter(layers[module], name, place, rotation)
                twin = added.setdefault((layers[module], name), adapter)
                if twin is not adapter and not _are_equal(twin, adapter):
                    raise ValueError(
                        f"{name}: {place}: expected one rotation of a layer that has several names "
                        "in the model, got two"
                    )
        put_in(model, layers)
    for parameter in trained:
        parameter.requires_grad_(True)
    for (layer, name), adapter in added.items():
        layer.put_adapter(name, adapter, active=False)
    return model


def _check_place(name: str, place: str, module: nn.Module | None, layer: LayerAdapter) -> None:
    if layer.side == "out":
        raise ValueError(f"{name}: {place}: expected a rotation of inputs, got one of outputs")
    if not place:
        raise ValueError(f"{name}: expected rotated layers inside a model, got a bare one")
    if isinstance(module, (nn.Conv2d, BOFTLayer)) or not hasattr(module, "in_features"):
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
def _adapter(
    target: MultiAdapterLinear, name: str, place: str, layer: LayerAdapter
) -> LinearAdapter:
    try:
        made = target.new_adapter(name, **layer.options())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {place}: {error}") from error
    made.skew.copy_(layer.skew)
    if layer.scale is not None:
        made.scale.copy_(layer.scale)
    return made


def _are_equal(one: LinearAdapter, other: LinearAdapter) -> bool:
    states = one.state_dict(), other.state_dict()
    return one.options() == other.options() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


# Who has chosen rows of a layer: a thread, and its task in asyncio. The layers themselves hold the
# choice, as compiled graphs take it from there.
_owners: WeakKeyDictionary[MultiAdapterLinear, tuple[int, object]] = WeakKeyDictionary()
_turn = threading.Condition()


def _me() -> tuple[int, object]:
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop
        return threading.get_ident(), None


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, each request of a batch goes through its own adapter, in every layer.

    Blocks may be nested, the inner one counts. A block of another thread waits for its turn with
    these layers: the choice is theirs, and holds for every call of them, from wherever.

    Args:
        model: with ``MultiAdapterLinear`` layers.
        names: one for each entry of the first dimension of the layers' inputs; None is the
            pretrained model.

    Raises:
        ValueError: the model has no such layers, or none of them an adapter of that name.
        RuntimeError: another asyncio task of this thread is in a block: it awaits something there.
    """
    checks.module("model", model)
    layers = [m for m in model.modules() if isinstance(m, MultiAdapterLinear)]
    if not layers:
        raise ValueError("model: expected MultiAdapterLinear layers, got none")
    names = tuple(names)
    known = {name for layer in layers for name in layer.names} | {None}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"names: expected some of {sorted(known - {None})}, got {unknown[0]!r}")
    # as tensors: inputs of a compiled graph for any names
    rows = [layer.index_of([n if n in layer.adapters else None for n in names]) for layer in layers]
    me = _me()
    with _turn:
        while others := {_owners.get(layer, me) for layer in layers} - {me}:
            if any(thread == me[0] for thread, _ in others):
                raise RuntimeError(
                    "adapter_rows: expected blocks without await, got one that another asyncio "
                    "task of this thread is still in"
                )
            _turn.wait()
        outer = [layer._rows for layer in layers]
        nested = [layer in _owners for layer in layers]
        _owners.update(dict.fromkeys(layers, me))
    try:
        _choose(layers, rows)
        yield
    finally:
        _choose(layers, outer)
        with _turn:
            for layer, is_nested in zip(layers, nested, strict=True):
                if not is_nested:
                    del _owners[layer]
            _turn.notify_all()


def _choose(layers: list[MultiAdapterLinear], rows: list[torch.Tensor | None]) -> None:
    for layer, chosen in zip(layers, rows, strict=True):
        layer._rows = chosen
