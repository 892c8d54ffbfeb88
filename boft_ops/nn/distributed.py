"""Models that several processes hold together: the order of wrapping, and averaged gradients.

A wrapper that averages gradients over processes knows the parameters that it found when it was
made. Adapters that come later are nobody's: the processes would train apart without an error.
Under ``fully_shard`` they are replicated here, and their gradients averaged. Elsewhere that order
is refused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .._runtime import internals
from .rotated_weight import is_sharded
from .wrappers import DDP, DEEPSPEED, FSDP1, wrapper_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AVERAGING = (DDP, FSDP1, DEEPSPEED)


def check_order(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a wrapper would not see adapters that these modules get now.

    Args:
        model: the model that holds the modules, or is a wrapper of one.
        targets: modules to adapt, by dotted name.
    """
    for wrapper, kind in _averaging_wrappers(model):
        inside = set(wrapper.modules())
        for name, module in targets.items():
            if module in inside:
                raise ValueError(
                    f"model: expected adapt() before {kind.rpartition('.')[2]}, got {name!r} "
                    "inside of one, which would never average the gradients of its adapter: adapt "
                    "the model first, then wrap it"
                )
    for name, module in targets.items():
        # its flat parameters: marked ones, or plain tensors in the place of parameters
        is_flat = hasattr(getattr(module, "weight", None), "_fsdp_flattened")
        if is_flat or "weight" in vars(module):
            raise ValueError(
                f"model: expected adapt() before FullyShardedDataParallel, got {name!r} with a "
                "weight that it manages: adapt the model first, then wrap it"
            )


