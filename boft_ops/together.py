"""The rotations of many layers in one launch: a model has hundreds, each of them tiny."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ._runtime import checks
from .nn.base import BOFTLayer, version_of
from .ops.stage_from_skew import MAX_SIZE, Rotation


def rotations(
    skews: Sequence[torch.Tensor], drops: Sequence[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """Every butterfly matrix R of a list, as its dense groups, all in one launch.

    For ``boft_linear(..., rotation=...)``. R is block-diagonal with groups of S = b 2^(m-1)
    features: this is cayley, multiplicative dropout and the product of the m factors at once.

    Args:
        skews: tensors (m, K, b(b-1)/2), packed as for ``cayley``, with the same m and b and any K;
            S <= 64.
        drops: for each of them a boolean (m, K), true for blocks that are to be the identity, or
            None.

    Returns:
        For each of them (K b / S, S, S), in at least float32.

    Raises:
        TypeError: a skew is not a floating-point tensor, a drop no boolean one, or dtypes differ.
        ValueError: shapes or devices differ, no butterfly has this shape, or S > 64.
    """
    skews = list(skews)
    drops = [None] * len(skews) if drops is None else list(drops)
    if len(drops) != len(skews):
        raise ValueError(
            f"drops: expected {len(skews)} masks, as there are skews, got {len(drops)}"
        )
    for i, (skew, drop) in enumerate(zip(skews, drops, strict=True)):
        _check(f"skews[{i}]", skew, skews[0])
        if drop is not None:
            _check_mask(f"drops[{i}]", drop, skew)
    return _split(_whole(skews, drops), skews) if skews else []


def _whole(skews: list[torch.Tensor], drops: list[torch.Tensor | None]) -> torch.Tensor:
    """The groups of all of them, one after another."""
    mask = None
    if any(drop is not None for drop in drops):
        masks = [
            skew.new_zeros(skew.shape[:2], dtype=torch.bool) if drop is None else drop
            for skew, drop in zip(skews, drops, strict=True)
        ]
        mask = torch.cat(masks, 1)
    return Rotation.apply(torch.cat(skews, 1) if len(skews) > 1 else skews[0], mask)


def _split(stage: torch.Tensor, skews: list[torch.Tensor]) -> list[torch.Tensor]:
    m = len(skews[0])
    return list(stage.split([skew.shape[1] >> (m - 1) for skew in skews]))


def _check_mask(name: str, drop: object, skew: torch.Tensor) -> None:
    expected = tuple(skew.shape[:2])
    if not isinstance(drop, torch.Tensor) or drop.dtype != torch.bool:
        got = drop.dtype if isinstance(drop, torch.Tensor) else type(drop).__name__
        raise TypeError(f"{name}: expected a boolean tensor or None, got {got}")
    if drop.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(drop.shape)}")
    checks.same_device(name, drop, "its skew", skew)


def _check(name: str, skew: torch.Tensor, first: torch.Tensor) -> None:
    checks.tensor(name, skew)
    if skew.dim() != 3 or skew.shape[::2] != first.shape[::2]:
        raise ValueError(
            f"{name}: expected shape (n_factors, d/block_size, block_size*(block_size-1)/2) with "
            f"the first and last size of skews[0], {tuple(first.shape)}, got {tuple(skew.shape)}"
        )
    if skew.dtype != first.dtype:
        raise TypeError(f"{name}: expected the dtype of skews[0], {first.dtype}, got {skew.dtype}")
    checks.same_device(name, skew, "skews[0]", first)
    m, n_blocks, packed = skew.shape
    b = checks.block_size_from_packed(name, packed)
    checks.butterfly_shape(n_blocks * b, b, m)
    if b << (m - 1) > MAX_SIZE:
        raise ValueError(
            f"{name}: expected groups of block_size * 2**(n_factors-1) <= {MAX_SIZE} features, got "
            f"{b << (m - 1)}"
        )


class _Step:
    """One forward of a model: the rotations that were computed at its start."""

    def __init__(self, owner: Together) -> None:
        self.owner = owner
        self.stages: dict[nn.Module, tuple[torch.Tensor, int]] = {}  # with the skew's version
        # Those that were used, for checkpoints: without the graph, which keeps this object alive.
        self.kept: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()
        self.backward = torch._C._current_graph_task_id()  # that it runs in, or -1
        # Autograd numbers the nodes of each thread: which of them are of this step.
        self.thread, self.first, self.end = threading.get_ident(), _next_number(), math.inf


class _Thread(threading.local):
    def __init__(self) -> None:
        self.steps: list[_Step] = []  # that are running, the innermost last


_next_number = torch.autograd._get_sequence_nr
_thread = _Thread()
_graphs: set[ref[_Step]] = set()  # steps whose graph is alive


class Together:
    """Computes the rotations of all BOFTLinear layers of a model at the start of its forward.

    One launch for all layers of equal n_factors and block_size, and one in backward, instead of
    one for each layer. Numbers, gradients and dropout are those of the layers on their own.
    Layers it cannot serve (merged, interpolated, frozen, kaleidoscopes, "neumann5", groups of more
    than 64 features, skews in shards; inside a compiled graph, a torch.func transform or a
    reentrant checkpoint) compute their own.

    Args:
        model: the module whose forward is the step; its layers may change later.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """

    def __init__(self, model: nn.Module) -> None:
        checks.module("model", model)
        self._handles = (
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        )

    def remove(self) -> None:
        """The layers compute their own rotations again."""
        for handle in self._handles:
            handle.remove()
        self._finish()

    def _before(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        self._finish()  # what was interrupted, or calls itself
        step, groups = _Step(self), defaultdict(list)
        for layer in model.modules():
            if isinstance(layer, BOFTLayer) and isinstance(layer, nn.Linear) and _fits(layer):
                skew = layer.skew
                groups[skew.shape[0], skew.shape[2], skew.dtype, skew.device].append(layer)
        for layers in groups.values():
            skews = [layer.skew for layer in layers]
            stage = _whole(skews, [layer.dropout.draw(layer.skew) for layer in layers])
            for layer, part in zip(layers, _split(stage, skews), strict=True):
                step.stages[layer] = part, version_of(layer.skew)
            if stage.grad_fn is not None:
                stage.grad_fn.boft_step = step  # for as long as there is the graph
        _graphs.add(ref(step, _graphs.discard))
        _thread.steps.append(step)

    def _after(self, model: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling():
            self._finish()

    def _finish(self) -> None:
        for step in [step for step in _thread.steps if step.owner is self]:
            _thread.steps.remove(step)
            step.stages.clear()
            step.end = _next_number()


def _fits(layer: BOFTLayer) -> bool:
    skew = layer.skew
    return (
        not layer.merged
        and layer.n_identity == 0
        and not layer.kaleidoscope
        and layer.method == "exact"
        and layer.block_size << (layer.n_factors - 1) <= MAX_SIZE
        # in shards they are tensors of other types, or of other shapes
        and type(skew) is nn.Parameter
        and skew.shape == layer._shapes[0]
        # without a gradient of its own there is no graph that would keep its mask for a checkpoint
        and (skew.requires_grad or not torch.is_grad_enabled())
    )


def shared_rotation(layer: BOFTLayer) -> torch.Tensor | None:
    """The rotation that was computed for this layer and this step, if there is one."""
    # first whether it is a graph that is made: Dynamo would guard on what other models share
    if torch.compiler.is_compiling() or not (_thread.steps or _graphs) or not _fits(layer):
        return None
    backward = torch._C._current_graph_task_id()
    if _thread.steps and _thread.steps[-1].backward == backward:
        step = _thread.steps[-1]
        stage, version = step.stages.get(layer, (None, None))
        # A reentrant checkpoint runs the layer without gradients, and again with another graph.
        if (
            stage is None
            or version != version_of(layer.skew)
            or stage.requires_grad != torch.is_grad_enabled()
        ):
            return None
        if stage.requires_grad:
            step.kept[layer] = stage.detach()
        return stage
    # In backward: a checkpoint computes a part of a step again, with the masks that it had.
    stage = None if backward == -1 else _kept(layer)
    return None if stage is None else _Recomputed.apply(stage.requires_grad_())


def _kept(layer: BOFTLayer) -> torch.Tensor | None:
    """What the layer was given in the step of the node whose backward runs."""
    steps = [step for found in tuple(_graphs) if (step := found()) and layer in step.kept]
    if len({step.thread for step in steps}) > 1:
        raise RuntimeError(
            "Together: expected checkpoints in the steps of one thread, got some of several whose "
            "graphs are alive: remove()"
        )
    number = torch._C._current_autograd_node()._sequence_nr()
    steps = [step for step in steps if step.first <= number < step.end]
    return max(steps, key=lambda step: step.first).kept[layer] if steps else None


class _Recomputed(torch.autograd.Function):
    """A rotation for what a checkpoint computes again, which has no backward of its own."""

    @staticmethod
    def forward(ctx, stage):
        return stage.view_as(stage)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "Together: expected a layer that is called in checkpoints of one kind, got one that is "
            "called in a reentrant one as well: remove()"
        )
