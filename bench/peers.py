"""Layers of other packages, and layers in plain torch after other people's descriptions."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import nn


class PlainBOFT(nn.Module):
    """A BOFT layer in plain torch: y = scale * (x R W^T) + bias.

    It makes the blocks with torch.linalg.solve and applies one factor after the other. Like
    BOFTLinear it rotates the activations and makes no permutation matrix.
    """

    def __init__(self, base: nn.Linear, n_factors: int, block_size: int) -> None:
        super().__init__()
        self.base, self.block_size = base, block_size
        packed = block_size * (block_size - 1) // 2
        shape = n_factors, base.in_features // block_size, packed
        self.skew = nn.Parameter(torch.zeros(shape, device=base.weight.device))
        self.scale = nn.Parameter(torch.ones(base.out_features, device=base.weight.device))

    def blocks(self) -> torch.Tensor:
        """Compute the rotations (m, d/b, b, b) from the skew parameters."""
        b = self.block_size
        i, j = torch.triu_indices(b, b, 1, device=self.skew.device)
        upper = self.skew.new_zeros(*self.skew.shape[:2], b, b)
        upper[:, :, i, j] = self.skew
        q = upper - upper.mT
        eye = torch.eye(b, device=q.device)
        return torch.linalg.solve(eye - q, eye + q)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, d = x.shape
        b, blocks = self.block_size, self.blocks().to(x.dtype)
        for i in reversed(range(len(blocks))):
            # A block consists of two chunks of b / 2 features, 2^i chunks apart.
            runs = x.view(rows, d // (b << i), 2, 1 << i, b // 2).transpose(2, 3)
            mixed = torch.einsum("nke,kef->nkf", runs.reshape(rows, d // b, b), blocks[i])
            x = mixed.view(rows, d // (b << i), 1 << i, 2, b // 2).transpose(2, 3).reshape(rows, d)
        return F.linear(x, self.base.weight) * self.scale.to(x.dtype) + self.base.bias


class ActivationBOFT(nn.Module):
    """PEFT's BOFT as its pull request 3540 describes it: it rotates activations in plain torch.

    Written from the description. The parameters are those of PEFT, an unconstrained matrix for each
    block and a scale. Each factor gathers the features of its blocks by an index, multiplies them
    by the blocks and gathers them back; no CUDA extension and no d x d matrix takes part.
    """

    def __init__(self, base: nn.Linear, n_factors: int, block_size: int) -> None:
        super().__init__()
        self.base = base
        d, device = base.in_features, base.weight.device
        shape = n_factors, d // block_size, block_size, block_size
        self.boft_R = nn.Parameter(torch.zeros(shape, device=device))
        self.boft_s = nn.Parameter(torch.ones(base.out_features, 1, device=device))
        # A block of factor i has two chunks of block_size / 2 features, 2^i chunks apart.
        features = torch.arange(d, device=device)
        order = [
            features.view(-1, 2, 1 << i, block_size // 2).transpose(1, 2).flatten()
            for i in range(n_factors)
        ]
        self.register_buffer("boft_P", torch.stack(order))
        self.register_buffer("boft_P_inv", self.boft_P.argsort(1))

    def blocks(self) -> torch.Tensor:
        """Compute the rotations (m, d/b, b, b): (I - S)(I + S)^-1 with S = (A - A^T) / 2."""
        skew = 0.5 * (self.boft_R - self.boft_R.mT)
        eye = torch.eye(skew.shape[-1], device=skew.device)
        return torch.linalg.solve(eye + skew, eye - skew, left=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = self.blocks().to(x.dtype)
        for i in reversed(range(len(blocks))):
            gathered = x[:, self.boft_P[i]].view(len(x), *blocks.shape[1:3])
            mixed = torch.einsum("nke,kef->nkf", gathered, blocks[i])
            x = mixed.flatten(1)[:, self.boft_P_inv[i]]
        return F.linear(x, self.base.weight) * self.boft_s[:, 0].to(x.dtype) + self.base.bias


class MoRe(nn.Module):
    """A layer with a Monarch matrix beside its weight: y = W x + P L P' R x + bias.

    R and L have four blocks each, of ``rank`` rows and columns; P' sends the outputs of each block
    of R to all blocks of L, and P interleaves the outputs of the blocks of L.
    """

    BLOCKS = 4

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, (n, d) = base, base.weight.shape
        k, device = self.BLOCKS, base.weight.device
        self.right = nn.Parameter(torch.zeros(k, rank, d // k, device=device))
        self.left = nn.Parameter(torch.zeros(k, n // k, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, rank, _ = self.right.shape
        right, left = self.right.to(x.dtype), self.left.to(x.dtype)
        inner = torch.einsum("nkd,krd->nkr", x.view(len(x), k, -1), right)
        mixed = inner.transpose(1, 2).reshape(len(x), k, rank)
        outer = torch.einsum("nkr,kor->nok", mixed, left)
        return F.linear(x, self.base.weight, self.base.bias) + outer.flatten(1)


NO_EXTENSION = "BOFT_OPS_BENCH_NO_PEFT_EXTENSION"


def forgo_extension() -> None:
    """Keep PEFT from building its CUDA extension if an environment variable says so.

    If the build is known to fail, PEFT would otherwise try it again in every process.
    """
    if os.environ.get(NO_EXTENSION) == "1":
        from peft.tuners.boft import layer

        if hasattr(layer, "get_fbd_cuda"):  # PEFT after 0.21 has no extension
            layer.get_fbd_cuda = lambda: None


class LycorisBOFT(nn.Module):
    """LyCORIS' layer over the weight of ``base``.

    Attributes:
        m: its number of factors.
        b: its block size, the largest one up to ``block_size`` that it finds for the outputs.
    """

    def __init__(self, base: nn.Linear, block_size: int) -> None:
        super().__init__()
        from lycoris.modules.boft import ButterflyOFTModule

        self.linear = nn.Linear(base.in_features, base.out_features, device="meta")
        self.linear.weight, self.linear.bias = base.weight, base.bias
        self.adapter = ButterflyOFTModule("boft", self.linear, 1.0, block_size, 1.0)
        self.adapter.to(base.weight.device)
        self.adapter.apply_to()  # replaces the forward of the linear layer by the adapter's
        self.m, self.b = self.adapter.boft_m, self.adapter.block_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)
