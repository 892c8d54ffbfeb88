"""Adapters on disk: one safetensors file with the trained tensors and the layers' options."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Set
from pathlib import Path

import torch
from torch import nn

from .._runtime import checks
from .adapt import DEFAULT, build_layers, put_in, unfrozen_on_error
from .base import BOFTLayer
from .linear_adapter import LinearAdapter
from .multi_adapter import MultiAdapterLinear

FORMAT = "boft_ops"
FORMAT_VERSION = 1
LATER_OPTIONS = {"kaleidoscope"}  # written only where they are not the default


def save_adapter(model: nn.Module, path: str | os.PathLike, *, adapter: str = DEFAULT) -> None:
    """Write what was finetuned to one safetensors file.

    It holds, under their names in the pretrained model, the skew and scale of every BOFT layer,
    every other parameter that requires a gradient (``modules_to_save``, trained biases) with the
    buffers of its module, and as metadata the format version and each layer's options. The file
    appears whole or not at all.

    Args:
        model: an adapted model; if layers are merged the adapter is the same.
        path: file to write; an existing one is replaced.
        adapter: which one of each ``MultiAdapterLinear``; those that have none of that name are
            left out.

    Raises:
        ValueError: the model has no BOFT layer and no such adapter, or factors are switched off by
            ``interpolate``.
    """
    checks.module("model", model)
    layers = _layers(model, adapter)
    if not layers:
        raise ValueError("model: expected an adapted model, got one without BOFT layers")
    _check_whole(layers)
    stored = _trained(model) | _own_tensors(layers)
    config = {name: layer.options() for name, layer in layers.items()}
    bases = {name: layer.base_kind() for name, layer in layers.items()}
    write_adapter(Path(path), config, bases, stored)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a file of ``save_adapter``. Everything is checked before the model is touched.

    Args:
        model: the pretrained model, which is adapted as the file says, or one that is adapted
            alike.
        path: file to read.

    Returns:
        ``model``, on its own device and with its own dtypes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, not of this package, of a newer format version, or does
            not fit the model; the message says which tensor or option.
    """
    checks.module("model", model)
    config, tensors = _read(Path(path))
    tensors = _unwrapped(tensors, config.keys())
    layers = _layers(model)
    if layers:
        _compare_options(path, config, layers)
        if any(layer.merged for layer in layers.values()):
            raise ValueError(
                "model: expected unmerged BOFT layers, got merged ones: unmerge() first"
            )
        _check_whole(layers)
        own = _own_tensors(layers)
        targets = _tensors(model, layers) | own
        required = own.keys() | _trained(model).keys()
        _check_tensors(path, tensors, targets, required)
    else:
        with unfrozen_on_error(model):
            _check_levels(path, config, tensors)
            try:
                new = build_layers(model, config)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: does not fit the model: {error}") from error
            modules = dict(model.named_modules(remove_duplicate=False))
            own = _own_tensors({name: _adapted(new[modules[name]]) for name in config})
            _check_tensors(path, tensors, _tensors(model, config) | own, own.keys())
            put_in(model, new)
        targets = _tensors(model, config) | own  # also of the layers that were put in
    for module in model.modules():
        if isinstance(module, MultiAdapterLinear):
            module.forget()
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
            if isinstance(targets[name], nn.Parameter):
                targets[name].requires_grad_(True)
    return model


def write_adapter(
    path: Path,
    config: dict[str, dict],
    bases: dict[str, tuple[str, int]],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Write each layer's options, what it rotates (kind of layer and outputs), and the tensors."""
    from safetensors.torch import save

    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "layers": json.dumps(config, sort_keys=True),
        "bases": json.dumps(bases, sort_keys=True),
    }
    # no views of each other, which a file does not hold; copied where there is memory for it
    whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    whole = {name: tensor.contiguous() for name, tensor in whole.items()}
    write_whole(path, save(whole, metadata))


Adapted = BOFTLayer | LinearAdapter


def _layers(model: nn.Module, adapter: str = DEFAULT) -> dict[str, Adapted]:
    """What holds skew and scale, by the names of the pretrained layers."""
    found = {name: _adapted(module, adapter) for name, module in model.named_modules()}
    return {name: layer for name, layer in found.items() if layer is not None}


def _adapted(module: nn.Module, adapter: str = DEFAULT) -> Adapted | None:
    if isinstance(module, MultiAdapterLinear):
        return dict(module.adapters).get(adapter)
    return module if isinstance(module, BOFTLayer) else None


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters, and the buffers beside them (running statistics), but for those of the
    rotations."""
    adapters = [m for m in model.modules() if isinstance(m, (BOFTLayer, LinearAdapter))]
    own = {id(p) for m in adapters for p in (m.skew, m.scale)}  # stored by the layers' names
    named = model.named_parameters()
    stored = {name: p for name, p in named if p.requires_grad and id(p) not in own}
    wrapped = _wrapped(model)
    parents = {name.rpartition(".")[0] for name in stored} - {f"{name}.base" for name in wrapped}
    state = model.state_dict().keys()  # without buffers that are not persistent
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[0] in parents and name in state:
            stored[name] = buffer
    return _unwrapped(stored, wrapped)


def _tensors(model: nn.Module, layers: Iterable[str]) -> dict[str, torch.Tensor]:
    """Everything that a file may be for, but for the weights that are rotated."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    tensors = _unwrapped(tensors, _wrapped(model))
    frozen = {f"{name}.weight" for name in layers}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


