"""The weight of a merged layer: computed where it lies, and put in the place of the former one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from .._runtime import internals
from .distributed import whole
from .rotated_weight import is_sharded


class Merged(NamedTuple):
    """The skew and scale_offset in a merged weight, and the weight before, if it is kept."""

    skew: torch.Tensor
    scale_offset: torch.Tensor | None
    former: torch.Tensor | None


def merge_in_place(
    merge: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    blocks_of: Callable[[torch.Tensor], torch.Tensor],
    skew: torch.Tensor,
    scale: torch.Tensor | None,
    **placement: str | int,
) -> torch.Tensor:
    """Compute ``merge_weight``, or a function like it, on a weight or on its shards.

    Args:
        merge: the function, with the signature of ``merge_weight``.
        weight: (n, ...); if it is a DTensor, all ranks have to call this together.
        blocks_of: makes the blocks of a whole skew.
        skew, scale: of the layer, whole or sharded.
        placement: ``side`` and ``kaleidoscope``.

    Returns:
        The shape and dtype of ``weight``, sharded as it is.
    """
    if not is_sharded(weight):
        return merge(weight, blocks_of(skew), scale, **placement)
    from .merge_shards import merge_shard  # imports torch.distributed.tensor

    return merge_shard(merge, weight, blocks_of(whole(skew)), whole(scale), **placement)


def to_restore(weight: nn.Parameter) -> torch.Tensor:
    """Return what brings the numbers of a weight back: itself, or a copy of a shard.

    ``parameter_of`` writes into shards, and replaces other weights.
    """
    return weight.detach().clone() if is_sharded(weight) else weight


def parameter_of(weight: torch.Tensor, former: nn.Parameter) -> nn.Parameter:
    """Return the Parameter that holds ``weight`` from now on.

    It is ``former``, written to, if both are shards: FSDP gathers from the Parameter that it made.
    """
    if is_sharded(weight) and is_sharded(former):
        former.copy_(weight)
        return former
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def check_own_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Raise ValueError if FSDP has gathered the weight of a layer, and will put its shard back.

    What is merged into a gathered weight is lost as soon as FSDP frees it.
    """
    # FSDP version 1 puts views of its own into the layer, and version 2 parameters of its own.
    is_gathered = "weight" in vars(layer) or hasattr(weight, "_fsdp_flattened")
    if is_gathered or any(weight is gathered for gathered in _gathered_by_fsdp2()):
        raise ValueError(
            "merge: expected a weight of the layer's own, got one that FSDP has gathered and will "
            "replace by its shard: merge() outside of unshard() and summon_full_params(), after "
            "reshard() of a root that has run"
        )


def _gathered_by_fsdp2() -> Iterator[torch.Tensor]:
    """The parameters that FSDP version 2 puts into modules while they are gathered."""
    for reference in list(internals.composable_states().values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; one group before
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            for managed in getattr(group, "fsdp_params", ()):
                if hasattr(managed, "_unsharded_param"):
                    yield managed._unsharded_param
