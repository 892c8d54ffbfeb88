"""Whole tensors out of shards, and shards out of whole tensors, for adapter files.

The shards are DTensors (``fully_shard``, tensor parallelism) and the flat parameters of
FullyShardedDataParallel. What several ranks hold together is gathered and written by all of them:
every rank has to make the call. Of DeepSpeed's ZeRO-3 no more is known here than its mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .rotated_weight import is_sharded
from .wrappers import FSDP1, wrapper_of

Tensors = dict[str, torch.Tensor]


def check_present(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError for a parameter that ZeRO-3 has put away."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "ds_id") and tensor.shape != tensor.ds_shape:
            raise ValueError(
                f"model: {name}: expected a whole tensor, got what DeepSpeed's ZeRO-3 leaves of "
                "it: make the call inside deepspeed.zero.GatheredParameters of the trained "
                "parameters, with modifier_rank=None to save and modifier_rank=0 to load"
            )


def gather(model: nn.Module, tensors: Tensors) -> Tensors:
    """The whole of each tensor, on every rank.

    Args:
        model: the model that holds the tensors.
        tensors: parameters and buffers by any name.
    """
    found = {id(tensor): tensor.detach() for tensor in tensors.values()}
    for tensor in tensors.values():
        if is_sharded(tensor):
            found[id(tensor)] = tensor.detach().full_tensor()
    for unit in _flat_units(model):
        with _summoned(unit) as own:
            for parameter in own:
                if id(parameter) in found:
                    found[id(parameter)] = parameter.detach().clone()
    return {name: found[id(tensor)] for name, tensor in tensors.items()}


def whole_shapes(model: nn.Module, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The shape of the whole of each tensor."""
    shapes = {id(tensor): tuple(tensor.shape) for tensor in tensors.values()}
    for unit in _flat_units(model):
        with _summoned(unit) as own:
            shapes |= {id(p): tuple(p.shape) for p in own if id(p) in shapes}
    return {name: shapes[id(tensor)] for name, tensor in tensors.items()}


@torch.no_grad()
def scatter(model: nn.Module, targets: Tensors, tensors: Tensors) -> None:
    """Copy whole tensors, which every rank has, into the tensors of the model.

    Args:
        model: the model that holds the targets.
        targets: parameters and buffers, by the names of ``tensors``.
        tensors: of the shapes of ``whole_shapes``.
    """
    waiting = {id(targets[name]): (targets[name], tensor) for name, tensor in tensors.items()}
    for unit in _flat_units(model):
        with _summoned(unit, writeback=True) as own:
            for parameter in own:
                if pair := waiting.pop(id(parameter), None):
                    parameter.copy_(pair[1])
    for target, tensor in waiting.values():
        if is_sharded(target):
            from torch.distributed.tensor import distribute_tensor

            # without communication, as every rank has read the same file
            mesh, placements = target.device_mesh, target.placements
            tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
            target = target.to_local()
        target.copy_(tensor)


def write_once(model: nn.Module, tensors: Tensors, write: Callable[[], None]) -> None:
    """Call ``write`` on the first of the ranks that share the tensors, and wait for it everywhere.

    A rank that shares nothing writes for itself.

    Raises:
        RuntimeError: on the other ranks, if ``write`` raised.
    """
    import torch.distributed as dist

    groups = list(_groups(model, tensors.values()))
    error = None
    if all(dist.get_rank(group) == 0 for group, _ in groups):
        try:
            write()
        except BaseException as raised:
            error = raised
    failed = error is not None
    for group, device in groups:
        flag = torch.tensor(int(failed), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
        failed = bool(flag)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("path: the rank that writes the file could not, see its error")


def _groups(model: nn.Module, tensors) -> Iterator[tuple]:
    """Yield (process group, device of its tensors) for all groups that share the tensors."""
    seen = set()
    for tensor in tensors:
        if is_sharded(tensor):
            mesh = tensor.device_mesh
            for group in mesh.get_all_groups():
                if group not in seen:
                    seen.add(group)
                    yield group, mesh.device_type
    for unit in _flat_units(model):
        if unit.process_group not in seen:
            seen.add(unit.process_group)
            yield unit.process_group, unit.compute_device


def _flat_units(model: nn.Module) -> list[nn.Module]:
    """The modules of FullyShardedDataParallel, outermost first, as it wants to be initialized."""
    return [module for module in model.modules() if wrapper_of(module) == FSDP1]


@contextmanager
def _summoned(unit: nn.Module, writeback: bool = False) -> Iterator[list[nn.Parameter]]:
    """Context manager: the whole parameters of one unit, without those of inner units."""
    with type(unit).summon_full_params(unit, recurse=False, writeback=writeback):
        _, *inner = _flat_units(unit)
        others = {parameter for other in inner for parameter in other.parameters()}
        yield [parameter for parameter in unit.parameters() if parameter not in others]
