"""MultiAdapterLinear: one or many rotations in front of any frozen linear module.

``BOFTLinear`` rotates a weight that it holds. Here the base is only called: y = base(x R).
So the base may be quantized, and several adapters can share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import torch
from torch import nn

from .._runtime import autocast, checks
from ..ops.butterfly import butterfly_matmul
from ..ops.rotate_indexed import IDENTITY, index_of_rows
from ..ops.scale import scale_columns, scale_of
from .adapted_weight import adapted_weight, no_weight, weight_with
from .adapter_tables import composed_tables
from .base_modules import (
    adapter_factory_kwargs,
    call_for_scale,
    check_forward,
    check_numbers,
    check_unmodified,
    dense_weight,
    is_conv1d,
    is_quantized,
    is_tensor_parallel,
    like_base,
    linear_features,
)
from .config import RotationConfig
from .linear_adapter import LinearAdapter
from .prepared_tables import PreparedTables
from .rotated_weight import RotatedWeight


class MultiAdapterLinear(PreparedTables, nn.Module):
    """A frozen linear module and any number of adapters: y = s * (base(x R) - bias) + bias.

    Without ``adapter_index``, the active adapters serve all rows: x meets their rotations in the
    order of the list, x R_1 R_2, and their scales multiply.
    With ``adapter_index``, every row has its own adapter, to serve many of them in one batch: all
    rows are rotated in one launch for each stage and block size, however many adapters there are.

    Args:
        base: any module that is linear in its last dimension up to a bias, such as ``nn.Linear`` or
            a quantized layer. It is frozen, and called on rotated inputs. Its bias, which is not
            scaled, must be its attribute ``bias``, or None.
        in_features, out_features: sizes of the base; None reads its attributes of these names.
        slots: the most adapters at a time, for which ``prepare`` then reserves memory; None for any
            number, which takes new memory when it grows.

    Shape: x (..., in_features) -> (..., out_features).

    Attributes:
        base: the frozen module.
        adapters: ``LinearAdapter`` by name, in the order in which they were added.
        active: names of the active adapters, in the order in which x meets them.
        numbers: the number of each adapter in ``adapter_index``, by name. An adapter gets the
            lowest free number and keeps it until it is deleted.

    Raises:
        TypeError: ``base`` is not an nn.Module, or a size or ``slots`` is no int.
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        base: nn.Module,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        slots: int | None = None,
    ) -> None:
        super().__init__()
        checks.module("base", base)
        own = linear_features(base) or (None, None)
        self.in_features, self.out_features = (
            one if given is None else given
            for one, given in zip(own, (in_features, out_features), strict=True)
        )
        checks.positive_int("in_features", self.in_features)
        checks.positive_int("out_features", self.out_features)
        if slots is not None:
            checks.positive_int("slots", slots)
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.slots, self.numbers = slots, {}
        self.shard_adapters()
        self.active: tuple[str, ...] = ()
        # Set by adapter_rows: the adapter of each request, and its rows if there are several.
        self.request_index: torch.Tensor | None = None
        self.request_repeats = 1

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight with the active adapters, differentiable, computed when it is read.

        Reading its numbers raises RuntimeError where there is none: over a base that is quantized
        or computes more than a linear layer, and inside ``adapter_rows``.
        """
        adapters = [self.adapters[name] for name in self.active]
        by_rows = self.request_index is not None
        return no_weight(self.base) if by_rows else adapted_weight(self.base, adapters)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the base, which is neither rotated nor scaled."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None

    @property
    def dtype(self) -> torch.dtype:
        return self.base.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.base.weight.device

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as ``nn.Module`` does; weight and bias are those of the base."""
        if name not in ("weight", "bias"):
            return super().register_parameter(name, param)
        if name == "weight" and isinstance(weight := self.weight, RotatedWeight):
            weight.check_written(param)
        return self.base.register_parameter(name, param)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, in the order in which they were added."""
        return tuple(self.adapters)

    def add_adapter(self, name: str, *, active: bool = True, **options: object) -> LinearAdapter:
        """Add an adapter that is the identity until it is trained or loaded.

        Args:
            name: a name without dots that no adapter of the layer has.
            active: if True, the adapter is appended to the active list.
            **options: the keyword arguments of ``BOFTLinear`` from block_size on, with side "in"
                and kaleidoscope 0; ``device``, by default that of the base; ``dtype``, by default
                float32, or float64 over a float64 base.

        Returns:
            The adapter, with its trainable ``skew`` and ``scale_offset``.

        Raises:
            TypeError, ValueError: the name is taken or not possible, or an option is not valid.
        """
        return self.put_adapter(name, self.new_adapter(name, **options), active)

    def put_adapter(
        self, name: str, adapter: LinearAdapter, active: bool, number: int | None = None
    ) -> LinearAdapter:
        """Add an adapter that ``new_adapter`` made for this name.

        Prepared tables stay prepared: the adapter is written into them.

        Args:
            name, adapter: see ``new_adapter``.
            active: if True, the adapter is appended to the active list.
            number: in ``adapter_index``; None for the lowest free one.
        """
        if number is None:
            number = next(n for n in count() if n not in self.numbers.values())
        if self.slots is not None and number >= self.slots:
            raise ValueError(
                f"slots: expected at most {self.slots} adapters, got one more: delete one first"
            )
        with self.prepared_update() as update:
            self.adapters[name], self.numbers[name] = adapter, number
            update(number)
        if active:
            self.active = (*self.active, name)
        return adapter

    def new_adapter(self, name: str, **options: object) -> LinearAdapter:
        """Make the adapter that ``add_adapter`` would add, without changing the layer."""
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name: expected a string without dots, got {name!r}")
        if name in self.adapters or hasattr(self.adapters, name):
            raise ValueError(f"name: expected a new one, got {name!r}; there are {self.names}")
        given = {k: options.pop(k) for k in ("device", "dtype") if k in options}
        factory_kwargs = adapter_factory_kwargs(self.base) | given
        config = RotationConfig(**options)
        adapter = LinearAdapter(self.in_features, self.out_features, config, **factory_kwargs)
        if is_conv1d(self.base):
            adapter.base_class = "Conv1D"
        if self._is_cut:
            from .cuts import cut_adapter  # imports torch.distributed.tensor

            cut_adapter(adapter, self.base.weight)
        return adapter.train(self.training)

    def shard_adapters(self) -> None:
        """Cut the adapters as tensor parallelism has cut the weight of the base, if it has."""
        self._is_cut, self._own_in_features = is_tensor_parallel(self.base), self.in_features
        if self._is_cut:
            from .cuts import cut_adapter, own_in_features

            self._own_in_features = own_in_features(self.base)
            for adapter in self.adapters.values():
                cut_adapter(adapter, self.base.weight)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. The others keep their numbers; its own is free for the next one.

        Rows that still name its number raise, or become NaN where ``forward`` cannot look.

        Raises:
            ValueError: the layer has no adapter of that name.
        """
        self._check_names([name])
        with self.prepared_update() as update:
            del self.adapters[name]
            update(self.numbers.pop(name))
        self.active = tuple(other for other in self.active if other != name)

    def set_active(self, names: str | Iterable[str]) -> None:
        """Choose the adapters that serve calls without ``adapter_index``.

        Args:
            names: a name, or names in the order in which x meets their rotations; an empty list
                chooses the base alone.

        Raises:
            ValueError: a name is not that of an adapter, or occurs twice.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        self._check_names(names)
        if len(set(names)) < len(names):
            raise ValueError(f"names: expected each at most once, got {names}")
        self.active = names

    def index_of(self, names: Iterable[str | None]) -> torch.Tensor:
        """Return the numbers of adapters, for ``adapter_index``.

        Args:
            names: names of adapters; None stands for the base alone.

        Returns:
            int64 (len(names),), on the device of the adapters.

        Raises:
            ValueError: a name is not that of an adapter.
        """
        names = list(names)
        self._check_names([name for name in names if name is not None])
        numbers = self.numbers | {None: IDENTITY}
        chosen = [numbers[name] for name in names]
        return torch.tensor(chosen, dtype=torch.int64, device=self.adapter_device)

    @property
    def adapter_device(self) -> torch.device | None:
        """The device of the adapters, or None if there are none."""
        return next((adapter.skew.device for adapter in self.adapters.values()), None)

    def _check_names(self, names: Iterable[str]) -> None:
        if unknown := [name for name in names if name not in self.adapters]:
            raise ValueError(f"names: expected some of {self.names}, got {unknown[0]!r}")

    def forward(self, x: torch.Tensor, adapter_index: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the base to the rotated rows, then scale the outputs.

        Args:
            x: (..., in_features).
            adapter_index: the number of each row's adapter in ``numbers``, -1 for the base alone;
                integers that broadcast to the shape of x without its last dimension. None uses
                the active adapters, or inside ``adapter_rows`` its choice. Numbers without an
                adapter are as in ``butterfly_matmul_indexed``.

        Returns:
            (..., out_features), in the dtype that the base returns.

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: the last dimension of x is not in_features, or ``adapter_index`` does not
                fit; under tensor parallelism: the base does not get the rows of x as they are.
        """
        checks.tensor("x", x, min_dim=1)
        if x.shape[-1] != self._own_in_features:
            raise ValueError(
                f"x: expected a last dimension of {self._own_in_features}, got shape "
                f"{tuple(x.shape)}"
            )
        if adapter_index is None and self.request_index is not None:
            adapter_index = self._rows_of_requests(x)
        if adapter_index is not None:
            return self._forward_indexed(x, adapter_index)
        active, scale = [self.adapters[name] for name in self.active], None
        for adapter in active:
            check_numbers({"skew": adapter.skew, "scale_offset": adapter.scale_offset}, x)
            x = butterfly_matmul(x, adapter.blocks())
            # the scale of all outputs, as the base may give all of them or those of this rank
            own = scale_of(adapter.at_strength()[1] if adapter.is_cut else adapter.own_offset())
            if own is not None:
                scale = own if scale is None else scale * own
        y, (scale, center, bias) = self._call_base(x, scale)
        return y if scale is None else scale_columns(y, scale, center, bias)

    def _call_base(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple:
        """The output of the base, and (scale, center, bias) for the outputs that it has."""
        y, *vectors = (
            (self.base(x), None, None) if scale is None else call_for_scale(self.base, scale, x)
        )
        if self._is_cut:
            from .cuts import own_vectors

            return y, own_vectors(x, y, scale, *vectors)
        return y, (scale, *vectors)

    def _check_numbers(self, index: torch.Tensor) -> None:
        """Raise ValueError for a number that no adapter has."""
        numbers = sorted(self.numbers.values())
        if unknown := sorted(set(index.unique().tolist()) - {IDENTITY, *numbers}):
            raise ValueError(f"index: expected -1 or one of {numbers}, got {unknown[0]}")

    def _rows_of_requests(self, x: torch.Tensor) -> torch.Tensor:
        """``request_index`` in a shape that broadcasts to the rows of x."""
        index, repeats = self.request_index, self.request_repeats
        n, batch = index.shape[0], x.shape[0] if x.dim() > 1 else 1
        if batch not in (n, n * repeats):
            raise ValueError(
                f"adapter_rows: expected inputs of {n} or {n} x {repeats} rows, got shape "
                f"{tuple(x.shape)}: give a name for each row, or the rows of a name as repeats"
            )
        index = index if batch == n else index.repeat_interleave(repeats)
        return index.view(-1, *[1] * (x.dim() - 2))

    def _forward_indexed(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x, is_eager = autocast.cast(x), not torch.compiler.is_compiling()
        if is_eager and self.is_stale():
            self.forget()
        tables = self.prepared_tables()
        # Names and numbers come and go, so that a graph for prepared tables must not read them.
        slots = tables.slots if tables else max([-1, *self.numbers.values()]) + 1
        index = index_of_rows(index, x, slots)
        if is_eager and index.is_cpu and len(self.numbers) < slots:
            self._check_numbers(index)
        tables = tables or composed_tables(self.by_number(), slots, x)
        entries = tables.entries(index)
        for group in tables.groups:
            x = group.rotate(x, entries)
        y, (offsets, center, bias) = self._call_base(x, tables.offsets)
        if offsets is None:
            return y
        # The entries of numbers out of range are zeros: their rows are NaN already.
        offset = offsets.index_select(0, entries).reshape(y.shape).to(y.dtype)
        # y + (y - center)(s - 1): exactly y where s is 1, and no small change of s is rounded away
        scaled = torch.addcmul(y, y if center is None else y - center.to(y.dtype), offset)
        return scaled if bias is center else scaled + bias.to(y.dtype)

    @torch.no_grad()
    def merged_layer(self, requantize: Callable[[nn.Linear], nn.Module] | None = None) -> nn.Module:
        """Return a linear layer with the active adapters in its weight, without rotations.

        Args:
            requantize: required over a quantized base: a function from an ``nn.Linear`` with the
                merged weight to the layer to use (``docs/interop.md`` has examples).

        Returns:
            A frozen ``nn.Linear``, or Conv1D over one, or the result of ``requantize``.

        Raises:
            TypeError: the base is neither quantized nor a plain ``nn.Linear`` or Conv1D.
            ValueError: the base has hooks, is quantized and ``requantize`` is None, or its weight
                cannot be read; or a tensor is a placeholder on the meta device.
        """
        if not (quantized := is_quantized(self.base)) and not is_conv1d(self.base):
            check_forward(self.base, nn.Linear)
        check_unmodified(self.base)
        if quantized and requantize is None:
            raise ValueError(
                f"requantize: expected a function over {type(self.base).__name__}, got None: a "
                "rotated weight is none of the values that the base can hold, so merging has to "
                "quantize it again, at the price of a new rounding error"
            )
        dense, bias = dense_weight(self.base), self.bias
        dtype = dense.dtype if bias is None else torch.promote_types(dense.dtype, bias.dtype)
        check_numbers({"weight": dense, "bias": bias})
        weight = weight_with(dense.to(dtype), [self.adapters[name] for name in self.active])
        layer = like_base(self.base, weight, bias)
        return layer if requantize is None else requantize(layer)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, active={list(self.active)}"
