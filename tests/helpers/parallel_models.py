"""A small model that tensor parallelism cuts, and comparisons with one process."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import boft_ops
from boft_ops.distributed import ColwiseBOFT, RowwiseBOFT

D, H, ROWS = 32, 64, 6
LAYERS = ["gate", "up", "down"]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def base():
    torch.manual_seed(0)
    return Mlp()


def adapted(**options):
    return fill(boft_ops.adapt(base(), LAYERS, **({"block_size": 4} | options)))


def fill(model):
    """Set skews and scales to numbers that depend on their names alone."""
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in ("skew", "scale_offset"):
            seed = sum(map(ord, name.replace(".adapters.default", "")))
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            value = 0.2 * noise
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            with torch.no_grad():
                parameter.copy_(value)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def plan(colwise=ColwiseBOFT, rowwise=RowwiseBOFT):
    return {"gate": colwise(), "up": colwise(), "down": rowwise()}


def parallel(**options):
    return fill(parallelize_module(adapted(**options), mesh(), plan()))


def data():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(3, ROWS, D, generator=generator) for _ in range(2))


def close(got, want):
    torch.testing.assert_close(whole(got), whole(want), rtol=1e-4, atol=1e-5)


def assert_alike(model, reference, rows=slice(None)):
    """Compare outputs and all gradients; this rank has these rows."""
    x, grad = data()
    x_whole, x_own = x.clone().requires_grad_(), x[:, rows].clone().requires_grad_()
    want, got = reference(x_whole), model(x_own)
    close(got, want[:, rows])
    want.backward(grad)
    got.backward(grad[:, rows])
    close(x_own.grad, x_whole.grad[:, rows])
    trained = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    found = {n.replace(".adapters.default", ""): p for n, p in model.named_parameters()}
    for name, parameter in trained.items():
        close(found[name].grad, parameter.grad)
    return trained
