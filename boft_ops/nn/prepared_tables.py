"""The part of ``MultiAdapterLinear`` that prepares tables of its adapters and keeps them valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .._runtime import checks
from .adapter_tables import Group, Tables, Watch, empty_tables
from .linear_adapter import LinearAdapter


class PreparedTables:
    """Mixin for a module with ``adapters`` and ``numbers`` by name, and ``slots``."""

    adapters: nn.ModuleDict
    numbers: dict[str, int]
    slots: int | None
    training: bool
    # Former tables stay in _memory, to be written into again, after _prepared was dropped.
    _prepared: tuple[Watch, list[Group], Tables] | None = None
    _memory: Tables | None = None
    _table_dtype = torch.float32

    def prepare(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Compose the matrices of all adapters now, for calls with ``adapter_index`` to reuse.

        Adapters that come and go afterwards are written into the same memory, so that compiled
        graphs and CUDA graphs stay valid. New memory is taken only if an adapter has another block
        size, more factors or, without ``slots``, a larger number than all before, or if it is the
        first with a scale.
        The matrices are dropped by ``train()``, a move to another device or dtype, and loading. In
        eager mode they are also dropped if a skew or a scale is replaced, gets other ``data``, or
        is written to in place, unless through ``data``; preparing again uses the same memory.

        Args:
            dtype: float32, or float64 for inputs of float64. bfloat16 and float16 take half of the
                memory: they hold R - I, and scales minus one.

        Returns:
            The layer itself.

        Raises:
            RuntimeError: the layer is in training mode.
            TypeError: ``dtype`` is none of these.
            ValueError: a skew is a placeholder on the meta device.
        """
        if self.training:
            raise RuntimeError("prepare: expected eval(), got a layer in training mode")
        checks.floating_dtype("dtype", dtype)
        with torch.inference_mode(False), torch.no_grad():  # gradients may be wanted later
            self._table_dtype = dtype
            self._fill(room=1)
        return self

    def _fill(self, room: int) -> None:
        """Write all adapters, into the former memory if they fit; see ``empty_tables`` for room."""
        adapters, tables = self.by_number(), self._memory
        if tables is None or not tables.fit(adapters, self._table_dtype):
            tables = empty_tables(adapters, self._table_dtype, self.slots, room)
        for number in tables.rows.keys() - adapters.keys():
            tables.clear(number)
        for number, adapter in adapters.items():
            tables.write(number, adapter)
        self._watch(tables)

    def _watch(self, tables: Tables) -> None:
        self._memory = tables
        self._prepared = Watch(self.by_number()), tables.groups, tables

    def prepared_tables(self) -> Tables | None:
        """The tables that ``prepare`` made, unless they were dropped since."""
        prepared = self._prepared  # another thread may drop it
        return None if prepared is None else prepared[2]

    def by_number(self) -> dict[int, LinearAdapter]:
        """The adapters by their numbers."""
        return {number: self.adapters[name] for name, number in self.numbers.items()}

    @contextmanager
    def prepared_update(self) -> Iterator[Callable[[int], None]]:
        """Context manager: yield a function that writes a number which the block has changed."""
        if self.is_stale():
            self.forget()

        def update(number: int) -> None:
            if self._prepared is None:
                return
            adapters, tables = self.by_number(), self._prepared[2]
            with torch.inference_mode(False), torch.no_grad():
                if number not in adapters:
                    tables.clear(number)
                elif tables.fit(adapters, self._table_dtype):
                    tables.write(number, adapters[number])
                else:
                    return self._fill(room=2)
                self._watch(tables)

        yield update

    def forget(self) -> None:
        """Drop the matrices that ``prepare`` composed. Their memory is kept for the next time."""
        self._prepared = None

    def is_stale(self) -> bool:
        """True if the prepared matrices are not those of the adapters any more."""
        return self._prepared is not None and self._prepared[0].is_stale()

    def _release(self) -> None:
        self._prepared = self._memory = None

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self._release()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._release()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)
