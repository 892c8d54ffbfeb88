"""The content of an adapter checkpoint, which all formats are read into and written from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from ..._runtime import checks
from ..._runtime.files import open_safetensors
from ...nn.config import RotationConfig
from ...nn.rotated_weight import is_dense

INDEX = "model.safetensors.index.json"
LAYER_TYPES = {2: "Linear", 4: "Conv2d"}  # by the number of dimensions of the weight


@dataclass(frozen=True)
class LayerState:
    """The rotation and the scale of one layer, in this package's convention (docs/layers.md).

    Attributes:
        skew: (m, K, b(b-1)/2), float32 or float64.
        scale: (n,) or None.
        config: the options of the layer.
        layer_type: "Linear" or "Conv2d", torch's class of the layer; None if the file does not say.
        out_features: number n of outputs; None if the file does not say.
    """

    skew: torch.Tensor
    scale: torch.Tensor | None
    config: RotationConfig
    layer_type: str | None = None
    out_features: int | None = None

    @classmethod
    def from_tensors(
        cls,
        skew: torch.Tensor,
        scale: torch.Tensor | None = None,
        *,
        layer_type: str | None = None,
        out_features: int | None = None,
        **options: str | float,
    ) -> LayerState:
        """Build a state; ``options`` are those that the tensors do not tell (side, method, ...).

        Raises:
            TypeError, ValueError: the tensors are no rotation, or an option is not valid.
        """
        checks.tensor("skew", skew)
        if skew.dim() != 3 or 0 in skew.shape[:2]:
            raise ValueError(
                f"skew: expected shape (n_factors, blocks, b(b-1)/2), got {tuple(skew.shape)}"
            )
        block_size = checks.block_size_from_packed("skew", skew.shape[-1])
        config = RotationConfig(
            block_size=block_size, n_factors=len(skew), scale=scale is not None, **options
        )
        return cls(skew, scale, config, layer_type, out_features)

    @property
    def features(self) -> int:
        """The number K * b of rotated features."""
        return self.skew.shape[1] * self.config.block_size


@dataclass(frozen=True)
class Checkpoint:
    """The content of one adapter checkpoint.

    Attributes:
        layers: by the dotted names of the layers in the pretrained model.
        others: further trained tensors by their names in that model: heads, biases of the rotated
            layers, running statistics.
        aliases: the names of layers in a trainer's file, prefix included, if that is the source.
        errors: for each layer, the relative error of what was written: the Frobenius norm of the
            difference of the updates of its weight, over the norm of the update. Empty unless
            ``convert`` has approximated.
    """

    layers: dict[str, LayerState] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def check(checkpoint: Checkpoint, source: object) -> Checkpoint:
    """Return ``checkpoint`` if it is well-formed, else raise ValueError naming ``source``."""
    if not checkpoint.layers:
        raise ValueError(f"{source}: expected at least one rotated layer, got none")
    for name in (*checkpoint.layers, *checkpoint.others):
        if not all(part.isprintable() and part for part in name.split(".")):
            raise ValueError(f"{source}: expected dotted names of modules, got {name!r}")
    for name, layer in checkpoint.layers.items():
        try:
            _check_layer(layer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {name}: {error}") from error
    for name, tensor in checkpoint.others.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{source}: {name}: expected finite numbers, got NaN or infinity")
    return checkpoint


def _check_layer(layer: LayerState) -> None:
    for name, tensor in (("skew", layer.skew), ("scale", layer.scale)):
        if tensor is None:
            continue
        checks.tensor(name, tensor)
        if not tensor.float().isfinite().all():  # layers hold float32
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    layer.config.check_features(layer.features)
    n = layer.out_features
    if layer.config.side == "out" and n not in (None, layer.features):
        raise ValueError(f"expected a rotation of the {n} outputs, got one of {layer.features}")
    if layer.scale is not None and (layer.scale.dim() != 1 or n not in (None, len(layer.scale))):
        raise ValueError(
            f"scale: expected shape ({'n' if n is None else n},), got {tuple(layer.scale.shape)}"
        )


Base = nn.Module | str | os.PathLike[str]
Shapes = dict[str, tuple[int, ...]]


def shapes_of(base: Base) -> Shapes:
    """The shape of the weight of every module of a pretrained model, by the module's name."""
    suffix = ".weight"
    named = tensors_of(base).items()
    return {name.removesuffix(suffix): shape for name, shape in named if name.endswith(suffix)}


