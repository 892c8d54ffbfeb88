"""Rotations in front of any frozen linear module, one or many of them on one layer.

``BOFTLinear`` rotates a weight that it knows; here the base is only called: y = base(x R). So it
may be quantised, and several adapters can share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from .._runtime import autocast, checks
from ..ops.butterfly import butterfly_matmul
from ..ops.cayley import cayley
from ..ops.planner import plan_for
from ..ops.rotate_indexed import IDENTITY, compose_all, index_of_rows, rotate_indexed
from ..ops.scale import scale_columns
from ..ops.stages import plan
from . import plain, quantized
from .linear_adapter import LinearAdapter


class MultiAdapterLinear(nn.Module):
    """A frozen linear module and any number of adapters: y = s * (base(x R) - bias) + bias.

    Either the adapters of the active list serve all rows: x meets their rotations in the order of
    the list, x R_1 R_2, and their scales multiply. Or every row names its own (``adapter_index``),
    for serving many of them in one batch: all rows are rotated in one launch for each stage and
    block size, whatever the number of adapters.

    Args:
        base: any module that is linear in its last dimension up to a bias: ``nn.Linear``, or a
            quantised one. It is frozen and only ever called, on rotated inputs. What it adds must
            be its attribute ``bias`` (or nothing): that is not scaled.
        in_features, out_features: where the base has no attributes of that name.

    Shape: x (..., in_features) -> (..., out_features).

    Attributes:
        base: the frozen module.
        adapters: ``LinearAdapter`` by name, in the order in which they were added.
        active: names of the active ones, in the order in which x meets them.
    """

    def __init__(
        self, base: nn.Module, in_features: int | None = None, out_features: int | None = None
    ) -> None:
        super().__init__()
        checks.module("base", base)
        features = {"in_features": in_features, "out_features": out_features}
        for name, value in features.items():
            features[name] = getattr(base, name, None) if value is None else value
            checks.positive_int(name, features[name])
        self.in_features, self.out_features = features.values()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self._rows: torch.Tensor | None = None  # of adapter_rows, one number for each request
        self._prepared: tuple[list, list[tuple]] | None = None  # what it was made of, the stacks

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters; the position of one is its number in ``adapter_index``."""
        return tuple(self.adapters)

    def add_adapter(self, name: str, *, active: bool = True, **options) -> LinearAdapter:
        """Add an adapter that is the identity until it is trained or loaded.

        Args:
            name: a new one, without dots.
            active: put it at the end of the active list.
            **options: of ``BOFTLinear``, from block_size on (``side`` is "in"); ``device`` is by
                default the base's, ``dtype`` float32 (float64 over a float64 base).

        Raises:
            TypeError, ValueError: the name is taken or impossible, or an option is not valid.
        """
        return self.put_adapter(name, self.new_adapter(name, **options), active)

    def put_adapter(self, name: str, adapter: LinearAdapter, active: bool) -> LinearAdapter:
        """Add what ``new_adapter`` made for this name."""
        self.adapters[name] = adapter
        self.forget()
        if active:
            self.active = (*self.active, name)
        return adapter

    def new_adapter(self, name: str, **options) -> LinearAdapter:
        """What ``add_adapter`` would add; the layer is not changed."""
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name: expected a string without dots, got {name!r}")
        if name in self.adapters or hasattr(self.adapters, name):
            raise ValueError(f"name: expected a new one, got {name!r}; there are {self.names}")
        for tensor in (*self.base.parameters(), *self.base.buffers()):
            options.setdefault("device", tensor.device)
            if tensor.dtype == torch.float64:
                options.setdefault("dtype", torch.float64)
        return LinearAdapter(self.in_features, self.out_features, **options).train(self.training)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. The numbers of those that were added after it fall by one."""
        self._check_names([name])
        del self.adapters[name]
        self.forget()
        self.active = tuple(other for other in self.active if other != name)

    def set_active(self, names: str | Iterable[str]) -> None:
        """Which adapters serve rows that name none, in the order in which x meets them.

        An empty list leaves the base alone.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        self._check_names(names)
        if len(set(names)) < len(names):
            raise ValueError(f"names: expected each at most once, got {names}")
        self.active = names

    def index_of(self, names: Iterable[str | None]) -> torch.Tensor:
        """Numbers for ``adapter_index``, int64 on the adapters' device; None is the base alone."""
        names = list(names)
        self._check_names([name for name in names if name is not None])
        numbers = {name: i for i, name in enumerate(self.names)} | {None: IDENTITY}
        device = next((a.skew.device for a in self.adapters.values()), None)
        return torch.tensor([numbers[name] for name in names], dtype=torch.int64, device=device)

    def _check_names(self, names: Iterable[str]) -> None:
        if unknown := [name for name in names if name not in self.adapters]:
            raise ValueError(f"names: expected some of {self.names}, got {unknown[0]!r}")

    def forward(self, x: torch.Tensor, adapter_index: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: (..., in_features).
            adapter_index: integers that broadcast to the shape of x without its last dimension, the
                number of each row's adapter in ``names`` or -1 for the base alone. None: the active
                adapters, or what ``adapter_rows`` says. For numbers out of range see
                ``butterfly_matmul_indexed``.
        """
        checks.tensor("x", x, min_dim=1)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected a last dimension of {self.in_features}, got shape {tuple(x.shape)}"
            )
        if adapter_index is None and self._rows is not None:
            adapter_index = self._rows.view(-1, *[1] * (x.dim() - 2))
        if adapter_index is not None:
            return self._by_rows(x, index_of_rows(adapter_index, x, len(self.adapters)))
        active, scale = [self.adapters[name] for name in self.active], None
        for adapter in active:
            x = butterfly_matmul(x, adapter.blocks())
            if adapter.scale is not None:
                scale = adapter.scale if scale is None else scale * adapter.scale
        y = self.base(x)
        if scale is None:
            return y
        bias = self._bias()
        return scale_columns(y, scale, bias, bias)

    def _bias(self) -> torch.Tensor | None:
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    def _by_rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x = autocast.cast(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        if self._is_stale():
            self.forget()
        prepared = self._prepared  # another thread may forget it
        stacks = prepared[1] if prepared else self._stacks(wide, x)
        for numbers, stages, matrices in stacks:
            local = self._renumbered(index, numbers)
            x = rotate_indexed(x, matrices, stages, local, False)
        y = self.base(x)
        scales = [adapter.scale for adapter in self.adapters.values()]
        if all(scale is None for scale in scales):
            return y
        one = next(torch.ones_like(scale) for scale in scales if scale is not None)
        table = torch.stack([one if scale is None else scale for scale in (*scales, None)])
        last = len(scales)
        chosen = torch.where((index < 0) | (index >= last), last, index)
        offset = (table[chosen] - 1).reshape(y.shape).to(y.dtype)
        bias = self._bias()
        # y + (y - bias)(s - 1): exactly y where s is 1, and no small change of s is rounded away
        return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), offset)

    def _stacks(self, dtype: torch.dtype, x: torch.Tensor | None = None) -> list[tuple]:
        """(numbers of adapters, stages, matrices of each stage) of each block size.

        Without an x to look at, the stages are the default's.
        """
        groups: dict[int, list[int]] = {}
        adapters = list(self.adapters.values())
        for number, adapter in enumerate(adapters):
            groups.setdefault(adapter.block_size, []).append(number)
        stacks = []
        for block_size, numbers in groups.items():
            m = max(adapters[i].n_factors for i in numbers)
            blocks = torch.stack([adapters[i].blocks(m) for i in numbers])
            device = blocks.device.type
            stages = plan(m, block_size, device) if x is None else plan_for(x, m, block_size)
            stacks.append((tuple(numbers), stages, compose_all(blocks, stages, dtype)))
        return stacks

    def _renumbered(self, index: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
        """The index within ``numbers``; -1 for rows of other adapters. What is out of range stays
        so, to become NaN."""
        if len(numbers) == len(self.adapters):
            return index
        outside = (index < IDENTITY) | (index >= len(self.adapters))
        local = torch.where(outside, len(numbers), IDENTITY).to(index.dtype)
        for position, number in enumerate(numbers):
            local = torch.where(index == number, position, local)
        return local

    def prepare(self, dtype: torch.dtype = torch.float32) -> MultiAdapterLinear:
        """Compose the matrices of all adapters now, for serving: ``adapter_index`` then uses them.

        Until ``train()``, a move to another device, loading, an adapter that comes or goes, or, but
        in compiled graphs, a skew that is written to in place (and not through ``.data``).

        Args:
            dtype: float32, or float64 for inputs of float64.

        Raises:
            RuntimeError: the layer is in training mode.
        """
        if self.training:
            raise RuntimeError("prepare: expected eval(), got a layer in training mode")
        with torch.no_grad():
            self._prepared = self._versions(), self._stacks(dtype)
        return self

    def forget(self) -> None:
        """Undo ``prepare``."""
        self._prepared = None

    def _is_stale(self) -> bool:
        eager = self._prepared is not None and not torch.compiler.is_compiling()
        return eager and self._prepared[0] != self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        skews = [adapter.skew for adapter in self.adapters.values()]
        # a change in place raises the version; a tensor of inference mode has none
        return [(id(s), 0 if s.is_inference() else s._version) for s in skews]

    def train(self, mode: bool = True) -> MultiAdapterLinear:
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def merged_layer(self, requantise: Callable[[nn.Linear], nn.Module] | None = None) -> nn.Module:
        """The base with the active adapters in its weight: no rotation at inference.

        Args:
            requantise: needed over a quantised base: makes the layer to be used of an ``nn.Linear``
                with the merged weight (``docs/interop.md`` has examples).

        Returns:
            A frozen ``nn.Linear``, or what ``requantise`` makes of it.

        Raises:
            TypeError, ValueError: the base is neither quantised nor a plain ``nn.Linear``, has
                hooks, is quantised and ``requantise`` is None, or its weight cannot be read.
        """
        if not (quantised := quantized.is_quantised(self.base)):
            plain.check_forward(self.base, nn.Linear)
        plain.check_untouched(self.base)
        if quantised and requantise is None:
            raise ValueError(
                f"requantise: expected a function over {type(self.base).__name__}, got None: a "
                "rotated weight is none of the values that the base can hold, so merging has to "
                "quantise it again, at the price of a new rounding error"
            )
        dense = quantized.dense_weight(self.base)
        wide = dense.to(torch.promote_types(dense.dtype, torch.float32))
        for name in reversed(self.active):  # x meets the first one first, so W meets it last
            adapter = self.adapters[name]
            blocks = cayley(adapter.skew.to(wide.dtype), method=adapter.method)
            wide = butterfly_matmul(wide, blocks, transpose=True)
            if adapter.scale is not None:
                wide = wide * adapter.scale[:, None].to(wide.dtype)
        bias = self._bias()
        dtype = dense.dtype if bias is None else torch.promote_types(dense.dtype, bias.dtype)
        layer = nn.Linear(self.in_features, self.out_features, device="meta", dtype=dtype)
        layer.weight = nn.Parameter(wide.to(dtype), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        layer.train(self.training)
        return layer if requantise is None else requantise(layer)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, active={list(self.active)}"
