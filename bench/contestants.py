"""The layers that are compared. All of them adapt one frozen weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from peers import ActivationBOFT, LycorisBOFT, MoRe, PlainBOFT, forgo_extension
from torch import nn

from boft_ops import BOFTLinear

if TYPE_CHECKING:  # its import takes seconds, and many measurements do without it
    import peft

FLOOR = "linear"
LORA = "lora-r16"
PEFT_BOFT = "peft-boft"


class Butterfly(NamedTuple):
    """A BOFT(m, b), which mixes groups of b * 2^(m-1) features.

    Attributes:
        m: number of factors.
        b: block size.
        d: the only number of input features at which it is measured; None for any number.
        scale: True if it trains a scale of the outputs, as BOFT does; OFT has none.
    """

    m: int
    b: int
    d: int | None = None
    scale: bool = True


# The first three BOFTs mix groups of 16, 16 and 32 features; the last one mixes all 4096.
OURS = {
    "oft-8": Butterfly(1, 8, scale=False),
    "oft-32": Butterfly(1, 32, scale=False),
    "boft-1-16": Butterfly(1, 16),
    "boft-2-8": Butterfly(2, 8),
    "boft-4-4": Butterfly(4, 4),
    "boft-dense": Butterfly(10, 8, d=4096),
}
# Measured only on request: torch.compile takes long, and LyCORIS is not always installed.
COMPILED = "compiled-boft"
EXTRAS = (COMPILED, "lycoris-boft")
RIVALS = ("peft-boft-activation", "peft-psoft", "more")
PEFT_OFTS = ("peft-oft", "peft-oft-exact", "peft-oft-32")
NAMES = (FLOOR, LORA, *PEFT_OFTS, PEFT_BOFT, *RIVALS, *EXTRAS, *OURS)


class Shape(NamedTuple):
    """Input features d and output features n of a linear layer, and its number of input rows."""

    d: int
    n: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.d}x{self.n}x{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read a shape such as "768x3072x512": d, n and tokens.

        Raises:
            ValueError: the text is not three integers with an x between them.
        """
        try:
            d, n, tokens = (int(part) for part in text.split("x"))
        except ValueError:
            raise ValueError(f"shape: expected DxNxTOKENS, got {text!r}") from None
        return cls(d, n, tokens)


SHAPES = (
    Shape(768, 768, 512),
    Shape(768, 3072, 512),
    Shape(2048, 2048, 1024),
    Shape(4096, 4096, 512),
)
# MiniLM's layers with ten sentences of 128 tokens, and layers so small that the host's work counts.
SMALL_SHAPES = (
    Shape(384, 384, 1280),
    Shape(384, 1536, 1280),
    Shape(1536, 384, 1280),
    Shape(384, 384, 256),
    Shape(768, 768, 64),
    Shape(64, 64, 16),
)
BULK = Shape(4096, 4096, 8192)  # large enough to keep a GPU busy


def default_shapes(device: torch.device) -> tuple[Shape, ...]:
    """List the shapes of the committed results.

    On a GPU the largest shape comes first, because the time may not suffice for all shapes.
    """
    return (*SHAPES, *SMALL_SHAPES) if device.type == "cpu" else (BULK, *SHAPES, *SMALL_SHAPES)


def names(shape: Shape, extras: Sequence[str] = ()) -> list[str]:
    """List the contestants at a shape, in the order of ``NAMES``.

    Of the contestants in ``EXTRAS`` only those in ``extras`` take part.
    """
    left_out = set(EXTRAS) - set(extras)
    left_out |= {name for name, ours in OURS.items() if ours.d not in (None, shape.d)}
    if shape in SMALL_SHAPES:
        left_out.add(COMPILED)  # compiling takes longer than all else, and shows the same
    return [name for name in NAMES if name not in left_out]


@dataclass
class Entry:
    """A layer to be measured.

    Attributes:
        name: one of ``NAMES``.
        label: name in tables and charts.
        layer: the module, called as ``layer(x)``.
        note: a remark for the reader of the results, or "".
    """

    name: str
    label: str
    layer: nn.Module
    note: str = ""

    def trainable(self) -> list[nn.Parameter]:
        """List the trainable parameters."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def state(self) -> list[torch.Tensor]:
        """List the parameters and buffers."""
        return [*self.layer.parameters(), *self.layer.buffers()]


def frozen(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """Make the frozen layer whose weight and bias all contestants at this shape share."""
    torch.manual_seed(0)
    return nn.Linear(shape.d, shape.n, device=device, dtype=dtype).requires_grad_(False)


def build(name: str, base: nn.Linear) -> Entry:
    """Build a contestant over the weight and bias of ``base``, with small random adapters.

    Raises:
        RuntimeError: the contestant copied the weight instead of sharing it.
    """
    entry = _make(name, base)
    entry.layer.train()
    _perturb(entry)
    if entry.layer is not base:
        _check_shares(entry, base)
    return entry


def _make(name: str, base: nn.Linear) -> Entry:
    if name == FLOOR:
        return Entry(FLOOR, "frozen nn.Linear", base)
    if name in OURS:
        m, b, _, scale = OURS[name]
        layer = BOFTLinear.from_linear(base, n_factors=m, block_size=b, scale=scale)
        return Entry(name, f"BOFT({m},{b})" if scale else f"OFT b={b}", layer)
    return {
        LORA: _lora,
        "peft-oft": partial(_oft, name, 8, neumann=True),
        "peft-oft-exact": partial(_oft, name, 8, neumann=False),
        "peft-oft-32": partial(_oft, name, 32, neumann=True),
        PEFT_BOFT: _peft_boft,
        "peft-boft-activation": _activation_boft,
        "peft-psoft": _psoft,
        "more": _more,
        "compiled-boft": _compiled_boft,
        "lycoris-boft": _lycoris_boft,
    }[name](base)


def _lora(base: nn.Linear) -> Entry:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["0"])
    return Entry(LORA, "PEFT LoRA r=16", _inject(base, config))


def _oft(name: str, b: int, base: nn.Linear, neumann: bool) -> Entry:
    import peft

    config = peft.OFTConfig(r=0, oft_block_size=b, use_cayley_neumann=neumann, target_modules=["0"])
    note = "its default is a truncated series, orthogonal only nearly" if neumann else ""
    label = f"PEFT OFTv2 b={b} ({'default' if neumann else 'exact'})"
    return Entry(name, label, _inject(base, config), note)


def _peft_boft(base: nn.Linear) -> Entry:
    """Build PEFT's BOFT(2, 8), which becomes BOFT(1, 8) if PEFT's CUDA extension is missing."""
    import peft

    asked = 2
    forgo_extension()
    config = peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=asked, target_modules=["0"])
    layer = _inject(base, config)
    m, _, b, _ = layer.boft_R["default"].shape
    note = "" if m == asked else f"asked for m={asked}; without its CUDA extension PEFT makes it 1"
    return Entry(PEFT_BOFT, f"PEFT BOFT({m},{b})", layer, note)


def _activation_boft(base: nn.Linear) -> Entry:
    """Build BOFT(2, 8) as PEFT's pull request 3540 describes it."""
    layer = ActivationBOFT(base, n_factors=2, block_size=8)
    note = "written from the description of PEFT's pull request 3540, not its code"
    return Entry("peft-boft-activation", "PEFT BOFT(2,8), activation side", layer, note)


