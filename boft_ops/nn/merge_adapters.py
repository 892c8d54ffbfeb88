"""Several adapters as one: means of their rotations, which are rotations again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from .._runtime import checks
from ..ops.geodesic import chart_mean, karcher_mean
from .adapter_file import adapter_of
from .adapter_format import Adapter, read_adapter
from .config import Options, RotationConfig
from .wrappers import dotted

MEANS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "orthomerge": chart_mean,
    "karcher": karcher_mean,
}


@torch.no_grad()
def merge_adapters(
    adapters: Iterable[str | os.PathLike[str] | nn.Module | Adapter],
    weights: Iterable[float] | None = None,
    *,
    how: str = "orthomerge",
) -> Adapter:
    """Merge adapters of one pretrained model into one adapter, as rotations.

    A mean of weights, or of their changes, loses what a rotation keeps: the singular values of a
    layer shrink wherever the adapters disagree. The mean of rotations is a rotation with the same
    block_size and n_factors, computed in float64 for each factor:

    - "orthomerge" averages skews and multiplies the mean by sum_i w_i |Q_i| / |sum_i w_i Q_i|, so
      that it turns as far as the adapters do. With one factor it is arXiv 2602.05943's formula.
    - "karcher" is the mean on the manifold: the rotation with the least sum of weighted squared
      distances. It turns less far where adapters disagree.

    A scale is the weighted geometric mean. A layer that an adapter does not have counts as the
    identity. Other trained tensors, such as heads and biases, are averaged over the adapters that
    have them; heads of different tasks are better kept apart.

    Args:
        adapters: files of ``save_adapter``, adapted models, or results of this function.
        weights: a weight for each adapter, not negative; they are divided by their sum. None gives
            all the same.
        how: "orthomerge" or "karcher".

    Returns:
        The merged ``Adapter``, for ``load_adapter`` or its ``save``.

    Raises:
        TypeError: an argument has a wrong type.
        FileNotFoundError: there is no such file.
        ValueError: there is no adapter; a weight is out of range; adapters differ in the options of
            a layer or in the shape of a tensor; a scale is not positive; or, with "karcher", blocks
            come from a truncated series, or differ by angles near pi. The message names the layer.
    """
    checks.choice("how", how, tuple(MEANS))
    if isinstance(adapters, (str, os.PathLike, nn.Module, Adapter)):
        raise TypeError(f"adapters: expected several, got one {type(adapters).__name__}")
    contents = [_content(adapter) for adapter in adapters]
    shares = _shares(weights, len(contents))
    layers: dict[str, Options] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for content in contents for name in content.layers):
        try:
            layers[name], merged = _merge_layer(name, contents, shares, how)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        tensors |= merged
    rotations = {dotted(name, part) for name in layers for part in ("skew", "scale_offset")}
    for name in dict.fromkeys(name for content in contents for name in content.tensors):
        if name not in rotations:
            tensors[name] = _mean(name, contents, shares)
    bases = {name: base for content in contents for name, base in content.bases.items()}
    return Adapter(layers, bases, tensors)


def _content(adapter: object) -> Adapter:
    if isinstance(adapter, Adapter):
        return adapter
    if isinstance(adapter, nn.Module):
        return adapter_of(adapter)
    if isinstance(adapter, (str, os.PathLike)):
        return read_adapter(Path(adapter))
    raise TypeError(
        f"adapters: expected files, adapted models or adapters, got a {type(adapter).__name__}"
    )


def _shares(weights: Iterable[float] | None, count: int) -> torch.Tensor:
    """The weights divided by their sum, (count,), float64."""
    if count == 0:
        raise ValueError("adapters: expected at least one, got none")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"weights: expected {count}, one for each adapter, got {len(weights)}")
    for weight in weights:
        checks.number("weights", weight)
    if not any(weights):
        raise ValueError("weights: expected a positive sum, got zeros")
    shares = torch.tensor(weights, dtype=torch.float64)
    return shares / shares.sum()


def _merge_layer(
    name: str, contents: Sequence[Adapter], shares: torch.Tensor, how: str
) -> tuple[Options, dict[str, torch.Tensor]]:
    """The options of the merged layer, and its tensors by their names."""
    present = [content for content in contents if name in content.layers]
    options = _common_options([content.layers[name] for content in present])
    if how == "karcher" and options["method"] != "exact":
        raise ValueError(
            f"method: expected 'exact', whose blocks are rotations, got {options['method']!r}"
        )
    skew_name, offset_name = (dotted(name, part) for part in ("skew", "scale_offset"))
    skews = [content.tensors.get(skew_name) for content in contents]
    offsets = [content.tensors.get(offset_name) for content in contents]
    merged = {skew_name: _as_first(skews, MEANS[how](_stacked("skew", skews), shares))}
    options["scale"] = any(offset is not None for offset in offsets)
    if options["scale"]:
        factors = _stacked("scale_offset", offsets)
        if not (factors > -1).all():
            raise ValueError("scale: expected positive numbers, which have a geometric mean")
        mean = torch.tensordot(shares, factors.log1p(), 1).expm1()
        merged[offset_name] = _as_first(offsets, mean)
    return options, merged


def _common_options(found: Sequence[Options]) -> Options:
    """The options of the first adapter, if the others say the same of the rotation."""
    first, *others = map(_checked, found)
    for other in others:
        for key in ("block_size", "n_factors", "side", "method", "kaleidoscope", "experts"):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{key}: expected one value for all adapters, got {first.get(key)!r} and "
                    f"{other.get(key)!r}"
                )
    return first


def _checked(options: Options) -> Options:
    """The options of a layer; those of experts say whose rotations they are, too.

    Raises:
        TypeError, ValueError: an option is not valid for any layer.
    """
    experts = {key: value for key, value in options.items() if key == "experts"}
    rotation = {key: value for key, value in options.items() if key != "experts"}
    return RotationConfig(**rotation).options() | experts


def _stacked(part: str, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The tensors of all adapters in one, float64 on the CPU; zeros stand for None."""
    like = next((tensor for tensor in tensors if tensor is not None), None)
    if like is None:
        raise ValueError(f"expected a tensor {part!r}, got none")
    if shapes := {tuple(t.shape) for t in tensors if t is not None and t.shape != like.shape}:
        raise ValueError(
            f"{part}: expected one shape for all adapters, got {tuple(like.shape)} and "
            f"{shapes.pop()}"
        )
    zeros = torch.zeros(like.shape, dtype=torch.float64)
    wide = [zeros if t is None else t.to("cpu", torch.float64) for t in tensors]
    return torch.stack(wide)


def _as_first(tensors: Sequence[torch.Tensor | None], merged: torch.Tensor) -> torch.Tensor:
    return merged.to(next(tensor.dtype for tensor in tensors if tensor is not None))


def _mean(name: str, contents: Sequence[Adapter], shares: torch.Tensor) -> torch.Tensor:
    """The mean of a further tensor over the adapters that have it; integers are rounded."""
    found = [content.tensors.get(name) for content in contents]
    own = torch.tensor([tensor is not None for tensor in found])
    shares = torch.where(own, shares, 0)
    first = next(tensor for tensor in found if tensor is not None)
    if not shares.any():  # only adapters of weight zero have it
        shares = own.double()
    try:
        stacked = _stacked("tensor", found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    mean = torch.tensordot(shares / shares.sum(), stacked, 1)
    return (mean if first.is_floating_point() else mean.round()).to(first.dtype)
