"""A small model, its adapters, and its training, alone or on several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import boft_ops

OPTIONS = {"block_size": 4, "n_factors": 2}
TARGETS = ["up", "down"]
ROWS = 4  # rows of a batch on each rank


class Block(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(d),
            nn.Linear(d, h),
            nn.Linear(h, d, bias=False),
        )

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


class Model(nn.Module):
    """Three residual blocks and a head, (..., 16) -> (..., 5)."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 32) for _ in range(3))
        self.head = nn.Linear(16, 5)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def pretrained(**options) -> Model:
    """The model with the same numbers on every rank and in every call."""
    torch.manual_seed(0)
    return Model(**options)


def adapt(model: nn.Module, **options) -> nn.Module:
    """The adapted model, with skews that do something and a trained head."""
    boft_ops.adapt(model, TARGETS, modules_to_save=["head"], **(OPTIONS | options))
    return randomize(model)


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Give skews and scales numbers, the same ones on every rank and for every class of layer."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("skew", "scale_offset")):
            numbers = 0.2 * torch.randn(parameter.shape, generator=generator)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.shape == numbers.shape:
                local.copy_(numbers)
    return model.train()


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(
    model: nn.Module, mesh: DeviceMesh | None = None, leaves: bool = False, **kwargs
) -> nn.Module:
    """``fully_shard`` for each block, or also for each linear layer, and for the whole."""
    mesh = mesh or mesh_of_all()
    for block in model.blocks:
        for layer in (block.up, block.down) if leaves else ():
            fully_shard(layer, mesh=mesh, **kwargs)
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: nn.Module, *, alone: bool = False, steps: int = 3, start: int = 0, optimizer=None
) -> torch.Tensor:
    """Train with AdamW and clipping, on this rank's part of each batch, or alone on all of it.

    Returns:
        (steps, 2), the mean loss of all ranks and the norm of the gradients, by step.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=1e-2)
    history = []
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        x, target = torch.randn(ROWS * world, 3, 16), torch.randn(ROWS * world, 3, 5)
        part = slice(None) if alone else slice(ROWS * rank, ROWS * (rank + 1))
        loss = F.mse_loss(model(x[part]), target[part])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained(model), 0.5)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if not alone:
            dist.all_reduce(loss)
            loss /= world
        history.append(torch.stack([loss, norm.detach()]))
    return torch.stack(history)
