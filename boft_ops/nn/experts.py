"""Mixtures of experts whose weights are 3-D parameters: rotations of their rows.

``BOFTExperts`` calls the experts of transformers on rotated rows. It sorts the rows by expert,
rotates them and passes them on with one expert each; between the two products the experts call
their gate or activation, where the rows are rotated again. The weights are only used by the
experts' own products, so they may be stored in any form.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .._runtime.dtypes import widest
from ..ops.merge import merge_weight, untracked
from ..ops.rotation import SkewRotation
from ..ops.scale import scale_of
from .base_modules import check_numbers
from .config import RotationConfig
from .expert_adapter import EACH, SHARED, ExpertAdapter
from .expert_modules import (
    DOWN,
    GATE_UP,
    between,
    call_between,
    features,
    has_between,
    has_bias,
    is_experts,
    is_plain,
    is_transposed,
    projections,
    remedy,
)
from .expert_registry import connect, disconnect, implementation_of, is_registered, registry_of
from .rotated_weight import is_sharded

# The implementations of transformers that hand all rows to the gate or activation, sorted by expert
# if they came so. Others pad them or have both products in one kernel. Eager experts, some of which
# do not call the gate, are computed as grouped ones, as transformers does by default; torch's
# grouped product has no float64.
GROUPED, BATCHED = "grouped_mm", "batched_mm"
IN_ORDER = (None, "eager", GROUPED, BATCHED)


class BOFTExperts(nn.Module):
    """Frozen experts of a transformers model with rotated inputs of their projections.

    Every expert computes y = s * (x R W^T) + bias in each adapted projection. ``adapt`` puts it in
    the place of the experts that its ``target_parameters`` name.

    Args:
        base: experts with 3-D weights, which are frozen. Called with rows (N, d), the numbers of
            their experts (N, k) and the weights of these (N, k); it returns (N, d).

    Attributes:
        base: the frozen experts.
        gate_up_proj, down_proj: the ``ExpertAdapter`` of each projection, or None. Experts without
            a gate have up_proj in the place of gate_up_proj.

    Raises:
        TypeError: ``base`` is not such a module.
        ValueError: its forward was replaced in a way that a rotation would miss.
    """

    # In a model in MXFP4 the parent of the experts reads this: True makes it call them as other
    # parents do; else it hands what its router prepared to their kernels.
    _is_hooked = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if not is_experts(base):
            raise TypeError(
                f"base: expected experts of transformers with the 3-D weights {GATE_UP!r} and "
                f"{DOWN!r}, got {type(base).__name__}"
            )
        if "forward" in vars(base) and not is_registered(base):
            raise ValueError(
                f"expected a {type(base).__name__} with its class's forward(), got one with its "
                "own, which may send rows to the experts of other processes"
            )
        self.base = base.requires_grad_(False)
        for name in projections(base):
            self.register_module(name, None)
        self._is_connected = False
        self._rows: _Rows | None = None  # during a call: those that the gate or activation gets

    def add_adapter(self, projection: str, experts: str = EACH, **options: Any) -> ExpertAdapter:
        """Add a rotation that is the identity until it is trained or loaded.

        Args:
            projection: "gate_up_proj" ("up_proj" without a gate) or "down_proj".
            experts: "each" for a rotation of every expert, "shared" for one of all.
            **options: the keyword arguments of ``BOFTLinear`` from block_size on, with side "in"
                and kaleidoscope 0.

        Returns:
            The adapter, with its trainable ``skew`` and ``scale_offset``.

        Raises:
            TypeError, ValueError: an option is not valid, or the experts do not take it.
        """
        base, weight = self.base, getattr(self.base, projection)
        is_part = isinstance(weight, torch.Tensor) and is_sharded(weight)
        if is_part and experts == SHARED:
            raise ValueError(
                "experts: expected 'each' over experts that several processes share, got 'shared': "
                "nothing would add up the gradients of one rotation"
            )
        factory = {"device": next(base.parameters()).device}
        if isinstance(weight, torch.Tensor) and weight.dtype == torch.float64:
            factory["dtype"] = torch.float64
        config = RotationConfig(**options)
        shape = features(base, projection)
        adapter = ExpertAdapter(base.num_experts, *shape, experts, config, **factory)
        adapter.is_part = is_part
        if (projection == DOWN or config.scale) and not has_between(base):
            raise ValueError(
                f"{type(base).__name__} computes both products in one kernel: expected "
                f"{projections(base)[0]!r} alone, with scale=False{remedy(base)}"
            )
        if projection == DOWN and config.scale and getattr(base, "has_post_expert_norm", False):
            raise ValueError(
                f"scale: expected False, as {type(base).__name__} normalizes its outputs"
            )
        setattr(self, projection, adapter.train(self.training))
        return adapter

    def connect(self) -> None:
        """Make the base call this module inside of its forward, until ``disconnect``.

        Around it there may be hooks, or a dispatch of rows to the experts of other processes,
        which hands local rows and numbers to the implementation in the registry. The first call
        does it too; before, the base is unchanged.
        """
        connect(self.base, self._forward, self._between)
        self._is_connected = True

    @property
    def _up(self) -> ExpertAdapter | None:
        """The adapter of the first projection."""
        return getattr(self, projections(self.base)[0])

    def _needs_between(self) -> bool:
        up = self._up
        return self.down_proj is not None or (up is not None and up.scale_offset is not None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._is_connected = False  # the registry of another process does not have NAME

    def disconnect(self) -> None:
        """Make the base compute as before it was put into this module, which it outlives."""
        disconnect(self.base)
        self._is_connected = False

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the outputs of each row's experts.

        Args:
            hidden_states: rows (N, d).
            top_k_index: integers (N, k), the experts of each row. E and above are the experts of
                other processes, which add nothing.
            top_k_weights: (N, k).

        Returns:
            (N, d), in the dtype of hidden_states.

        Raises:
            ValueError: the experts' implementation hides the rows between its products.
            RuntimeError: it has no gradient, and one is needed.
        """
        if not self._is_connected:
            self.connect()
        if is_registered(self.base):  # comes back to _forward
            return self.base(hidden_states, top_k_index, top_k_weights)
        return self._forward(hidden_states, top_k_index, top_k_weights)

    def _forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        adapters = [a for a in (self._up, self.down_proj) if a is not None]
        for adapter in adapters:
            tensors = {"skew": adapter.skew, "scale_offset": adapter.scale_offset}
            check_numbers(tensors, hidden_states)
        scales = any(adapter.scale_offset is not None for adapter in adapters)
        if all(a.experts == SHARED for a in adapters) and not (scales and has_bias(self.base)):
            rows = _Rows(None, None)  # any order will do, before routing
            y = self._call(rows, hidden_states, top_k_index, top_k_weights)
            return self._scaled(DOWN, y, rows)
        (n, k), e = top_k_index.shape, self.base.num_experts
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        numbers = torch.arange(e, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        rows = _Rows(expert.clamp(max=e - 1), offsets)
        weights = top_k_weights.reshape(-1, 1)[order]
        y = self._call(rows, hidden_states[order // k], expert[:, None], weights)
        y = self._scaled(DOWN, y, rows, weights)
        return y[order.argsort()].view(n, k, -1).sum(1).to(hidden_states.dtype)

    def _call(self, rows: _Rows, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """The base on rotated rows, without the scale of its outputs."""
        if self._up is not None:
            x = self._up.rotate(x, rows.offsets)
        self._rows = rows._replace(has_gradient=torch.is_grad_enabled() and x.requires_grad)
        rows = self._rows
        try:
            y = self._plain(x, *routing)
            self._check_gradient(rows, y)
            if self._needs_between() and self._rows is not None:
                raise RuntimeError(
                    f"{type(self.base).__name__}: expected a call of its {between(self.base)}, got "
                    f"none, so that {DOWN!r} would not be rotated"
                )
        finally:
            self._rows = None
        return y

    def _plain(self, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """The base's own computation."""
        base = self.base
        if not is_registered(base):
            return base(x, *routing)
        name = implementation_of(base)
        if self._needs_between() and name not in IN_ORDER:
            raise ValueError(
                f"experts_implementation: expected {GROUPED!r} or {BATCHED!r} where {DOWN!r} or a "
                f"scale of {projections(base)[0]!r} is trained, got {name!r}: "
                "set_experts_implementation() chooses it"
            )
        if name in (None, "eager"):
            name = BATCHED if x.dtype == torch.float64 else GROUPED
        return registry_of(base)[name](base, x, *routing)

    def _between(self, y: torch.Tensor) -> torch.Tensor:
        """The base's gate or activation, with the scale before and the rotation after it."""
        base, rows = self.base, self._rows
        if not self._needs_between():
            if rows is not None:
                self._check_gradient(rows, y)
            return call_between(base, y)
        self._rows = None
        n = "no" if rows is None else len(y) if rows.expert is None else len(rows.expert)
        if n != len(y):
            raise RuntimeError(
                f"{type(base).__name__}: expected one call of its {between(base)} with {n} rows, "
                f"got {len(y)}"
            )
        self._check_gradient(rows, y)
        x = call_between(base, self._scaled(projections(base)[0], y, rows))
        return x if self.down_proj is None else self.down_proj.rotate(x, rows.offsets)

    def _check_gradient(self, rows: _Rows, y: torch.Tensor) -> None:
        """Raise RuntimeError if outputs of the base have lost the gradient of its inputs."""
        if rows.has_gradient and not y.requires_grad:
            raise RuntimeError(
                f"{type(self.base).__name__}: expected outputs with a gradient, got some without: "
                "its kernels are for inference; expected eval() with torch.no_grad(), or another "
                "implementation or dequantized weights for training"
            )

    def _scaled(
        self, projection: str, y: torch.Tensor, rows: _Rows, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Outputs y (N, n) of a projection times its scale; the bias in them is not scaled.

        ``weights`` (N, 1) are factors that y, bias included, has been multiplied by.
        """
        adapter = getattr(self, projection)
        if adapter is None or adapter.scale_offset is None:
            return y
        offset = adapter.at_strength()[1].to(y.dtype)
        offset = offset if adapter.experts == SHARED else offset[rows.expert]
        product = y
        if has_bias(self.base):
            bias = getattr(self.base, f"{projection}_bias").to(y.dtype)[rows.expert]
            product = y - (bias if weights is None else bias * weights.to(y.dtype))
        # exactly y where the scale is 1, and no small change of it is rounded away
        return torch.addcmul(y, product, offset)

    @untracked
    def merged_weight(self, projection: str) -> torch.Tensor:
        """diag(s) W R^T of every expert, computed in at least float32 and rounded once.

        Returns:
            The shape and dtype of the experts' weight: (E, n, d), or (E, d, n) if they store it so.

        Raises:
            ValueError: the weight is quantized, a shard or a placeholder.
        """
        weight, adapter = getattr(self.base, projection), getattr(self, projection)
        if not is_plain(weight):
            raise ValueError(
                f"{projection}: expected a dense floating-point weight to merge into, got that of "
                f"{type(self.base).__name__}: it is quantized, or the experts of several processes"
            )
        if adapter is None:
            return weight.clone()
        tensors = {"skew": adapter.skew, "scale_offset": adapter.scale_offset}
        check_numbers({projection: weight} | tensors)
        skew, offset = adapter.at_strength()
        scale = scale_of(offset)
        blocks = SkewRotation(skew.to(widest(skew.dtype)), adapter.method).blocks()
        shared, transposed = adapter.experts == SHARED, is_transposed(self.base)
        merged = torch.empty_like(weight)
        for e, matrix in enumerate(weight):
            own = blocks if shared else blocks[e]
            own_scale = scale if shared or scale is None else scale[e]
            rotated = merge_weight(matrix.mT if transposed else matrix, own, own_scale)
            merged[e] = rotated.mT if transposed else rotated
        return merged

    def merged_layer(self) -> nn.Module:
        """The experts with merged weights, frozen, without rotations."""
        layer = copy.copy(self.base)
        for kind in ("_parameters", "_buffers", "_modules"):
            vars(layer)[kind] = dict(vars(layer)[kind])
        disconnect(layer)
        for name in projections(layer):
            if getattr(self, name) is not None:
                weight = nn.Parameter(self.merged_weight(name), requires_grad=False)
                layer._parameters[name] = weight
        return layer.train(self.training)


class _Rows(NamedTuple):
    """The experts of the rows of a call: each row's, and the ends of their segments.

    ``has_gradient`` is True if the rotated rows need a gradient.
    """

    expert: torch.Tensor | None
    offsets: torch.Tensor | None
    has_gradient: bool = False


def expert_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The experts among modules by name, by the dotted names of their weights."""
    found = {}
    for name, module in modules.items():
        base = module.base if isinstance(module, BOFTExperts) else module
        if is_experts(base):
            found |= {f"{name}.{projection}": module for projection in projections(base)}
    return found


def put_experts(
    layers: dict[nn.Module, nn.Module], name: str, module: nn.Module, options: dict[str, Any]
) -> None:
    """Build the adapter of one weight of experts, in a ``BOFTExperts`` of ``layers``.

    Args:
        layers: the layer for each module to replace; gets that of ``module`` if it has none.
        name: dotted name of the weight, for messages.
        module: the experts.
        options: keyword arguments of ``add_adapter``.

    Raises:
        TypeError, ValueError: as ``BOFTExperts`` raises, with the name of the weight.
    """
    if isinstance(module, BOFTExperts):
        raise ValueError(f"target_parameters: {name!r} is adapted already: unload(model) first")
    try:
        layer = layers[module] if module in layers else BOFTExperts(module)
        layer.add_adapter(name.rpartition(".")[2], **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    layers[module] = layer.train(module.training)
