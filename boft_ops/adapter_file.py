"""Adapters on disk: one safetensors file with the trained tensors and the layers' options."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from ._layer import BOFTLayer
from .model import install

FORMAT = "boft_ops"
FORMAT_VERSION = 1


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what was finetuned to one safetensors file.

    It holds, under their names in the model, the skew and scale of every BOFT layer and every other
    parameter that requires a gradient (``modules_to_save``, trained biases), and as metadata the
    format version and each layer's options. The file appears whole or not at all.

    Args:
        model: an adapted model; if layers are merged the adapter is the same.
        path: file to write; an existing one is replaced.

    Raises:
        ValueError: the model has no BOFT layer.
    """
    from safetensors.torch import save

    layers = _layers(model)
    if not layers:
        raise ValueError("model: expected an adapted model, got one without BOFT layers")
    tensors = {k: v.detach().contiguous() for k, v in _adapter_tensors(model, layers).items()}
    config = {name: layer.options() for name, layer in layers.items()}
    extra = sorted(set(tensors) - set(_own_tensors(layers)))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "layers": json.dumps(config, sort_keys=True),
        "other_parameters": json.dumps(extra),
    }
    _write_whole(Path(path), save(tensors, metadata))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a file of ``save_adapter``. Everything is checked before the model is touched.

    Args:
        model: the pretrained model, which is adapted as the file says, or one that is adapted
        alike. path: file to read.

    Returns:
        ``model``, on its own device and with its own dtypes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, not of this package, of a newer format version, or does
            not fit the model; the message says which tensor or option.
    """
    metadata, tensors = _read(Path(path))
    config = json.loads(metadata["layers"])
    present = _layers(model)
    if present:
        _compare_options(path, config, {name: layer.options() for name, layer in present.items()})
    expected = _expected_shapes(path, model, config, json.loads(metadata["other_parameters"]))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        wrong = sorted(set(shapes.items()) ^ set(expected.items()))
        raise ValueError(f"{path}: tensors do not fit the model, first differences: {wrong[:4]}")
    if any(layer.merged for layer in present.values()):
        raise ValueError("model: expected unmerged BOFT layers, got merged ones; unmerge() first")
    if not present:
        install(model, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
            parameters[name].requires_grad_(True)
    return model


def _layers(model: nn.Module) -> dict[str, BOFTLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BOFTLayer)}


def _own_tensors(layers: dict[str, BOFTLayer]) -> dict[str, torch.Tensor]:
    own = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        own[f"{prefix}skew"] = layer.skew
        if layer.scale is not None:
            own[f"{prefix}scale"] = layer.scale
    return own


def _adapter_tensors(model: nn.Module, layers: dict[str, BOFTLayer]) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | _own_tensors(layers)


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: expected a {FORMAT} adapter, got a safetensors file of format "
                    f"{metadata.get('format')!r}"
                )
            version = metadata.get("format_version", "")
            if not version.isdigit() or int(version) > FORMAT_VERSION:
                raise ValueError(
                    f"{path}: expected format version up to {FORMAT_VERSION}, got {version!r}"
                )
            names = file.keys()
            return metadata, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _compare_options(path: str | os.PathLike, saved: dict, present: dict) -> None:
    if saved.keys() != present.keys():
        odd = sorted(saved.keys() ^ present.keys())
        raise ValueError(f"{path}: expected the model's BOFT layers, these differ: {odd[:4]}")
    for name, options in saved.items():
        # dropout may change between trainings; everything else is part of what the tensors mean
        structure = {k: v for k, v in options.items() if not k.startswith("p_")}
        mine = {k: v for k, v in present[name].items() if not k.startswith("p_")}
        if structure != mine:
            raise ValueError(f"{path}: {name}: expected the model's {mine}, got {structure}")


def _expected_shapes(
    path: str | os.PathLike, model: nn.Module, config: dict, others: list[str]
) -> dict[str, tuple[int, ...]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {}
    for name, options in config.items():
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            raise ValueError(
                f"{path}: expected {name!r} to be a linear or convolution layer of the model, got "
                f"{type(module).__name__ if module is not None else 'no such module'}"
            )
        n, d = module.weight.flatten(1).shape
        b, m = options["block_size"], options["n_factors"]
        features = d if options["side"] == "in" else n
        prefix = f"{name}." if name else ""
        shapes[f"{prefix}skew"] = (m, features // b, b * (b - 1) // 2)
        if options["scale"]:
            shapes[f"{prefix}scale"] = (n,)
    for name in others:
        if name not in parameters:
            raise ValueError(f"{path}: expected {name!r} to be a parameter of the model, got none")
        shapes[name] = tuple(parameters[name].shape)
    return shapes
