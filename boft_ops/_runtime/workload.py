"""Random arguments of the size of a layer: tests check operators on them, the tuner times them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import packed_size
from .dtypes import COMPUTE


@dataclass(frozen=True)
class Workload:
    """A BOFT(n_factors, block_size) layer of d inputs and n outputs, and the rows through it.

    The same seed makes the same numbers.
    """

    d: int
    n: int
    rows: int
    n_factors: int
    block_size: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    seed: int = 0

    @property
    def n_blocks(self) -> int:
        """Blocks of one factor, K = d / block_size."""
        return self.d // self.block_size

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of blocks, stages and scales: that of the rows, in at least float32."""
        return COMPUTE[self.dtype]

    def tensor(
        self, *shape: int, salt: int = 0, std: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Normal numbers of standard deviation ``std``, in the dtype of the rows by default.

        Two tensors of one workload differ by their shape or their ``salt``.
        """
        generator = torch.Generator(self.device).manual_seed(
            1000 * self.seed + 100 * salt + len(shape)
        )
        numbers = torch.randn(
            shape, generator=generator, device=self.device, dtype=self.compute_dtype
        )
        return (std * numbers).to(dtype or self.dtype)

    def x(self) -> torch.Tensor:
        """Rows (rows, d)."""
        return self.tensor(self.rows, self.d)

    def grad_x(self) -> torch.Tensor:
        """A gradient of the rows (rows, d)."""
        return self.tensor(self.rows, self.d, salt=1)

    def skew(self) -> torch.Tensor:
        """Packed skew-symmetric blocks (m, K, b(b-1)/2), in the compute dtype."""
        shape = self.n_factors, self.n_blocks, packed_size(self.block_size)
        return self.tensor(*shape, std=0.1, dtype=self.compute_dtype)

    def drop_mask(self) -> torch.Tensor:
        """A mask (m, K) with some blocks to be dropped."""
        return self.tensor(self.n_factors, self.n_blocks) > 1.0

    def matrices(self, count: int, size: int) -> torch.Tensor:
        """Matrices (count, size, size) near the identity, in the compute dtype."""
        eye = torch.eye(size, device=self.device, dtype=self.compute_dtype)
        return eye + self.tensor(count, size, size, std=0.1 / size, dtype=self.compute_dtype)
