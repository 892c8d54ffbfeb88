"""Serves many adapters on one model: loads them, and chooses one for each request."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .._runtime import checks
from ..nn.adapt import check_parent, put_in, unfrozen_on_error
from ..nn.adapter_parameters import HasAdapter
from ..nn.base import BOFTLayer
from ..nn.base_modules import check_numbers
from ..nn.linear_adapter import LinearAdapter
from ..nn.multi_adapter import MultiAdapterLinear
from ..nn.wrappers import pretrained_names
from ..ops.scale import offset_of
from .formats.checkpoint import Base, Checkpoint, LayerState
from .formats.reader import read_checkpoint


def load_adapters(
    model: nn.Module,
    checkpoints: Mapping[str, str | os.PathLike[str]],
    *,
    base: Base | None = None,
    prefix: str | None = None,
    slots: int | None = None,
) -> nn.Module:
    """Put the adapters of several checkpoints on one pretrained model, which they share.

    Every linear layer that an adapter rotates becomes a ``MultiAdapterLinear`` that holds the
    adapters. A layer that an adapter does not rotate is left to the base for that adapter.
    No adapter is active after loading.
    An adapter has the same number in all layers, the lowest that is free in all of them. Layers
    that are prepared stay prepared.

    Args:
        model: the pretrained model, or one that already has adapters; changed in place, unchanged
            if an error is raised.
        checkpoints: files of ``save_adapter`` or PEFT folders, by the names of the adapters.
        base, prefix: as for ``convert``.
        slots: of the new layers, see ``MultiAdapterLinear``.

    Returns:
        ``model``; its adapters are trainable, the rest is frozen.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        FileNotFoundError: there is no such checkpoint.
        ValueError: a checkpoint cannot be read, rotates outputs or a layer that is not linear, or
            holds more than rotations and scales (trained heads or biases, which cannot be chosen
            for each request); the model is offloaded or on the meta device; the name of an adapter
            is taken or not possible; or there are not enough slots.
    """
    checks.module("model", model)
    contents = {
        name: read_checkpoint(path, base=base, prefix=prefix) for name, path in checkpoints.items()
    }
    pretrained_name = pretrained_names(model)
    named = model.named_modules(remove_duplicate=False)
    modules = {pretrained_name(name): module for name, module in named}
    adapted = [module for module in modules.values() if isinstance(module, HasAdapter)]
    own = [p for m in adapted for p in (m.skew, m.scale_offset) if p is not None]
    trained = [p for p in own if p.requires_grad]
    with unfrozen_on_error(model):
        layers, added = _built(modules, contents, slots)
        free = _free_numbers(model, layers.values(), len(contents))
        numbers = dict(zip(contents, free, strict=True))
        put_in(model, layers)
    for parameter in trained:
        parameter.requires_grad_(True)
    for (layer, name), adapter in added.items():
        layer.put_adapter(name, adapter, active=False, number=numbers[name])
    return model


def _built(
    modules: Mapping[str, nn.Module], contents: Mapping[str, Checkpoint], slots: int | None
) -> tuple[
    dict[nn.Module, MultiAdapterLinear], dict[tuple[MultiAdapterLinear, str], LinearAdapter]
]:
    """Build the adapters of checkpoints, and layers for them, without changing the model.

    Returns:
        The layer for each module, which it is or replaces; and the adapters by layer and name.
    """
    layers: dict[nn.Module, MultiAdapterLinear] = {}
    added: dict[tuple[MultiAdapterLinear, str], LinearAdapter] = {}
    for name, checkpoint in contents.items():
        if checkpoint.others:
            other = next(iter(checkpoint.others))
            raise ValueError(f"{name}: expected rotations and scales alone, got {other!r}")
        for layer_name, state in checkpoint.layers.items():
            module = modules.get(layer_name)
            _check_layer(name, layer_name, module, state)
            check_parent(f"{name}: {layer_name}", modules[layer_name.rpartition(".")[0]])
            if module not in layers:
                layers[module] = module
                if not isinstance(module, MultiAdapterLinear):
                    layer = MultiAdapterLinear(module, slots=slots)
                    layers[module] = layer.train(module.training)
            adapter = _new_adapter(layers[module], name, layer_name, state)
            first = added.setdefault((layers[module], name), adapter)
            if first is not adapter and not _are_equal(first, adapter):
                raise ValueError(
                    f"{name}: {layer_name}: expected one rotation of a layer that has several "
                    "names in the model, got two"
                )
    return layers, added


def _free_numbers(model: nn.Module, layers: Iterable[MultiAdapterLinear], count: int) -> list[int]:
    """The lowest numbers that are free in all layers of the model, and below their slots."""
    present = [module for module in model.modules() if isinstance(module, MultiAdapterLinear)]
    taken = {number for layer in present for number in layer.numbers.values()}
    free = [number for number in range(len(taken) + count) if number not in taken][:count]
    for layer in layers:
        if layer.slots is not None and free and free[-1] >= layer.slots:
            raise ValueError(
                f"slots: expected at most {layer.slots} adapters, got {count} beside "
                f"{len(taken)}: delete some first"
            )
    return free


def _check_layer(name: str, layer_name: str, module: nn.Module | None, state: LayerState) -> None:
    """Raise ValueError unless ``state``, of the adapter ``name``, fits the module."""
    if state.config.side == "out":
        raise ValueError(f"{name}: {layer_name}: expected a rotation of inputs, got one of outputs")
    if not layer_name:
        raise ValueError(f"{name}: expected rotated layers inside a model, got a bare one")
    if isinstance(module, (nn.Conv2d, BOFTLayer)) or not hasattr(module, "in_features"):
        got = "none of that name" if module is None else type(module).__name__
        raise ValueError(f"{name}: {layer_name}: expected a linear layer in the model, got {got}")
    if state.features != module.in_features:
        raise ValueError(
            f"{name}: {layer_name}: expected a rotation of {module.in_features} features, got one "
            f"of {state.features}"
        )
    if state.scale is not None and len(state.scale) != module.out_features:
        raise ValueError(
            f"{name}: {layer_name}: expected a scale of {module.out_features}, got "
            f"{len(state.scale)}"
        )


@torch.no_grad()
def _new_adapter(
    layer: MultiAdapterLinear, name: str, layer_name: str, state: LayerState
) -> LinearAdapter:
    """Make the adapter ``name`` of a layer with the values of ``state``."""
    try:
        adapter = layer.new_adapter(name, **state.config.options())
        check_numbers({"base": adapter.skew})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {layer_name}: {error}") from error
    adapter.skew.copy_(state.skew)
    if state.scale is not None:
        adapter.scale_offset.copy_(offset_of(state.scale))
    return adapter


def _are_equal(one: LinearAdapter, other: LinearAdapter) -> bool:
    states = one.state_dict(), other.state_dict()
    return one.options() == other.options() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


# The owner of each layer's request_index: the thread, and its asyncio task, inside adapter_rows().
# The index itself is an attribute of the layer, where compiled graphs read it.
_owners: WeakKeyDictionary[MultiAdapterLinear, tuple[int, object]] = WeakKeyDictionary()
_turn = threading.Condition()


def _current_owner() -> tuple[int, object]:
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop
        return threading.get_ident(), None


@contextmanager
def adapter_rows(
    model: nn.Module, names: Sequence[str | None], *, repeats: int = 1
) -> Iterator[None]:
    """Context manager: each request of a batch goes through its own adapter, in every layer.

    Layers may be called with one row for each name, or with ``repeats`` consecutive rows for each:
    an encoder sees the requests, and the decoder behind it their beams. ``generate`` of
    transformers sets ``repeats`` itself, from num_beams and num_return_sequences.

    The choice is a state of the layers, and holds for all of their calls inside the block.
    A block of another thread over the same layers therefore waits until this one is left.
    Blocks may be nested; the inner one counts.

    Args:
        model: a model with ``MultiAdapterLinear`` layers.
        names: the name of an adapter for each entry of the first dimension of the layers' inputs;
            None stands for the pretrained model.
        repeats: number of consecutive rows of each name in calls with more rows than names.

    Raises:
        TypeError: ``model`` is not an nn.Module, or ``repeats`` no int.
        ValueError: the model has no such layers, none of its layers has an adapter of a name, or
            ``repeats`` is not positive; in a layer: its inputs have another number of rows.
        RuntimeError: another asyncio task of this thread is inside a block, in which it awaits.
    """
    checks.module("model", model)
    checks.positive_int("repeats", repeats)
    layers = [m for m in model.modules() if isinstance(m, MultiAdapterLinear)]
    if not layers:
        raise ValueError("model: expected MultiAdapterLinear layers, got none")
    names = tuple(names)
    existing = {name for layer in layers for name in layer.names}
    if unknown := [name for name in names if name is not None and name not in existing]:
        raise ValueError(f"names: expected some of {sorted(existing)}, got {unknown[0]!r}")
    # Tensors are inputs of a compiled graph, so that one graph serves any names.
    indices = _indices(layers, names)
    owner = _current_owner()
    with _turn:
        while others := {_owners.get(layer, owner) for layer in layers} - {owner}:
            if any(thread == owner[0] for thread, _ in others):
                raise RuntimeError(
                    "adapter_rows: expected blocks without await, got one that another asyncio "
                    "task of this thread is still in"
                )
            _turn.wait()
        outer = [layer.request_index for layer in layers]
        outer_repeats = [layer.request_repeats for layer in layers]
        nested = [layer in _owners for layer in layers]
        _owners.update(dict.fromkeys(layers, owner))
    try:
        _choose(layers, indices, [repeats] * len(layers))
        with _repeats_of_generate(model, layers):
            yield
    finally:
        _choose(layers, outer, outer_repeats)
        with _turn:
            for layer, is_nested in zip(layers, nested, strict=True):
                if not is_nested:
                    del _owners[layer]
            _turn.notify_all()


def _indices(layers: list[MultiAdapterLinear], names: tuple[str | None, ...]) -> list[torch.Tensor]:
    """The numbers of the names in each layer; layers with the same numbers share one tensor."""
    shared: dict[tuple, torch.Tensor] = {}
    indices = []
    for layer in layers:
        key = (*(layer.numbers.get(name) for name in names), layer.adapter_device)
        if key not in shared:
            shared[key] = layer.index_of([n if n in layer.adapters else None for n in names])
        indices.append(shared[key])
    return indices


def _choose(
    layers: list[MultiAdapterLinear], indices: list[torch.Tensor | None], repeats: list[int]
) -> None:
    for layer, index, count in zip(layers, indices, repeats, strict=True):
        layer.request_index, layer.request_repeats = index, count


@contextmanager
def _repeats_of_generate(model: nn.Module, layers: list[MultiAdapterLinear]) -> Iterator[None]:
    """Context manager: take ``repeats`` from transformers' ``generate``, which repeats its inputs.

    ``generate`` repeats them with one method, whose argument is the number.
    """
    method = "_expand_inputs_for_generation"
    generating = [m for m in model.modules() if callable(getattr(m, method, None))]
    before = [vars(module).get(method) for module in generating]

    def noting(expand: Callable) -> Callable:
        def expand_inputs(expand_size: int = 1, *args, **kwargs):
            for layer in layers:
                layer.request_repeats = expand_size
            return expand(expand_size, *args, **kwargs)

        return expand_inputs

    for module in generating:
        setattr(module, method, noting(getattr(module, method)))
    try:
        yield
    finally:
        for module, former in zip(generating, before, strict=True):
            if former is None:
                delattr(module, method)
            else:
                setattr(module, method, former)
