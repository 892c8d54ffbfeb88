"""Notices that a parameter has changed since something was computed from it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import internals
from .distributed import changes_unseen
from .rotated_weight import is_dense, is_sharded


class Source(NamedTuple):
    """A tensor that something was computed from, and the marks that tell a change of it.

    Attributes:
        tensor: the parameter, kept so that no other tensor gets its identity.
        version: its version then, which every change in place raises but one through ``.data``;
            None for a tensor made in inference mode, which has none.
        memory: the tensor then. It keeps the memory, so that no other tensor gets its address.
        numbers: a copy, or None. On a CPU it is compared with.
    """

    tensor: torch.Tensor
    version: int | None
    memory: torch.Tensor
    numbers: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor, keeps_numbers: bool = True) -> Source:
        memory = own_part(tensor).detach()
        return cls(tensor, _version(memory), memory, memory.clone() if keeps_numbers else None)

    def is_now(self, tensor: torch.Tensor | None) -> bool:
        """True unless a change is seen; looks at the numbers on a CPU alone."""
        if tensor is not self.tensor:
            return False
        own, memory, numbers = own_part(tensor), self.memory, self.numbers
        return (
            _version(own) == self.version
            and own.data_ptr() == memory.data_ptr()
            and own.dtype == memory.dtype
            and own.shape == memory.shape
            and own.stride() == memory.stride()
            and (numbers is None or not own.is_cpu or torch.equal(own, numbers))
        )


def is_watchable(tensor: torch.Tensor) -> bool:
    """True if ``Source`` sees the changes of a tensor.

    It does not see those that a wrapper makes, and has nothing to look at in placeholders and in
    tensors that torch.func transforms.
    """
    own = own_part(tensor)
    return (
        is_dense(own)
        and not own.is_meta
        and not (own.is_inference() and not own.is_cpu)  # no version, and no look at the numbers
        and not internals.has_transforms()
        and not changes_unseen(tensor)
    )


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that this rank holds; any other tensor as it is."""
    if is_dense(tensor) or not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # the tensor itself, of which changes raise the version
        return tensor.to_local()


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
