"""``cache_merged``: linear layers keep their merged weight between calls, while nothing changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from .._runtime import autocast, checks, internals
from .._runtime.dtypes import COMPUTE, widest
from ..ops.linear import PLAIN, is_rotated
from ..ops.merged_linear import (
    MergedWeight,
    merged_linear,
    merged_with_rotation,
    serves_training,
)
from ..ops.planner import plan_for
from ..ops.rotation import SkewRotation
from ..ops.scale import scale_of
from ..ops.stages import plan
from .changes import Source
from .distributed import changes_unseen

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class _Entry(NamedTuple):
    """The merged weight that a layer keeps, with its origin.

    Attributes:
        key: everything that decides about the numbers beside the sources.
        sources: frozen weight, skew and, if there is one, scale_offset.
        numbers: the merged weight; None for the identity on a CPU, which has to stay torch's own
            layer bit for bit.
        rotation: ``numbers`` with what the gradients of skew and scale need, or None.
    """

    key: tuple
    sources: tuple[Source, ...]
    numbers: torch.Tensor | None
    rotation: MergedWeight | None

    def tensors(self) -> Iterator[torch.Tensor]:
        if self.rotation is not None:
            yield self.rotation.blocks
            if len(self.rotation.blocks) > 1:  # one factor is its own stage
                yield from self.rotation.matrices
        if self.numbers is not None:
            yield self.numbers


class KeptWeight:
    """The merged weight of one layer, made when a call first needs it.

    It is neither copied nor pickled with the layer: a copy of the layer keeps nothing.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def drop(self) -> None:
        self._entry = None

    def held_bytes(self) -> int:
        entry = self._entry
        return 0 if entry is None else _bytes_of(entry.tensors())

    def call(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The output of the layer by the merged weight; None for a call that it does not serve.

        Args:
            layer: an unmerged ``BOFTLinear``.
            x: its input, checked.
        """
        if not _is_usual(x) or not _is_kept(layer):
            return None
        weight, skew, bias = layer.frozen_weight, layer.skew, layer.bias
        offset = layer.scale_offset
        is_scale_trained = offset is not None and offset.requires_grad
        is_trained = skew.requires_grad or is_scale_trained
        if layer.training and layer.dropout.p_component and layer.dropout.p_block:
            return None
        if autocast.enabled(x.device.type):
            x = autocast.cast(x)
            bias = None if bias is None else autocast.cast(bias)
            fits = COMPUTE[x.dtype] == COMPUTE[weight.dtype]
        else:
            fits = x.dtype == weight.dtype
        can_train = _has_gradients(layer) and serves_training(
            x.dtype, offset if is_scale_trained else None
        )
        needs_gradients = is_trained and torch.is_grad_enabled()
        if not fits or (needs_gradients and not can_train):
            return None
        trains = can_train and is_trained and (layer.training or needs_gradients)
        options = layer.config, layer.n_identity, layer.strength
        key = x.dtype, *options, trains, is_scale_trained, _stream(x)
        entry = self._entry
        if entry is None or not _is_now(entry, key, layer):
            entry = self._entry = _make(layer, key)
        if entry.numbers is None:
            return None
        if not needs_gradients:
            return F.linear(x, entry.numbers, bias)
        operands = x, weight, SkewRotation(skew), offset, bias, entry.rotation
        return merged_linear(*operands, scale_base=1, keeps=True)


def _is_now(entry: _Entry, key: tuple, layer: Any) -> bool:
    now = [t for t in (layer.frozen_weight, layer.skew, layer.scale_offset) if t is not None]
    return (
        entry.key == key
        and len(entry.sources) == len(now)
        and all(source.is_now(tensor) for source, tensor in zip(entry.sources, now, strict=True))
    )


@torch.inference_mode(False)
@torch.no_grad()
def _make(layer: Any, key: tuple) -> _Entry:
    dtype, _, _, _, trains, is_scale_trained, _ = key
    weight, skew, offset = layer.frozen_weight, layer.skew, layer.scale_offset
    tensors = [tensor for tensor in (weight, skew, offset) if tensor is not None]
    # the frozen weight is too large to be compared in every call
    sources = tuple(Source.of(t, t is not weight and t.is_cpu) for t in tensors)
    if skew.is_cpu and not is_rotated(skew) and (offset is None or not is_rotated(offset)):
        return _Entry(key, sources, None, None)
    if not trains:
        return _Entry(key, sources, layer.merged_weight().to(dtype), None)
    with autocast.disabled(weight.device.type):
        matrix = weight.to(dtype)
        stages = plan_for(matrix, layer.n_factors, layer.block_size)
        scale = scale_of(offset)
        operands = matrix, SkewRotation(skew), scale, stages, is_scale_trained
        rotation = merged_with_rotation(*operands)
    return _Entry(key, sources, rotation.numbers, rotation)


def _is_usual(x: torch.Tensor) -> bool:
    """True for an eager call with a plain tensor, of which nobody watches or transforms the ops."""
    return (
        type(x) is torch.Tensor
        and internals.n_dispatch_modes() == 0
        and internals.tracing_state() is None
        and not internals.has_transforms()
        and forward_ad._current_level < 0
        # a graph would go on reading memory that is freed with the next change
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _stream(x: torch.Tensor) -> int:
    """The stream of a call, which is the one that the memory of a weight belongs to."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _is_kept(layer: Any) -> bool:
    """True if all changes of the parameters of a layer are seen, and its weight is frozen."""
    weight, skew, offset = layer.frozen_weight, layer.skew, layer.scale_offset
    for tensor in (weight, skew) if offset is None else (weight, skew, offset):
        is_own = type(tensor) in PLAIN and tensor.is_leaf and not tensor.is_meta
        if not is_own or tensor.is_inference() or changes_unseen(tensor):
            return False
    # accelerate's hooks put a weight on the device for each call, where nobody is to keep it
    return not weight.requires_grad and not hasattr(layer, "_hf_hook")


def _has_gradients(layer: Any) -> bool:
    """True if skew and scale of a layer can be trained through its merged weight."""
    config = layer.config
    return (
        config.method == "exact"
        and config.side == "in"
        and not config.kaleidoscope
        and layer.strength == 1
        and not layer.n_identity
    )


def _bytes_of(tensors: Iterator[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _most_bytes(layer: Any) -> int:
    """Bytes of the merged weight and, of a layer that can be trained, of the rotation beside it."""
    weight, skew, offset = layer.frozen_weight, layer.skew, layer.scale_offset
    total = weight.numel() * weight.itemsize
    trained = skew.requires_grad or (offset is not None and offset.requires_grad)
    if trained and _has_gradients(layer):
        m, b = layer.n_factors, layer.block_size
        sizes = [stage.size for stage in plan(m, b, weight.device.type)] if m > 1 else []
        wide = widest(COMPUTE[weight.dtype], skew.dtype)
        total += (m * b + sum(sizes)) * layer.rotated_features * wide.itemsize
    return total


class CachesMerged:
    """Mixin for a layer that keeps its merged weight while a ``MergedCache`` is open.

    Loading or moving parameters and switching the mode of the layer drops it.

    Attributes:
        kept_weight: None while no cache is open.
    """

    kept_weight: KeptWeight | None = None

    def _drop_kept(self) -> None:
        if self.kept_weight is not None:
            self.kept_weight.drop()

    def train(self, mode: bool = True) -> Self:
        self._drop_kept()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._drop_kept()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._drop_kept()
        super()._load_from_state_dict(*args, **kwargs)

    def merge(self, *, keep: bool = True) -> Self:
        self._drop_kept()
        return super().merge(keep=keep)

    def set_strength(self, strength: float) -> Self:
        self._drop_kept()
        return super().set_strength(strength)


class MergedCache:
    """The merged weights that the layers of a model keep, until ``close`` or the end of ``with``.

    Attributes:
        nbytes: the most memory that they take, in bytes, once every layer has been called: that of
            the frozen weights, and some per cent of it for the rotations if they are trained. A
            weight that autocast casts takes what it takes in that dtype.
    """

    def __init__(self, layers: list[Any]) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.nbytes = sum(map(_most_bytes, layers))
        self._layers = weakref.WeakSet(layers)  # unloaded layers are not kept alive
        for layer in layers:
            layer.kept_weight = KeptWeight()
        mine = self._layers
        self._hook = register_optimizer_step_post_hook(lambda *_: _drop(mine))

    @property
    def held_bytes(self) -> int:
        """The memory that they take now, in bytes."""
        return sum(layer.kept_weight.held_bytes() for layer in self._layers)

    def drop(self) -> None:
        """Let all merged weights go; the next call of each layer makes it anew.

        To be called after writing to parameters through ``.data``, which nothing else tells of a
        skew or a scale on a GPU, and of a frozen weight anywhere.
        """
        _drop(self._layers)

    def close(self) -> None:
        """Let all merged weights go, and the layers compute as before. Closing twice is allowed."""
        self._hook.remove()
        for layer in self._layers:
            layer.kept_weight = None
        self._layers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MergedCache(nbytes={self.nbytes}, held_bytes={self.held_bytes})"


def _drop(layers: Iterable[Any]) -> None:
    for layer in layers:
        layer.kept_weight.drop()


def cache_merged(model: nn.Module) -> MergedCache:
    """Let the linear layers of a model keep their merged weight W' = diag(s) W R^T between calls.

    A call is then one product with W', as in a plain linear layer. W' is made when a layer is first
    called, and made again after a change of its skew, scale or frozen weight. So it pays where a
    layer is called several times between two changes: over the microbatches of accumulated
    gradients, with checkpoints that compute a layer again, in evaluation and generation. In
    training, gradients reach skew, scale and bias as without it. Results agree up to rounding: W'
    is rounded to the dtype of the rows, as a merged weight is.

    It holds a second copy of each weight (``nbytes`` and ``held_bytes`` of the result).

    ``BOFTLinear`` and ``OFTLinear`` keep their weight. Convolutions, embeddings, experts,
    ``MultiAdapterLinear`` and layers of PEFT compute as before, and so do calls

    - in training with multiplicative dropout, in float16 with a trained scale, and of side "out",
      "neumann5" or a kaleidoscope;
    - under torch.compile, torch.func, forward-mode differentiation and capture of a CUDA graph;
    - of layers under FSDP, ZeRO-3 or tensor parallelism, whose weight is trained, or is no plain
      tensor; and on a CPU of layers that are the identity still, which equal torch's exactly.

    W' is dropped by a change in place of skew, scale or weight; by assigning a parameter or its
    ``.data``; by any step of a torch optimizer, ``load_state_dict``, ``train``, ``eval``,
    ``merge``, ``set_strength``, ``interpolate`` and a move to another device or dtype. A copy of
    the layer keeps nothing. **Writing through** ``.data`` (``p.data.copy_(q)``) raises no version:
    in skew and scale it is noticed on a CPU, by comparing them. On a GPU, and in the frozen weight
    anywhere, call ``drop()`` after it.

    Args:
        model: an adapted model, or a BOFT layer.

    Returns:
        A ``MergedCache``, which is a context manager: leaving its block ends it, and so does
        ``close()``. ``drop()`` lets the memory go until the next call.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: the model has no ``BOFTLinear``.
        RuntimeError: a layer keeps its merged weight already.
    """
    checks.module("model", model)
    layers = [module for module in model.modules() if isinstance(module, CachesMerged)]
    if not layers:
        raise ValueError("model: expected at least one BOFTLinear, got none")
    if any(layer.kept_weight is not None for layer in layers):
        raise RuntimeError(
            "cache_merged: expected layers without a cache, got one that has it: close() the former"
        )
    return MergedCache(layers)
