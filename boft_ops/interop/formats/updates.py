"""Writes an adapter as updates of weights, W' - W, for tools that know no rotations.

The pretrained weights are needed. One layer at a time is computed, in float64.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from pathlib import Path

import torch

from ..._runtime.files import encode_safetensors, write_whole
from ...nn.wrappers import dotted
from ...ops.merge import merge_weight
from ...ops.rotation import SkewRotation
from .checkpoint import Base, Checkpoint, tensor_reader
from .mangled import alias_of

PREFIX = "lora_unet"  # the prefix of "diff" for names of other origin
SUFFIXES = {"weight": "diff", "bias": "diff_b"}


def check_options(to: str, base: Base | None, rank: object, max_error: object) -> None:
    """Raise TypeError or ValueError if a target format does not go with these options."""
    if to != "lora":
        for name, value in (("rank", rank), ("max_error", max_error)):
            if value is not None:
                raise ValueError(f"{name}: expected none, as {to!r} is exact, got {value!r}")
    if to in ("diff", "lora") and base is None:
        raise ValueError(f"base: expected the pretrained model, whose weights {to!r} needs")
    if to == "lora":
        _check_number("rank", rank, numbers.Integral, "an integer >= 1", 1, math.inf)
        expected = "the largest relative error of a layer, from 0 to 1"
        _check_number("max_error", max_error, numbers.Real, expected, 0, 1)


def _check_number(
    name: str, value: object, number: type, expected: str, low: float, high: float
) -> None:
    if value is None or not isinstance(value, number) or isinstance(value, bool):
        kind = ValueError if value is None else TypeError
        raise kind(f"{name}: expected {expected}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def write_diff(checkpoint: Checkpoint, path: Path, base: Base, prefix: str | None) -> None:
    """Write ``<name>.diff`` for each weight and ``<name>.diff_b`` for each bias, in float32.

    Args:
        checkpoint: the adapter.
        path: the new file.
        base: the pretrained model.
        prefix: of the names of layers. None keeps the names of a trainer's file, and is lora_unet
            for other sources.

    Raises:
        ValueError: a further trained tensor is no weight or bias of the base, or two layers have
            one name.
    """
    tensors: dict[str, torch.Tensor] = {}

    def add(layer: str, suffix: str, update: torch.Tensor) -> None:
        key = f"{alias_of(checkpoint, layer, prefix, PREFIX)}.{suffix}"
        if key in tensors:
            raise ValueError(f"{layer}: another layer's name is {key!r}, too")
        tensors[key] = update.float()

    for name, update in _updates(checkpoint, base):
        add(name, "diff", update)
    read = tensor_reader(base)
    for name, trained in checkpoint.others.items():
        module, _, last = name.rpartition(".")
        if last not in SUFFIXES:
            raise ValueError(f"{name}: expected a weight or a bias, which alone have a diff")
        frozen = read(name)
        if frozen.shape != trained.shape:
            raise ValueError(
                f"{name}: expected the shape {tuple(frozen.shape)} of the base, got "
                f"{tuple(trained.shape)}"
            )
        add(module, SUFFIXES[last], trained.double() - frozen.double())
    write_whole(path, encode_safetensors(tensors, {"format": "pt"}))


def low_rank(
    checkpoint: Checkpoint, base: Base, rank: int, max_error: float
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
    """Approximate each update by B A with ``rank`` rows of A, as well as that is possible.

    Args:
        checkpoint: the adapter.
        base: the pretrained model.
        rank: at least 1. Where a weight has a smaller one, rows of zeros are added.
        max_error: the largest relative error.

    Returns:
        For each layer A (rank, d) or (rank, in, height, width) and B (n, rank) or
        (n, rank, 1, 1) in float32, and the relative error in the Frobenius norm.

    Raises:
        ValueError: the error of a layer is larger than ``max_error``.
    """
    factors, errors = {}, {}
    for name, update in _updates(checkpoint, base):
        a, b, errors[name] = _factors(update.flatten(1), rank)
        a, b = a.unflatten(1, update.shape[1:]), b.reshape(*b.shape, *[1] * (update.dim() - 2))
        factors[name] = a.float(), b.float()
    worst = max(errors, key=errors.get)
    if errors[worst] > max_error:
        count = sum(error > max_error for error in errors.values())
        raise ValueError(
            f"{worst}: expected a relative error of at most {max_error} at rank {rank}, got "
            f"{errors[worst]:.4f}, and more than allowed in {count} of {len(errors)} layers: a "
            "rotation's update has no small rank; diff is exact"
        )
    return factors, errors


def _factors(update: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (rank, d), B (n, rank) and the relative error for an update (n, d) in float64.

    The singular vectors of the smaller side are eigenvectors, which are computed faster. The other
    factor is the update projected on them, so the error is what the projection leaves.
    """
    wide = update.shape[0] <= update.shape[1]
    matrix = update if wide else update.mT
    vectors = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)[:, :rank]
    projected = vectors.mT @ matrix
    norm = torch.linalg.vector_norm(update)
    left = torch.linalg.vector_norm(matrix - vectors @ projected)
    a, b = (projected, vectors) if wide else (vectors.mT, projected.mT)
    missing = rank - len(a)
    if missing > 0:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(len(b), missing)], 1)
    return a, b, float(left / norm) if norm else 0.0


def _updates(checkpoint: Checkpoint, base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, W' - W) for each layer, in float64 and the shape of W."""
    read = tensor_reader(base)
    for name, layer in checkpoint.layers.items():
        weight = read(dotted(name, "weight")).double()
        # A PEFT folder does not always say what it rotates: the shape of W does.
        rotated = weight.shape[0] if layer.config.side == "out" else weight[0].numel()
        if weight.dim() not in (2, 4) or rotated != layer.features:
            raise ValueError(
                f"{name}: expected a rotation of {layer.features} features, got a weight "
                f"{tuple(weight.shape)}"
            )
        blocks = SkewRotation(layer.skew.double(), layer.config.method).blocks()
        scale = None if layer.scale is None else layer.scale.double()
        yield name, merge_weight(weight, blocks, scale, side=layer.config.side) - weight