def _wrapped(model: nn.Module) -> set[str]:
    named = model.named_modules(remove_duplicate=False)
    return {name for name, module in named if isinstance(module, MultiAdapterLinear)}


def _unwrapped(tensors: dict[str, torch.Tensor], wrapped: Set[str]) -> dict[str, torch.Tensor]:
    """By their names in the pretrained model: without the ``base`` of layers that wrap theirs."""

    def plain(name: str) -> str:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part == "base" and ".".join(parts[:i]) in wrapped:
                return ".".join(parts[:i] + parts[i + 1 :])
        return name

    return {plain(name): tensor for name, tensor in tensors.items()}


def _own_tensors(layers: dict[str, Adapted]) -> dict[str, torch.Tensor]:
    own = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        own[f"{prefix}skew"] = layer.skew
        if layer.scale is not None:
            own[f"{prefix}scale"] = layer.scale
    return own


def write_whole(path: Path, content: bytes) -> None:
    """A file with this content, which appears whole or not at all."""
    path = path.resolve()  # a link stays one
    temporary = path.with_name(f".boft_ops-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """The options of each layer, and the tensors."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            config = parse_metadata(path, file.metadata() or {})
            names = file.keys()
            return config, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def parse_metadata(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """The options of each layer, or ValueError."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a {FORMAT} adapter, got a safetensors file of format "
            f"{metadata.get('format')!r}"
        )
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise ValueError(f"{path}: expected format version up to {FORMAT_VERSION}, got {version!r}")
    try:
        config = json.loads(metadata.get("layers", ""))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected the layers' options as JSON: {error}") from error
    if not isinstance(config, dict) or not all(isinstance(v, dict) for v in config.values()):
        raise ValueError(f"{path}: expected layers with their options, got {config!r}")
    for name, options in config.items():
        if odd := sorted((options.keys() ^ BOFTLayer.OPTIONS) - LATER_OPTIONS):
            raise ValueError(f"{path}: {name}: unknown or missing options {odd}")
    return config


def _check_whole(layers: dict[str, Adapted]) -> None:
    if switched := [name for name, layer in layers.items() if layer.n_identity]:
        raise ValueError(
            f"model: expected interpolate(0), as a file holds all factors; {switched[0]!r} has "
            f"interpolate({layers[switched[0]].n_identity})"
        )


def _check_levels(
    path: str | os.PathLike, config: dict[str, dict], tensors: dict[str, torch.Tensor]
) -> None:
    """Before layers are made of it: levels of a kaleidoscope are memory, and limited by nothing."""
    for name, options in config.items():
        levels = options.get("kaleidoscope", 0)
        skew = tensors.get(f"{name}.skew" if name else "skew")
        known = type(levels) is int and skew is not None and skew.dim() == 3
        if levels and not (known and 2 * levels <= len(skew)):
            raise ValueError(f"{path}: {name}: kaleidoscope: {levels!r} is not what its skew has")


def _compare_options(
    path: str | os.PathLike, config: dict[str, dict], layers: dict[str, Adapted]
) -> None:
    if odd := sorted(config.keys() ^ layers.keys()):
        raise ValueError(f"{path}: expected the model's BOFT layers, these differ: {odd[:4]}")
    for name, layer in layers.items():
        # dropout may change between trainings; everything else is part of what the tensors mean
        mine = {k: v for k, v in layer.options().items() if not k.startswith("p_")}
        saved = {k: v for k, v in config[name].items() if not k.startswith("p_")}
        if saved != mine:
            raise ValueError(f"{path}: {name}: expected the model's {mine}, got {saved}")


def _check_tensors(
    path: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    targets: dict[str, torch.Tensor],
    required: set[str],
) -> None:
    if missing := sorted(required - tensors.keys()):
        raise ValueError(f"{path}: expected a tensor {missing[0]!r}, got none")
    names: dict[int, str] = {}  # of each target
    for name, tensor in tensors.items():
        if name not in targets:
            raise ValueError(f"{path}: expected parameters of the model, got {name!r}")
        same = names.setdefault(id(targets[name]), name)
        if same != name and not torch.equal(tensor, tensors[same]):
            raise ValueError(f"{path}: expected one tensor for {same!r} and {name!r}, got two")
        shape = tuple(targets[name].shape)
        kind = targets[name].is_floating_point()
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != kind:
            raise ValueError(
                f"{path}: {name}: expected {'a floating-point' if kind else 'an integer'} tensor "
                f"of shape {shape}, got {tensor.dtype} of {tuple(tensor.shape)}"
            )
