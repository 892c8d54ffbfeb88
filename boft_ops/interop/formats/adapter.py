"""An adapter apart from any model and any file: what every format is read into and written from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..._runtime import checks
from ...nn.base import adapter_options


@dataclass(frozen=True)
class LayerAdapter:
    """The rotation and the scale of one layer, in this package's convention (docs/layers.md).

    Attributes:
        skew: (m, K, b(b-1)/2), float32 or float64.
        scale: (n,) or None.
        side, method, p_component, p_block: as for ``BOFTLinear``.
        kind: "Linear" or "Conv2d", torch's layer that is rotated; None where the file did not tell.
        out_features: n, or None likewise.
    """

    skew: torch.Tensor
    scale: torch.Tensor | None = None
    side: str = "in"
    method: str = "exact"
    p_component: float = 0.0
    p_block: float = 0.0
    kind: str | None = None
    out_features: int | None = None

    @property
    def block_size(self) -> int:
        return checks.block_size_from_packed("skew", self.skew.shape[-1])

    @property
    def n_factors(self) -> int:
        return self.skew.shape[0]

    @property
    def features(self) -> int:
        """The rotated ones, K * b."""
        return self.skew.shape[1] * self.block_size

    def options(self) -> dict[str, int | float | str | bool]:
        """The keyword arguments of a BOFT layer for this adapter."""
        return adapter_options(self, self)


@dataclass(frozen=True)
class Adapter:
    """What one checkpoint holds.

    Attributes:
        layers: by the dotted names of the layers in the pretrained model.
        others: further trained tensors by their names in that model: heads, biases of the rotated
            layers, running statistics.
    """

    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def check(adapter: Adapter, source: object) -> Adapter:
    """``adapter`` itself, or ValueError: whatever a file says, from here on it is well-formed."""
    if not adapter.layers:
        raise ValueError(f"{source}: expected at least one rotated layer, got none")
    for name in (*adapter.layers, *adapter.others):
        if not all(part.isprintable() and part for part in name.split(".")):
            raise ValueError(f"{source}: expected dotted names of modules, got {name!r}")
    for name, layer in adapter.layers.items():
        try:
            _check_layer(layer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {name}: {error}") from error
    for name, tensor in adapter.others.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{source}: {name}: expected finite numbers, got NaN or infinity")
    return adapter


def _check_layer(layer: LayerAdapter) -> None:
    checks.choice("side", layer.side, checks.SIDES)
    checks.choice("method", layer.method, checks.METHODS)
    checks.probability("p_component", layer.p_component)
    checks.probability("p_block", layer.p_block)
    for name, tensor in (("skew", layer.skew), ("scale", layer.scale)):
        if tensor is None:
            continue
        checks.tensor(name, tensor)
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if layer.skew.dim() != 3 or 0 in layer.skew.shape[:2]:
        raise ValueError(
            f"skew: expected shape (n_factors, blocks, b(b-1)/2), got {tuple(layer.skew.shape)}"
        )
    checks.butterfly_shape(layer.features, layer.block_size, layer.n_factors)
    n = layer.out_features
    if layer.side == "out" and n not in (None, layer.features):
        raise ValueError(f"expected a rotation of the {n} outputs, got one of {layer.features}")
    if layer.scale is not None and (layer.scale.dim() != 1 or n not in (None, len(layer.scale))):
        raise ValueError(
            f"scale: expected shape ({'n' if n is None else n},), got {tuple(layer.scale.shape)}"
        )


Base = nn.Module | str | os.PathLike
Shapes = dict[str, tuple[int, ...]]


def shapes_of(base: Base) -> Shapes:
    """The shape of the weight of every module of a pretrained model, by its dotted name."""
    suffix = ".weight"
    named = tensors_of(base).items()
    return {name.removesuffix(suffix): shape for name, shape in named if name.endswith(suffix)}


def tensors_of(base: Base) -> Shapes:
    """The shape of every tensor of a pretrained model, by its name.

    Args:
        base: the model, one of its safetensors files, or the folder of them: names and shapes are
            read, not the weights.
    """
    if isinstance(base, nn.Module):
        state = base.state_dict().items()
        return {name: tuple(t.shape) for name, t in state if isinstance(t, torch.Tensor)}
    shapes = {}
    for file in _safetensors_files(Path(base)):
        shapes |= _header(file)
    return shapes


def _safetensors_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"base: expected a safetensors file or a folder of them, got {str(path)!r}"
        )
    return files


def _header(file: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"base: {file}: not a whole safetensors file: {error}") from error


def described(layer: LayerAdapter, shape: tuple[int, ...] | None, name: str) -> LayerAdapter:
    """``layer`` with what its weight's shape says about it; ValueError where they do not fit."""
    from dataclasses import replace

    if shape is None:
        return layer
    kind = {2: "Linear", 4: "Conv2d"}.get(len(shape))
    if kind is None:
        raise ValueError(f"{name}: expected a weight of a linear layer or a Conv2d, got {shape}")
    rotated = shape[0] if layer.side == "out" else torch.Size(shape[1:]).numel()
    if rotated != layer.features:
        raise ValueError(
            f"{name}: expected a rotation of {rotated} features for the weight {shape}, got one of "
            f"{layer.features}"
        )
    if layer.kind not in (None, kind):
        raise ValueError(f"{name}: expected a rotated {layer.kind}, the base has a {kind}")
    return replace(layer, kind=kind, out_features=shape[0])