def _averaging_wrappers(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The wrappers that average gradients, with their class names: inside of a model and around it.

    A wrapped model does not know its wrapper. So where processes work together, the wrappers that
    live in this one are looked for among all its objects, which takes a fraction of a second.
    """
    for module in model.modules():
        if (kind := wrapper_of(module)) in AVERAGING:
            yield module, kind
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if _wrappers_around(model):
        gc.collect()  # a wrapper that nobody holds any longer may be waiting for its end
        yield from _wrappers_around(model)


def _wrappers_around(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (found, kind)
        for found in gc.get_objects()
        if issubclass(type(found), nn.Module)  # isinstance would wake proxies of objects
        and (kind := wrapper_of(found)) in AVERAGING
        and found is not model
        and any(module is model for module in found.modules())
    ]


def fully_sharded(model: nn.Module) -> set[nn.Module]:
    """The modules of ``model`` whose parameters ``fully_shard`` may manage, resharded."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # a forward pass may have left whole weights
            inside |= set(module.modules())
    return inside


class Shards(NamedTuple):
    """Mesh and placements of a base's weight, noted between calls, while it is a shard.

    ``fully_shard`` and tensor parallelism look alike then. In a call the former has put a whole
    weight in the place of the shard, and every rank sees other data.
    """

    mesh: DeviceMesh
    placements: tuple

    @classmethod
    def of(cls, base: nn.Module) -> Shards | None:
        """The shards of a base, or None for one that is not sharded."""
        weight = getattr(base, "weight", None)
        if not isinstance(weight, torch.Tensor) or not is_sharded(weight):
            return None
        return cls(weight.device_mesh, tuple(weight.placements))

    def ranks_with_data(self, base: nn.Module) -> DeviceMesh | None:
        """The ranks to average over, asked in a forward pass; None for tensor parallelism.

        Raises:
            ValueError: the ranks do not see other data each.
        """
        if is_sharded(base.weight) and not is_fully_sharded(base):
            return None
        return _data_mesh(*self)


def is_fully_sharded(module: nn.Module) -> bool:
    """True if ``fully_shard`` was called on this very module."""
    return any(
        cls.__name__ == "FSDPModule" and cls.__module__.startswith("torch.distributed")
        for cls in type(module).__mro__
    )


def data_mesh(weight: torch.Tensor) -> DeviceMesh:
    """The mesh over which ``fully_shard`` spread a weight: every rank of it sees other data.

    Raises:
        ValueError: the weight is not spread over data dimensions alone.
    """
    if not is_sharded(weight):
        raise ValueError(
            "expected a weight that fully_shard manages, got one that it ignores, beside which "
            "nobody averages the gradients of an adapter: adapt the model before fully_shard"
        )
    return _data_mesh(weight.device_mesh, weight.placements)


def _data_mesh(mesh: DeviceMesh, placements: Sequence) -> DeviceMesh:
    """``mesh``, if these are the placements of ``fully_shard`` without further parallelism."""
    *outer, inner = placements
    is_hybrid = len(outer) == 1 and outer[0].is_replicate()
    if not inner.is_shard() or (outer and not is_hybrid):
        raise ValueError(
            f"expected a weight that fully_shard alone has spread, got {tuple(placements)}: adapt "
            "the model before it is parallelized"
        )
    return mesh


def frozen_parameter(parameter: torch.Tensor) -> nn.Parameter:
    """A frozen Parameter that shares the storage of ``parameter``.

    It is the same object under DeepSpeed's ZeRO-3, whose records of where the numbers are
    (``ds_id`` and others) lie on it.
    """
    if hasattr(parameter, "ds_id"):
        return parameter.requires_grad_(False)
    return nn.Parameter(parameter.detach(), requires_grad=False)


def compute_device(tensor: torch.Tensor) -> torch.device | str:
    """The device that computes with a tensor; shards may rest on a CPU between calls."""
    if not is_sharded(tensor) or tensor.is_meta:
        return tensor.device
    return tensor.device_mesh.device_type


def replicated(tensor: torch.Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A trainable DTensor of which every rank holds the whole, ``tensor``.

    A plain tensor would do, but torch clips no gradients of plain tensors and DTensors together.
    """
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * mesh.ndim
    return nn.Parameter(DTensor.from_local(tensor.detach(), mesh, placements, run_check=False))


def averaged(tensor: torch.Tensor, mesh: DeviceMesh | None = None) -> torch.Tensor:
    """The plain tensor of a replicated one; its gradient is averaged over the ranks.

    Args:
        tensor: a DTensor that ``replicated`` made, or a plain tensor.
        mesh: of the ranks that hold a plain tensor; None if no other rank does.
    """
    if is_sharded(tensor):
        mesh = tensor.device_mesh
    return tensor if mesh is None else _Averaged.apply(tensor, mesh)


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, mesh):
        ctx.mesh, ctx.is_distributed = mesh, is_sharded(tensor)
        local = tensor.to_local() if ctx.is_distributed else tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh = ctx.mesh
        # a mean as a sum: gloo has no other
        share = DTensor.from_local(grad / mesh.size(), mesh, [Partial()] * mesh.ndim)
        mean = share.redistribute(placements=[Replicate()] * mesh.ndim)
        return mean if ctx.is_distributed else mean.to_local(), None


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The gathered numbers of a DTensor, which all ranks of its mesh have to ask for together."""
    return tensor.full_tensor() if tensor is not None and is_sharded(tensor) else tensor


def by_parts(
    function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor
) -> torch.Tensor:
    """``function(tensor)``, computed by each rank on its part of a DTensor.

    Args:
        function: computes each vector of the last dimension from itself, in the same shape.
        tensor: a DTensor, or a plain tensor.

    Raises:
        ValueError: the last dimension is cut, or the parts are terms of a sum.
    """
    if not is_sharded(tensor):
        return function(tensor)
    from torch.distributed.tensor import DTensor

    last = tensor.dim() - 1
    if any(p.is_partial() or p.is_shard(last) for p in tensor.placements):
        raise ValueError(f"expected whole vectors on each rank, got {tuple(tensor.placements)}")
    return DTensor.from_local(
        function(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def changes_unseen(parameter: torch.Tensor) -> bool:
    """True if a wrapper may put other numbers into a tensor, with no change that torch counts.

    FSDP and ZeRO-3 gather whole parameters for each call, into tensors of their own or old ones.
    """
    # FSDP version 1 puts plain tensors in the place of parameters
    if not isinstance(parameter, nn.Parameter) or hasattr(parameter, "ds_id"):
        return True
    # FSDP version 2 has a state for each of its modules
    return hasattr(parameter, "_fsdp_flattened") or bool(internals.composable_states())
