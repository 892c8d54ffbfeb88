"""``save_adapter`` and ``load_adapter``: what is trained in a model, into a file and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from .._runtime import checks
from .._runtime.dtypes import COMPUTE
from .adapt import build_layers, put_in, unfrozen_on_error
from .adapter_format import Adapter, read_adapter
from .adapter_parameters import HasAdapter
from .base import BOFTLayer
from .base_modules import check_numbers
from .config import Options
from .expert_adapter import ExpertAdapter
from .experts import BOFTExperts, expert_parameters
from .layer_kinds import DEFAULT
from .multi_adapter import MultiAdapterLinear
from .shards import check_present, gather, scatter, whole_shapes, write_once
from .targets import named_children
from .wrappers import dotted, pretrained_names, wrapped_attribute


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = DEFAULT) -> None:
    """Write the finetuned parameters of a model to one safetensors file.

    The tensors bear their names in the pretrained model, without the parts that wrappers such as
    ``torch.compile`` and DistributedDataParallel add: those of every BOFT layer's rotation, and
    every other parameter that requires a gradient (``modules_to_save``, trained biases) with the
    buffers of its module. The metadata holds the format version and the options of each layer.
    The file is replaced in one step, so that after a crash it is the old one or the new one.
    If several ranks hold the tensors together (``fully_shard``, FullyShardedDataParallel, tensor
    parallelism), each of them makes the call: all gather, the first one writes the whole file, and
    the others return once it is written.

    Args:
        model: an adapted model; merged layers store the same adapter as unmerged ones.
        path: file to write; an existing file is replaced and keeps its permissions.
        adapter: name of the adapter to store of each ``MultiAdapterLinear``; layers without an
            adapter of that name are left out.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: the model has no BOFT layer and no such adapter; ``load_adapter`` would refuse
            the file (the weight of a rotated layer is trained, numbers are NaN or infinite, factors
            are switched off by ``interpolate``); tensors are put away by DeepSpeed's ZeRO-3, or
            placeholders on the meta device; or ``path`` is a device, a FIFO or a folder.
        OSError: the file cannot be written; a RuntimeError on the ranks that do not write.
    """
    checks.module("model", model)
    content, shared = _gathered(model, adapter)
    write_once(model, shared, lambda: content.save(path))


def adapter_of(model: nn.Module) -> Adapter:
    """The content of the file that ``save_adapter`` writes; plain tensors are the model's own.

    Raises:
        ValueError: as for ``save_adapter``.
    """
    return _gathered(model, DEFAULT)[0]


def _gathered(model: nn.Module, adapter: str) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The content of an adapter file, and the model's tensors that are in it, which may be shards.

    Raises:
        ValueError: as for ``save_adapter``.
    """
    layers = _adapted_layers(model, adapter)
    if not layers:
        raise ValueError("model: expected an adapted model, got one without BOFT layers")
    _check_whole(layers)
    rotations = _rotation_tensors(layers)
    shared = _trained(model) | rotations
    check_present(shared)
    check_numbers(shared)
    stored = gather(model, shared)
    _check_gathered(layers, stored)
    targets = _loadable(model, layers) | rotations
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    _check_tensors("model", stored, targets, rotations.keys(), shapes)
    layer_options = {name: layer.options() for name, layer in layers.items()}
    bases = {name: layer.describe_base() for name, layer in layers.items()}
    return Adapter(layer_options, bases, stored), shared


def load_adapter(model: nn.Module, path: str | os.PathLike[str] | Adapter) -> nn.Module:
    """Load a file of ``save_adapter``, or an adapter in memory, into a model.

    The file is checked completely before the model is changed.
    Every rank that holds a part of the model makes the call, reads the file and takes its part.

    Args:
        model: the pretrained model, which is then adapted as the file says, or a model that is
            adapted with the same options (those of dropout may differ).
        path: file to read, or the result of ``merge_adapters``.

    Returns:
        ``model``. Its tensors keep their devices and dtypes; the loaded parameters are trainable.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not of this package, of a newer format version, or does
            not fit the model (the message names the tensor or option), layers are merged, or
            tensors of the model are placeholders on the meta device or put away by ZeRO-3.
    """
    checks.module("model", model)
    if isinstance(path, Adapter):
        (layer_options, _, tensors), path = path, "adapter"
    else:
        layer_options, _, tensors = read_adapter(Path(path))
    if layers := _adapted_layers(model):
        _compare_options(path, layer_options, layers)
        if any(layer.merged for layer in layers.values()):
            raise ValueError(
                "model: expected unmerged BOFT layers, got merged ones: unmerge() first"
            )
        _check_whole(layers)
        _check_loadable(model, path, tensors, layers, _trained(model).keys())
    else:
        with unfrozen_on_error(model):
            layers, new_layers = _layers_of_file(model, path, layer_options, tensors)
            _check_loadable(model, path, tensors, layers)
            put_in(model, new_layers)
    targets = _loadable(model, layers) | _rotation_tensors(layers)
    for module in model.modules():
        if isinstance(module, MultiAdapterLinear):
            module.forget()
    scatter(model, targets, tensors)
    for name in tensors:
        if isinstance(targets[name], nn.Parameter):
            targets[name].requires_grad_(True)
    for layer in layers.values():
        layer.renew_powers()
    return model


