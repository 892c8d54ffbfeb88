"""Sizes of the operands of single operators, and names of their groups."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 8  # block size of the Cayley transforms
COMPOSED = 4  # number of factors of that block size that are composed into one stage

# Llama-3.1-8B: input features of q, k, v, o, gate, up and down in each layer.
LLAMA_LAYERS = 32
LLAMA_INPUTS = (4096, 4096, 4096, 4096, 4096, 4096, 14336)
LLAMA_FACTORS = 2


class Sizes(NamedTuple):
    """Sizes for one device type.

    Attributes:
        rows: number of rows that are rotated or that go through the fused layer.
        features: features of each row, and rows and columns of the matrices of the product.
        rotations: (m, b) of each rotation, by contestant.
        n_blocks: number of blocks of the Cayley transform.
        linears: input features of the layers whose rotations are made at once, or ().
        raw: if true, only the passes over the rows are timed, without autograd.
        calls: number of calls between two readings of the clock.
    """

    rows: int
    features: int
    rotations: dict[str, tuple[int, int]]
    n_blocks: int
    linears: tuple[int, ...]
    raw: bool
    calls: int

    @property
    def product(self) -> str:
        return f"product, {self.features}x{self.features}x{self.features}"

    @property
    def cayley(self) -> str:
        where = "of Llama-3.1-8B, " if self.linears else ""
        return f"cayley, {where}{self.n_blocks} blocks {BLOCK}x{BLOCK}"

    @property
    def composed(self) -> int:
        """Number of blocks in each factor of the composed stages."""
        return -(-self.n_blocks // (1 << COMPOSED)) << (COMPOSED - 1)

    @property
    def compose(self) -> str:
        return f"compose, {COMPOSED} factors of {self.composed} blocks {BLOCK}x{BLOCK}"

    @property
    def scale(self) -> str:
        return f"scale, {self.rows} rows of {self.features}"

    @property
    def rotation(self) -> str:
        return f"rotation, {self.rows} rows of {self.features}"

    @property
    def linear(self) -> str:
        return f"linear, {self.features}x{self.features}x{self.rows}"


def _rotations(*butterflies: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {f"rotate-{m}-{b}": (m, b) for m, b in butterflies}


CPU = Sizes(
    rows=1024,
    features=2048,
    rotations=_rotations((1, 16), (2, 8), (4, 4)),
    n_blocks=4096,
    linears=(),
    raw=False,
    calls=1,
)
# Smaller operands would fit into the caches of a GPU or take no longer than a launch. Ten calls in
# a row keep the device busy while the next launch is made; a single call would be timed with its
# launch.
GPU = Sizes(
    rows=8192,
    features=4096,
    rotations=_rotations((2, 8), (4, 8), (6, 8), (10, 8)),
    n_blocks=LLAMA_LAYERS * LLAMA_FACTORS * sum(LLAMA_INPUTS) // BLOCK,
    linears=LLAMA_LAYERS * LLAMA_INPUTS,
    raw=True,
    calls=10,
)


def sizes_on(device: str) -> Sizes:
    """Return the sizes for a device type, or for the name of a device in a result."""
    return CPU if device == "cpu" else GPU
