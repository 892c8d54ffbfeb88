"""Tensor parallelism: BOFT layers whose weight is cut along its rows or its columns.

Each rank computes its part of a layer with ``rotated_linear`` on its own tensors, and DTensor does
the communication of torch's ColwiseParallel and RowwiseParallel, and no other.
A rotation is whole on every rank, unless it acts on the features that are cut. Then each rank has
the blocks of its own features, which is all it needs if no group of the butterfly crosses a cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from .._runtime import checks
from ..ops.linear import rotated_linear
from ..ops.rotation import SkewRotation
from .base import BOFTLayer
from .cuts import check_groups, local, shared_drop_mask
from .layers import BOFTLinear
from .multi_adapter import MultiAdapterLinear


class _BOFTStyle:
    """The part of both styles that does not depend on where the weight is cut."""

    side: str  # rotations of this side act on the features that are cut
    placements: dict[str, Placement]  # for weight, bias and scale_offset
    input_layouts: tuple[Placement, ...]
    output_layouts: tuple[Placement, ...]
    use_local_output: bool
    src_data_rank: int | None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(
                f"device_mesh: expected one dimension, such as mesh['tp'], got {device_mesh}"
            )
        if isinstance(module, MultiAdapterLinear):
            super()._apply(module.base, device_mesh)
            module.shard_adapters()
        elif isinstance(module, BOFTLinear):
            self._distribute(module, device_mesh)
        elif isinstance(module, BOFTLayer):
            raise TypeError(f"module: expected a linear layer, got {type(module).__name__}")
        else:
            super()._apply(module, device_mesh)
        return module

    def _distribute(self, layer: BOFTLinear, mesh: DeviceMesh) -> None:
        """Make the parameters of a layer DTensors, and this style the way it is computed."""
        if layer.merged:
            raise ValueError("module: expected an unmerged layer, got a merged one: unmerge() it")
        placements = self.placements | {"skew": Replicate()}
        if layer.side == self.side:
            check_groups(layer.rotated_features, layer.block_size, layer.n_factors, mesh.size())
            placements["skew"] = Shard(1)
        for name, parameter in list(layer.named_parameters(recurse=False)):
            placed = distribute_tensor(
                parameter.detach(), mesh, [placements[name]], src_data_rank=self.src_data_rank
            )
            placed = nn.Parameter(placed, requires_grad=parameter.requires_grad)
            layer.register_parameter("frozen_weight" if name == "weight" else name, placed)
        layer.tensor_parallel = self

    def plain(self, layer: nn.Linear) -> nn.Linear:
        """Let torch's style compute a plain layer whose parameters are DTensors of this style."""
        mesh = layer.weight.device_mesh
        return super()._apply(layer, mesh) if mesh.ndim == 1 else layer  # FSDP's shards

    def call(self, layer: BOFTLinear, x: torch.Tensor) -> torch.Tensor:
        """Compute a layer that this style was applied to.

        Args:
            layer: its parameters are DTensors on a mesh of one dimension.
            x: a DTensor, or the part of one that ``input_layouts`` names.

        Returns:
            The output in ``output_layouts``, as a DTensor or its local part.
        """
        mesh = layer.skew.device_mesh
        y = self._call_local(layer, self._local_input(x, mesh), mesh)
        y = self._placed_output(y, layer, mesh)
        if y.placements != self.output_layouts:
            y = y.redistribute(placements=self.output_layouts)
        y = self._finish(y, layer)
        return y.to_local() if self.use_local_output else y

    def _call_local(self, layer: BOFTLinear, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        """The part of the output that this rank computes, from local tensors alone."""
        weight, bias = local(layer.frozen_weight), self._local_bias(layer)
        if layer.merged:
            layer._check_trainable()
            return F.linear(x, weight, bias)
        checks.linear_input(x, weight)
        skew, offset = layer.at_strength()
        rotation = SkewRotation(
            layer._active(local(skew)), layer.config.method, shared_drop_mask(layer)
        )
        return rotated_linear(
            x,
            weight,
            rotation,
            scale=None if offset is None else local(offset),
            scale_base=1,
            bias=bias,
            side=layer.side,
            kaleidoscope=layer.kaleidoscope,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, "
            f"output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class ColwiseBOFT(_BOFTStyle, ColwiseParallel):
    """torch's ``ColwiseParallel`` that also takes BOFT layers: each rank computes some outputs.

    The weight, the bias and the scale are cut with the outputs. The rotation of the inputs is
    whole on every rank, and its gradient is summed over the ranks when it is used. A rotation of
    the outputs (side "out") is cut like the skew of ``RowwiseBOFT``.

    Modules that are no BOFT layers get torch's style, so that one plan serves a model of both.

    Args:
        input_layouts: placement of the inputs, by default ``Replicate()``; ``Shard(1)`` for
            sequence parallelism.
        output_layouts: placement of the outputs, by default ``Shard(-1)``.
        use_local_output: True (the default) returns local tensors, False DTensors.

    Raises:
        TypeError: the module is a BOFT layer, but not a linear one.
        ValueError: the mesh has several dimensions, the layer is merged, or the groups of a
            rotation of the outputs cross the cuts; the message lists the nearest valid
            (n_factors, block_size).
    """

    side = "out"
    placements = {"weight": Shard(0), "bias": Shard(0), "scale_offset": Shard(0)}  # noqa: RUF012

    def _local_input(self, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        # The outputs of a rank are some of all, and so are the terms of the gradient of x.
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def _local_bias(self, layer: BOFTLinear) -> torch.Tensor | None:
        return None if layer.bias is None else local(layer.bias)

    def _placed_output(self, y: torch.Tensor, layer: BOFTLinear, mesh: DeviceMesh) -> DTensor:
        # The shape is given, as the ranks' parts differ where the ranks do not divide the outputs.
        shape = torch.Size((*y.shape[:-1], layer.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            y, mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=stride
        )

    def _finish(self, y: DTensor, layer: BOFTLinear) -> DTensor:
        return y


class RowwiseBOFT(_BOFTStyle, RowwiseParallel):
    """torch's ``RowwiseParallel`` that also takes BOFT layers: each rank has some of the inputs.

    The weight is cut along its columns, and the skew along its blocks: the rotation needs no
    communication, as each rank rotates its own features. The scale is whole on every rank; it
    multiplies the parts of the output, which are then summed, and the bias comes last.

    Modules that are no BOFT layers get torch's style, so that one plan serves a model of both.

    Args:
        input_layouts: placement of the inputs, by default ``Shard(-1)``.
        output_layouts: placement of the outputs, by default ``Replicate()``; ``Shard(1)`` for
            sequence parallelism.
        use_local_output: True (the default) returns local tensors, False DTensors.

    Raises:
        TypeError: the module is a BOFT layer, but not a linear one.
        ValueError: the mesh has several dimensions, the layer is merged, or a group of
            block_size * 2**(n_factors-1) features crosses a cut; the message lists the nearest
            valid (n_factors, block_size).
    """

    side = "in"
    placements = {  # noqa: RUF012
        "weight": Shard(1),
        "bias": Replicate(),
        "scale_offset": Replicate(),
    }

    def _local_input(self, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        if not isinstance(x, DTensor):
            if self.input_layouts == (Shard(-1),):
                return x
            x = DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        return x.redistribute(placements=[Shard(x.dim() - 1)]).to_local()

    def _local_bias(self, layer: BOFTLinear) -> None:
        return None

    def _placed_output(self, y: torch.Tensor, layer: BOFTLinear, mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)

    def _finish(self, y: DTensor, layer: BOFTLinear) -> DTensor:
        return y if layer.bias is None else y + layer.bias.to(y.dtype)
