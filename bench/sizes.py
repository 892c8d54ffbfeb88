"""How large the operands of single operators are, and what their groups are called."""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 8  # of the Cayley transforms
COMPOSED = 4  # factors of that size, in a stage that is composed of them

# Llama-3.1-8B: input features of q, k, v, o, gate, up and down, of each of its layers
LLAMA_LAYERS = 32
LLAMA_INPUTS = (4096, 4096, 4096, 4096, 4096, 4096, 14336)
LLAMA_FACTORS = 2


class Sizes(NamedTuple):
    """The sizes on one kind of device.

    Attributes:
        rows: of what is rotated, and of what goes through the fused layer.
        features: of each row, and of the matrices of the product in each direction.
        rotations: contestant -> (m, b).
        n_blocks: of the Cayley transform.
        linears: input features of the layers whose rotations are made at once, or none.
        raw: whether a rotation is its passes over the rows alone, outside of autograd.
        calls: how many calls lie between two readings of the clock.
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
        """Blocks of each factor of the stages that are composed."""
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
# What is smaller than this fits into the caches of a GPU, or takes no longer than a launch. Single
# calls would still be timed with their launch; in a row the device is busy while the next is made.
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
    """By the type of a device, or by its name in a result."""
    return CPU if device == "cpu" else GPU