def _budget(base: nn.Linear) -> int:
    """Number of parameters of BOFT(2, 8), which rivals with a rank come nearest to."""
    return 7 * base.in_features + base.out_features


def _psoft(base: nn.Linear) -> Entry:
    """Build PEFT's PSOFT: an r x r rotation between the largest singular vectors of the weight."""
    import peft

    rank = min(round((2 * _budget(base)) ** 0.5), *base.weight.shape)
    config = peft.PsoftConfig(r=rank, psoft_alpha=rank, psoft_svd="lowrank", target_modules=["0"])
    note = "its rank gives about as many parameters as BOFT(2,8) has"
    return Entry("peft-psoft", f"PEFT PSOFT r={rank}", _inject(base, config), note)


def _more(base: nn.Linear) -> Entry:
    """Build a Monarch layer with a rank that gives about as many parameters as BOFT(2, 8)."""
    rank = max(round(_budget(base) / (base.in_features + base.out_features)), 1)
    note = "its rank gives about as many parameters as BOFT(2,8) has; it does not rotate"
    return Entry("more", f"Monarch (MoRe) rank {rank}", MoRe(base, rank), note)


def _compiled_boft(base: nn.Linear) -> Entry:
    """Build BOFT(2, 8) in plain torch under torch.compile."""
    # Compiled for each shape; after the second one torch would take a slower, dynamic form.
    layer = torch.compile(PlainBOFT(base, n_factors=2, block_size=8), dynamic=False)
    return Entry("compiled-boft", "torch.compile of plain BOFT(2,8)", layer)


def _lycoris_boft(base: nn.Linear) -> Entry:
    layer = LycorisBOFT(base, block_size=8)
    note = "rotates the outputs, with as many factors as there can be"
    return Entry("lycoris-boft", f"LyCORIS BOFT({layer.m},{layer.b})", layer, note)


def _inject(base: nn.Linear, config: peft.PeftConfig) -> nn.Module:
    """Make PEFT's adapted layer over the weight of ``base``, without a model around it."""
    import peft

    linear = nn.Linear(base.in_features, base.out_features, device="meta")
    linear.weight, linear.bias = base.weight, base.bias
    with warnings.catch_warnings():
        # PEFT warns that its extension was not built; the note of the entry states the result.
        warnings.simplefilter("ignore")
        return peft.inject_adapter_in_model(config, nn.Sequential(linear))[0]


@torch.no_grad()
def _perturb(entry: Entry) -> None:
    """Add small random numbers to the adapter, because zeros could hide errors.

    With zeros a contestant could skip work unnoticed, and gradients would vanish.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in entry.trainable():
        noise = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter += noise.to(parameter)


def _check_shares(entry: Entry, base: nn.Linear) -> None:
    """Raise RuntimeError if a contestant has copied the weight of ``base``."""
    if not any(p is base.weight or p.data_ptr() == base.weight.data_ptr() for p in entry.state()):
        raise RuntimeError(f"{entry.name}: expected the shared weight, got a copy of it")


class Job:
    """A contestant with a batch: runs forward, or forward and backward.

    x requires a gradient, as it does inside a network. The upstream gradient is random.
    """

    def __init__(self, entry: Entry, x: torch.Tensor, grad: torch.Tensor) -> None:
        self.entry, self.x, self.grad = entry, x, grad
        self._leaves = [x, *entry.trainable()]

    def forward(self) -> torch.Tensor:
        """Run forward."""
        return self.entry.layer(self.x)

    def both(self) -> None:
        """Run forward and backward."""
        self.entry.layer(self.x).backward(self.grad)

    def reset(self) -> None:
        """Clear all gradients."""
        for leaf in self._leaves:
            leaf.grad = None

    def runner(self, direction: str) -> Callable[[], object]:
        """Return the function that runs a direction."""
        return self.forward if direction == "forward" else self.both


def batch(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the x and the upstream gradient that all contestants get."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape.tokens, shape.d, generator=generator).to(device, dtype)
    grad = torch.randn(shape.tokens, shape.n, generator=generator).to(device, dtype)
    return x.requires_grad_(True), grad
