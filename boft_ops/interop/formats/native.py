"""Reads and writes this package's adapter files (``save_adapter``), without a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ...nn.adapter_format import FORMAT, parse_metadata, with_offsets, write_adapter
from ...nn.config import RotationConfig
from ...nn.wrappers import dotted
from ...ops.scale import offset_of, scale_of
from .checkpoint import LAYER_TYPES, Checkpoint, LayerState, Shapes, fitted


def is_checkpoint(metadata: dict[str, str]) -> bool:
    """True if the metadata of a safetensors file are those of ``save_adapter``."""
    return metadata.get("format") == FORMAT


def read(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], shapes: Shapes
) -> Checkpoint:
    """Build the checkpoint from the content of a file.

    Args:
        path: of the file, for messages.
        tensors, metadata: the content of the file.
        shapes: shapes of the pretrained model's weights, by the names of its modules; may be empty.

    Raises:
        ValueError: the options or tensors are not valid, or do not fit each other.
    """
    layer_options = parse_metadata(path, metadata)
    if experts := [name for name, options in layer_options.items() if "experts" in options]:
        raise ValueError(
            f"{path}: {experts[0]}: expected a rotated layer, got rotated experts, which no other "
            "format has"
        )
    bases = _bases(path, metadata.get("bases", "{}"))
    others = dict(with_offsets(metadata, layer_options, tensors))
    layers = {}
    for name, options in layer_options.items():
        if "kaleidoscope" in options:
            raise ValueError(
                f"{path}: {name}: kaleidoscope: expected a butterfly, got a product of several, "
                "which no other format has"
            )
        skew = others.pop(dotted(name, "skew"), None)
        scale = scale_of(others.pop(dotted(name, "scale_offset"), None))
        if skew is None:
            raise ValueError(f"{path}: {name}: expected a tensor {dotted(name, 'skew')}, got none")
        layer_type, out_features = bases.get(name, (None, None))
        try:
            saved = RotationConfig(**options)
            stored = {key: options[key] for key in ("side", "method", "p_component", "p_block")}
            layer = LayerState.from_tensors(
                skew, scale, layer_type=layer_type, out_features=out_features, **stored
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        tensors_say = layer.config.options()
        for key, value in saved.options().items():
            if tensors_say[key] != value:
                raise ValueError(
                    f"{path}: {name}: {key}: the file says {value}, its tensors {tensors_say[key]}"
                )
        layers[name] = fitted(layer, shapes.get(name), name)
    return Checkpoint(layers, others)


def _bases(path: Path, text: str) -> dict[str, tuple[str, int]]:
    """The type and the number of outputs of each layer."""
    try:
        bases = json.loads(text)
        pairs = {name: (layer_type, n) for name, (layer_type, n) in bases.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: bases: expected type and outputs of each layer") from error
    for name, (layer_type, n) in pairs.items():
        if layer_type not in LAYER_TYPES.values() or type(n) is not int or n < 1:
            raise ValueError(
                f"{path}: {name}: expected the outputs of a Linear or Conv2d, which are the layers "
                f"that other formats have, got {layer_type!r}, {n!r}"
            )
    return pairs


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a file that ``load_adapter`` reads.

    Raises:
        ValueError: a further tensor bears the name of a skew or scale_offset.
    """
    tensors = dict(checkpoint.others)
    bases = {}
    for name, layer in checkpoint.layers.items():
        rotation = {dotted(name, "skew"): layer.skew}
        if layer.scale is not None:
            rotation[dotted(name, "scale_offset")] = offset_of(layer.scale)
        if clash := rotation.keys() & tensors.keys():
            raise ValueError(f"expected no other tensor of that name, got two {clash.pop()!r}")
        tensors |= rotation
        if layer.layer_type is not None:
            bases[name] = layer.layer_type, layer.out_features
    layer_options = {name: layer.config.options() for name, layer in checkpoint.layers.items()}
    write_adapter(path, layer_options, bases, tensors)
