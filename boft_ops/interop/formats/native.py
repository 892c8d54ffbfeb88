"""This package's own adapter files (``save_adapter``), apart from any model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ...nn.adapter_file import FORMAT, parse_metadata, write_adapter
from .adapter import Adapter, LayerAdapter, Shapes, described


def is_checkpoint(metadata: dict[str, str]) -> bool:
    return metadata.get("format") == FORMAT


def read(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], shapes: Shapes
) -> Adapter:
    config = parse_metadata(path, metadata)
    bases = _bases(path, metadata.get("bases", "{}"))
    others = dict(tensors)
    layers = {}
    for name, options in config.items():
        if "kaleidoscope" in options:
            raise ValueError(
                f"{path}: {name}: kaleidoscope: expected a butterfly, got a product of several, "
                "which no other format has"
            )
        prefix = f"{name}." if name else ""
        skew, scale = others.pop(f"{prefix}skew", None), others.pop(f"{prefix}scale", None)
        if skew is None or skew.dim() != 3:
            raise ValueError(f"{path}: {name}: expected a tensor {prefix}skew of 3 dimensions")
        kind, out_features = bases.get(name, (None, None))
        wanted = {k: options[k] for k in ("side", "method", "p_component", "p_block")}
        layer = LayerAdapter(skew, scale, **wanted, kind=kind, out_features=out_features)
        got = layer.options()
        if got != options:
            odd = next(k for k in got if got[k] != options[k])
            raise ValueError(f"{path}: {name}: {odd}: the file says {options[odd]}, its tensors "
                             f"{got[odd]}")  # fmt: skip
        layers[name] = described(layer, shapes.get(name), name)
    return Adapter(layers, others)


def _bases(path: Path, text: str) -> dict[str, tuple[str, int]]:
    try:
        bases = json.loads(text)
        pairs = {name: (kind, n) for name, (kind, n) in bases.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: bases: expected kind and outputs of each layer") from error
    for kind, n in pairs.values():
        if kind not in ("Linear", "Conv2d") or type(n) is not int or n < 1:
            raise ValueError(f"{path}: bases: expected kind and outputs, got {kind!r}, {n!r}")
    return pairs


def write(adapter: Adapter, path: Path) -> None:
    tensors = dict(adapter.others)
    bases = {}
    for name, layer in adapter.layers.items():
        prefix = f"{name}." if name else ""
        own = {f"{prefix}skew": layer.skew}
        if layer.scale is not None:
            own[f"{prefix}scale"] = layer.scale
        if clash := own.keys() & tensors.keys():
            raise ValueError(f"expected no other tensor of that name, got two {clash.pop()!r}")
        tensors |= own
        if layer.kind is not None:
            bases[name] = layer.kind, layer.out_features
    config = {name: layer.options() for name, layer in adapter.layers.items()}
    write_adapter(path, config, bases, tensors)