def tensors_of(base: Base) -> Shapes:
    """The shape of every tensor of a pretrained model, by its name.

    Args:
        base: the model, its safetensors file, or the folder of its safetensors files. Names and
            shapes are read, weights are not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no whole safetensors file.
    """
    if isinstance(base, nn.Module):
        state = base.state_dict().items()
        return {name: tuple(t.shape) for name, t in state if isinstance(t, torch.Tensor)}
    shapes = {}
    for file in weight_files(Path(base)):
        try:
            with open_safetensors(file) as opened:
                names = opened.keys()
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        except ValueError as error:
            raise ValueError(f"base: {error}") from error
    return shapes


def tensor_reader(base: Base) -> Callable[[str], torch.Tensor]:
    """Return a function that reads one tensor of a pretrained model by its name.

    Args:
        base: as for ``tensors_of``. Of files, one tensor at a time is read.

    Returns:
        The function. It raises ValueError if the model has no such tensor, or if that is quantized,
        sharded, or a placeholder without numbers.
    """
    if isinstance(base, nn.Module):
        state = base.state_dict()
        files = dict.fromkeys(state)
    else:
        files = {}
        for path in weight_files(Path(base)):
            with open_safetensors(path) as opened:
                files |= dict.fromkeys(opened.keys(), path)

    def read(name: str) -> torch.Tensor:
        if name not in files:
            raise ValueError(f"base: expected a tensor {name!r}, got none")
        if files[name] is None:
            tensor = state[name]
        else:
            with open_safetensors(files[name]) as opened:
                tensor = opened.get_tensor(name)
        if not is_dense(tensor) or tensor.is_meta or tensor.dtype not in checks.FLOATING:
            raise ValueError(
                f"base: {name}: expected a plain tensor of 16 to 64 bits, got a "
                f"{type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
            )
        return tensor.detach().cpu()

    return read


def weight_files(base: Path) -> list[Path]:
    """The safetensors files of a pretrained model: those that its index names, if it has one.

    Raises:
        FileNotFoundError: there are no such files, or the index names one that is missing.
        ValueError: the index is spoiled.
    """
    if base.is_file():
        return [base]
    index = base / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        if missing := [name for name in names if not (base / name).is_file()]:
            raise FileNotFoundError(f"base: expected {missing[0]!r}, which {INDEX} names, got none")
        return [base / name for name in names]
    if files := sorted(base.glob("*.safetensors")):
        return files
    raise FileNotFoundError(
        f"base: expected a safetensors file or a folder of them, got {str(base)!r}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {Path(name).name == name for name in weight_map.values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"base: {INDEX}: expected a weight_map of files") from error
    if names - {True}:
        raise ValueError(f"base: {INDEX}: expected files of its own folder, got others")
    return weight_map


def fitted(layer: LayerState, shape: tuple[int, ...] | None, name: str) -> LayerState:
    """Complete ``layer`` with the type and the outputs that the shape of its weight tells.

    Args:
        layer: the state of the layer.
        shape: of its weight in the pretrained model; None returns ``layer`` unchanged.
        name: of the layer, for messages.

    Raises:
        ValueError: the state does not fit the shape.
    """
    if shape is None:
        return layer
    layer_type = LAYER_TYPES.get(len(shape))
    if layer_type is None:
        raise ValueError(f"{name}: expected a weight of a linear layer or a Conv2d, got {shape}")
    rotated = shape[0] if layer.config.side == "out" else torch.Size(shape[1:]).numel()
    if rotated != layer.features:
        raise ValueError(
            f"{name}: expected a rotation of {rotated} features for the weight {shape}, got one of "
            f"{layer.features}"
        )
    if layer.layer_type not in (None, layer_type):
        raise ValueError(
            f"{name}: expected a rotated {layer.layer_type}, the base has a {layer_type}"
        )
    return replace(layer, layer_type=layer_type, out_features=shape[0])