def _layers_of_file(
    model: nn.Module,
    path: str | os.PathLike[str],
    layer_options: dict[str, Options],
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, HasAdapter], dict[nn.Module, nn.Module]]:
    """Build the layers that a file describes, without putting them in.

    Returns:
        The modules that hold skew and scale_offset, by the names in the file; and the layer for
        each module to replace.
    """
    _check_levels(path, layer_options, tensors)
    try:
        new_layers = build_layers(model, layer_options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit the model: {error}") from error
    modules = {name: module for _, _, name, module in named_children(model)}
    experts = expert_parameters(modules)
    layers = {
        name: getattr(new_layers[experts[name]], name.rpartition(".")[2])
        if name in experts
        else _adapted_layer(new_layers[modules[name]])
        for name in layer_options
    }
    return layers, new_layers


def _adapted_layers(model: nn.Module, adapter: str = DEFAULT) -> dict[str, HasAdapter]:
    """The modules that hold skew and scale_offset, by the names of the pretrained layers."""
    pretrained_name = _pretrained_names(model)
    named = ((name, _adapted_layer(module, adapter)) for name, module in model.named_modules())
    return {pretrained_name(name): layer for name, layer in named if layer is not None}


def _adapted_layer(module: nn.Module, adapter: str = DEFAULT) -> HasAdapter | None:
    if isinstance(module, MultiAdapterLinear):
        return dict(module.adapters).get(adapter)
    return module if isinstance(module, (BOFTLayer, ExpertAdapter)) else None


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters without skews and scales, and the buffers of their modules.

    Such buffers are running statistics, for example.
    """
    adapters = [m for m in model.modules() if isinstance(m, HasAdapter)]
    rotation_ids = {id(p) for m in adapters for p in (m.skew, m.scale_offset)}
    named = model.named_parameters()
    stored = {name: p for name, p in named if p.requires_grad and id(p) not in rotation_ids}
    parents = {name.rpartition(".")[0] for name in stored}
    bases = {m.base for m in model.modules() if isinstance(m, MultiAdapterLinear)}
    parents -= {name for name, module in model.named_modules() if module in bases}
    for name, module in model.named_modules():
        if name in parents:
            for own, buffer in module.named_buffers(name, recurse=False):
                if own.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    stored[own] = buffer
    pretrained_name = _pretrained_names(model)
    return {pretrained_name(name): tensor for name, tensor in stored.items()}


def _loadable(model: nn.Module, layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of the model that a file may hold: all except the rotated weights."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    pretrained_name = _pretrained_names(model)
    tensors = {pretrained_name(name): tensor for name, tensor in tensors.items()}
    frozen = {dotted(name, "weight") for name in layers} | set(layers)
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


def _pretrained_names(model: nn.Module) -> Callable[[str], str]:
    """Return a function from names in the model to names in the pretrained model.

    ``MultiAdapterLinear`` and ``BOFTExperts`` add ``base`` to the names of what they call, as
    wrappers add their parts.
    """

    def attribute_of(module: nn.Module) -> str | None:
        is_around = isinstance(module, (MultiAdapterLinear, BOFTExperts))
        return "base" if is_around else wrapped_attribute(module)

    return pretrained_names(model, attribute_of)


def _rotation_tensors(layers: dict[str, HasAdapter]) -> dict[str, torch.Tensor]:
    """The skews and scales of layers, by their names in a file."""
    rotations = {}
    for name, layer in layers.items():
        rotations[dotted(name, "skew")] = layer.skew
        if layer.scale_offset is not None:
            rotations[dotted(name, "scale_offset")] = layer.scale_offset
    return rotations


def _check_whole(layers: dict[str, HasAdapter]) -> None:
    """Raise ValueError if ``interpolate`` has switched off factors of a layer."""
    if switched := [name for name, layer in layers.items() if layer.n_identity]:
        raise ValueError(
            f"model: expected interpolate(0), as a file holds all factors; {switched[0]!r} has "
            f"interpolate({layers[switched[0]].n_identity})"
        )


def _check_gathered(layers: dict[str, HasAdapter], stored: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for a skew that is a shard of a kind that is not known here."""
    if parts := [name for name, layer in layers.items() if getattr(layer, "is_part", False)]:
        raise ValueError(
            f"model: {parts[0]}: expected all experts, got those of one process of several"
        )
    for name, layer in layers.items():
        skew = dotted(name, "skew")
        shape = layer.whole_skew_shape
        if tuple(stored[skew].shape) != shape:
            raise ValueError(
                f"model: {skew}: expected a whole tensor of shape {shape}, got a shard of shape "
                f"{tuple(stored[skew].shape)}: gather the parameters first"
            )


def _check_levels(
    path: str | os.PathLike[str],
    layer_options: dict[str, Options],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Raise ValueError unless the levels of kaleidoscopes fit the skews.

    This is checked before layers are built: a forged number of levels would allocate any memory.
    """
    for name, options in layer_options.items():
        levels = options.get("kaleidoscope", 0)
        skew = tensors.get(dotted(name, "skew"))
        is_valid = type(levels) is int and skew is not None and skew.dim() == 3
        if levels and not (is_valid and 2 * levels <= len(skew)):
            raise ValueError(f"{path}: {name}: kaleidoscope: {levels!r} is not what its skew has")


def _compare_options(
    path: str | os.PathLike[str], layer_options: dict[str, Options], layers: dict[str, HasAdapter]
) -> None:
    """Raise ValueError unless the model is adapted with the options of the file."""
    if differing := sorted(layer_options.keys() ^ layers.keys()):
        raise ValueError(f"{path}: expected the model's BOFT layers, these differ: {differing[:4]}")
    for name, layer in layers.items():
        # Dropout may change between trainings; every other option gives the tensors their meaning.
        expected = {k: v for k, v in layer.options().items() if not k.startswith("p_")}
        saved = {k: v for k, v in layer_options[name].items() if not k.startswith("p_")}
        if saved != expected:
            raise ValueError(f"{path}: {name}: expected the model's {expected}, got {saved}")


def _check_loadable(
    model: nn.Module,
    path: str | os.PathLike[str],
    tensors: dict[str, torch.Tensor],
    layers: dict[str, HasAdapter],
    trained: Collection[str] = (),
) -> None:
    """Raise ValueError unless a file fits the tensors of the model, which may be shards.

    It must hold the rotations of ``layers``, and the further tensors whose names are ``trained``.
    """
    rotations = _rotation_tensors(layers)
    targets = _loadable(model, layers) | rotations
    check_present({name: targets[name] for name in tensors.keys() & targets.keys()})
    required = rotations.keys() | trained
    _check_tensors(path, tensors, targets, required, whole_shapes(model, targets))


def _check_tensors(
    path: str | os.PathLike[str],
    tensors: dict[str, torch.Tensor],
    targets: dict[str, torch.Tensor],
    required: set[str],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Raise ValueError unless the tensors of a file fit the tensors of the model.

    Saving checks what it is about to write by the same rule, while the model is still there.

    Args:
        path: of the file, or "model" when saving, for messages.
        tensors: of the file, by their names in the pretrained model.
        targets: the tensors of the model that the file may hold.
        required: names of the tensors that the file must hold.
        shapes: of the whole targets, by their names.
    """
    if missing := sorted(required - tensors.keys()):
        raise ValueError(f"{path}: expected a tensor {missing[0]!r}, got none")
    names: dict[int, str] = {}  # first name in the file, by the id of the model's tensor
    for name, tensor in tensors.items():
        if name not in targets:
            raise ValueError(
                f"{path}: expected trained parameters other than the weights of rotated layers, "
                f"which no adapter file holds, got {name!r}"
            )
        first = names.setdefault(id(targets[name]), name)
        if first != name and not torch.equal(tensor, tensors[first]):
            raise ValueError(f"{path}: expected one tensor for {first!r} and {name!r}, got two")
        check_numbers({name: targets[name]})
        shape = shapes[name]
        is_float = targets[name].is_floating_point()
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != is_float:
            expected = "a floating-point" if is_float else "an integer"
            raise ValueError(
                f"{path}: {name}: expected {expected} tensor of shape {shape}, got "
                f"{tensor.dtype} of {tuple(tensor.shape)}"
            )
        # buffers, such as masks, may hold infinity
        if isinstance(targets[name], nn.Parameter) and is_float:
            dtype = targets[name].dtype
            if tensor.dtype not in COMPUTE:
                raise ValueError(
                    f"{path}: {name}: expected float64, float32, bfloat16 or float16, got "
                    f"{tensor.dtype}"
                )
            if not tensor.to(dtype).isfinite().all():
                raise ValueError(
                    f"{path}: {name}: expected numbers that are finite in {dtype}, got NaN or "
                    "infinity"
                )
