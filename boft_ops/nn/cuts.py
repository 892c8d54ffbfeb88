"""Tensors that tensor parallelism has cut: parameters and adapters, drop masks, scales of outputs.

A module of its own, beside the styles that cut layers, because adapters and ``MultiAdapterLinear``
need it; they import it late, as it imports ``torch.distributed.tensor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from .._runtime import checks

if TYPE_CHECKING:
    from .adapter_parameters import HasAdapter


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this rank has; the ranks' gradients of a whole one are summed.

    A parameter that is whole on every rank meets only a part of the outputs or of the inputs
    there, so that its gradient there is one term of a sum.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    is_whole = parameter.placements == (Replicate(),)
    return parameter.to_local(grad_placements=[Partial()] if is_whole else None)


def cut_adapter(adapter: HasAdapter, weight: DTensor) -> None:
    """Cut the parameters of an adapter as the weight of its base is cut, which is only called.

    A base that is cut along its rows gives back the sum of the ranks' gradients of its inputs, and
    one that is cut along its columns the sum of their outputs. So the gradients of what is whole
    here are whole, too.

    Raises:
        ValueError: the mesh has several dimensions, or a group of the butterfly crosses a cut.
    """
    mesh, (placement, *others) = weight.device_mesh, weight.placements
    if others:
        raise ValueError(
            "base: expected tensor parallelism alone, got a weight that is also cut otherwise: "
            "adapt the model before fully_shard()"
        )
    placements = {"skew": Replicate(), "scale_offset": Replicate()}
    if placement == Shard(0):
        placements["scale_offset"] = Shard(0)
    elif placement == Shard(1):
        check_groups(adapter.rotated_features, adapter.block_size, adapter.n_factors, mesh.size())
        placements["skew"] = Shard(1)
    for name, parameter in list(adapter.named_parameters(recurse=False)):
        placed = distribute_tensor(parameter.detach(), mesh, [placements[name]])
        placed = nn.Parameter(placed, requires_grad=parameter.requires_grad)
        adapter.register_parameter(name, placed)
    adapter.is_cut = True


def own_in_features(base: nn.Module) -> int:
    """The inputs of a tensor-parallel base that each rank gives to it."""
    return base.weight.to_local().shape[-1]


def own_vectors(
    x: torch.Tensor, y: torch.Tensor, *vectors: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Vectors (..., n) for the outputs that a tensor-parallel base has on this rank.

    Args:
        x, y: the input and the output of the base.
        vectors: DTensors or own parts, or None.

    Raises:
        ValueError: the base gathers or scatters rows, so that gradients are not as in
            ``cut_adapter``; or x or y is a DTensor.
    """
    if isinstance(y, DTensor) or isinstance(x, DTensor) or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"base: expected plain outputs for the rows of x {tuple(x.shape)}, got "
            f"{type(y).__name__} of {tuple(y.shape)}, as sequence parallelism makes it: adapt the "
            "model first, then parallelize it with boft_ops.distributed"
        )
    # One object stays one, as callers tell by it that the center is the bias.
    own = {id(vector): _own_vector(vector, y.shape[-1]) for vector in vectors}
    return tuple(own[id(vector)] for vector in vectors)


def _own_vector(vector: torch.Tensor | None, width: int) -> torch.Tensor | None:
    if not isinstance(vector, DTensor):
        if vector is not None and vector.shape[-1] != width:
            raise ValueError(
                f"adapter_index: expected outputs that stay on their ranks, got {width} of all"
            )
        return vector
    if vector.shape[-1] == width:  # the base has gathered its outputs
        vector = vector.redistribute(placements=[Replicate()])
    return vector.to_local()


def shared_drop_mask(module: nn.Module) -> torch.Tensor | None:
    """The drop mask of one forward pass, the same for all ranks, cut as the skew is.

    Every rank draws a mask of all blocks, and the first rank's counts: the others add zeros to it.
    So ranks may have any seeds, and as every rank's generator goes on, recomputation in activation
    checkpointing draws the same mask.

    Args:
        module: has ``dropout``, and ``skew``, a DTensor on a mesh of one dimension.
    """
    mask, mesh = module.dropout.draw(module.skew), module.skew.device_mesh
    if mask is None:
        return None
    counted = mask.to(torch.uint8) if mesh.get_local_rank() == 0 else torch.zeros_like(mask).byte()
    placed = DTensor.from_local(counted, mesh, [Partial()], run_check=False)
    return placed.redistribute(placements=module.skew.placements).to_local().bool()


def check_groups(features: int, block_size: int, n_factors: int, parts: int) -> None:
    """Raise ValueError unless features can be cut into parts of whole groups of a butterfly.

    A group is block_size * 2**(n_factors-1) neighboring features, which a butterfly mixes.
    """
    if features % parts:
        raise ValueError(
            f"tensor parallel: expected features that {parts} ranks divide, got {features}"
        )
    try:
        checks.butterfly_shape(features // parts, block_size, n_factors)
    except ValueError as error:
        raise ValueError(
            f"tensor parallel: expected whole groups of {block_size} * 2**{n_factors - 1} features "
            f"on each of {parts} ranks, which have {features // parts} of {features}: {error}"
        ) from error
