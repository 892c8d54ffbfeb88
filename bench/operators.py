"""Single operators, what each is compared with, and the work that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from correctness import compare
from interleave import Contestant

from boft_ops import butterfly_matmul, cayley
from boft_ops.linear import linear_backward, linear_forward

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

N_BLOCKS, BLOCK = 4096, 8
TOKENS, FEATURES = 1024, 2048
SIZE = 16  # of the stage inside the fused layer

PRODUCT = f"product, {FEATURES}x{FEATURES}x{FEATURES}"
CAYLEY = f"cayley, {N_BLOCKS} blocks {BLOCK}x{BLOCK}"
ROTATION = f"rotation, {TOKENS} rows of {FEATURES}"
LINEAR = f"linear, {FEATURES}x{FEATURES}x{TOKENS}"

ROTATIONS = {f"rotate-{m}-{b}": (m, b) for m, b in ((1, 16), (2, 8), (4, 4))}
LABELS = {
    "mm": "torch.mm",
    "solve": "torch.linalg.solve",
    "cayley": "cayley",
    "clone": "x.clone()",
    **{name: f"butterfly_matmul ({m},{b})" for name, (m, b) in ROTATIONS.items()},
    "f-linear": "F.linear",
    "grad-weight": "grad @ weight",
    "boft-linear": "rotated layer, fused",
}


def members(device: torch.device, dtype: torch.dtype) -> dict[tuple[str, str], tuple[str, ...]]:
    """Who takes part in each group and direction; the first is what the others are compared with.

    The fused layer takes part where a kernel serves it: elsewhere layers are made of other ops.
    """
    found = {
        (PRODUCT, FORWARD): ("mm",),
        (CAYLEY, FORWARD): ("solve", "cayley"),
        (CAYLEY, BACKWARD): ("solve", "cayley"),
        (CAYLEY, BOTH): ("solve", "cayley"),
        (ROTATION, FORWARD): ("clone", *ROTATIONS),
        (ROTATION, BACKWARD): ("clone", *ROTATIONS),
    }
    x = torch.empty(TOKENS, SIZE, device=device, dtype=dtype)
    weight, stage = x[:SIZE], torch.empty(1, SIZE, SIZE, device=device)
    if linear_forward.has_kernel(x, weight, stage, None, None, True):
        found[LINEAR, FORWARD] = ("f-linear", "boft-linear")
        found[LINEAR, BACKWARD] = ("grad-weight", "boft-linear")
    return found


def contest(
    group: str, direction: str, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """The members of a group, ready to be timed."""
    torch.manual_seed(0)
    if group == PRODUCT:
        a, b = (torch.randn(FEATURES, FEATURES).to(device, dtype) for _ in range(2))
        return [Contestant("mm", lambda: torch.mm(a, b))]
    if group == CAYLEY:
        return _cayley_contest(direction, device)
    if group == ROTATION:
        return _rotation_contest(direction, device, dtype)
    return _linear_contest(direction, device, dtype)


def solve(skew: torch.Tensor) -> torch.Tensor:
    """The Cayley transform by autograd through torch.linalg."""
    i, j = torch.triu_indices(BLOCK, BLOCK, 1, device=skew.device)
    upper = skew.new_zeros(len(skew), BLOCK, BLOCK)
    upper[:, i, j] = skew
    q = upper - upper.mT
    eye = torch.eye(BLOCK, dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - q, eye + q)


def _cayley_contest(direction: str, device: torch.device) -> list[Contestant]:
    # float32 in every run: batched solvers know no bfloat16
    skew = (0.1 * torch.randn(N_BLOCKS, BLOCK * (BLOCK - 1) // 2)).to(device).requires_grad_(True)
    grad = torch.randn(N_BLOCKS, BLOCK, BLOCK).to(device)
    compare("cayley", cayley(skew), solve(skew), skew.dtype)

    def run(function: Callable) -> Callable[[], object]:
        if direction == FORWARD:
            return lambda: function(skew)
        if direction == BACKWARD:
            return _backward(function(skew), (skew,), grad)
        return lambda: torch.autograd.grad(function(skew), skew, grad)

    return [Contestant("solve", run(solve)), Contestant("cayley", run(cayley))]


def _rotation_contest(direction: str, device: torch.device, dtype: torch.dtype) -> list[Contestant]:
    x = torch.randn(TOKENS, FEATURES).to(device, dtype).requires_grad_(True)
    grad = torch.randn(TOKENS, FEATURES).to(device, dtype)
    source = x.detach()
    contestants = [Contestant("clone", lambda: source.clone())]
    for name, (m, b) in ROTATIONS.items():
        skew = 0.1 * torch.randn(m, FEATURES // b, b * (b - 1) // 2)
        blocks = cayley(skew.to(device)).requires_grad_(True)
        contestants.append(Contestant(name, _rotation(direction, x, blocks, grad)))
    return contestants


def _rotation(
    direction: str, x: torch.Tensor, blocks: torch.Tensor, grad: torch.Tensor
) -> Callable[[], object]:
    if direction == FORWARD:
        return lambda: butterfly_matmul(x, blocks)
    return _backward(butterfly_matmul(x, blocks), (x, blocks), grad)


def _backward(
    y: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> Callable[[], object]:
    """The backward of one graph, again and again."""
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _linear_contest(direction: str, device: torch.device, dtype: torch.dtype) -> list[Contestant]:
    """The ops themselves, without autograd and without making the stage."""
    x, grad = (torch.randn(TOKENS, FEATURES).to(device, dtype) for _ in range(2))
    weight = (torch.randn(FEATURES, FEATURES) / FEATURES**0.5).to(device, dtype)
    bias = torch.randn(FEATURES).to(device, dtype)
    scale = 1 + 0.1 * torch.randn(FEATURES).to(device)
    stage = cayley(0.1 * torch.randn(FEATURES // SIZE, SIZE * (SIZE - 1) // 2).to(device))
    arguments = (x, weight, stage, scale, bias, True)
    y, z = linear_forward.raw(*arguments)
    if direction == FORWARD:
        compare("fused layer", y, linear_forward.reference(*arguments)[0], dtype)
        return [
            Contestant("f-linear", lambda: F.linear(x, weight, bias)),
            Contestant("boft-linear", lambda: linear_forward.raw(*arguments)),
        ]
    arguments = (grad, x, weight, stage, scale, z)
    names = ("x", "the stage", "the scale", "the bias")
    ours, theirs = linear_backward.raw(*arguments), linear_backward.reference(*arguments)
    for name, one, other in zip(names, ours, theirs, strict=True):
        compare(f"fused layer: gradient of {name}", one, other, dtype)
    return [
        Contestant("grad-weight", lambda: grad @ weight),
        Contestant("boft-linear", lambda: linear_backward.raw(*arguments)),
    ]


class Work(NamedTuple):
    """What an operator cannot do without.

    Attributes:
        bytes: large tensors read and written, each once.
        flops: at the rate of a matrix product in the run's dtype; a multiply-add is two.
    """

    bytes: int
    flops: int


def work(group: str, direction: str, name: str, dtype: torch.dtype) -> Work:
    """The work of a contestant in its group."""
    size = dtype.itemsize
    if group == PRODUCT:
        return Work(3 * FEATURES**2 * size, 2 * FEATURES**3)
    if group == CAYLEY:
        return _cayley_work(direction, dtype)
    if group == ROTATION:
        array = TOKENS * FEATURES
        if name == "clone":
            return Work(2 * array * size, 0)
        m, b = ROTATIONS[name]
        mixed = b << (m - 1)
        if direction == FORWARD:  # x in and out
            return Work(2 * array * size, 2 * array * mixed)
        # x and the gradient in, the gradient of x out; its product and the Gram matrix
        return Work(3 * array * size, 4 * array * mixed)
    # The same in both directions: rows in and out, the weight in, one product. The fused layer also
    # writes (forward) or reads (backward) the output before the scale; and x, in the backward.
    rows, fused = TOKENS * FEATURES, name == "boft-linear"
    arrays = 2 if not fused else 3 if direction == FORWARD else 4
    rotation = (2 if direction == FORWARD else 4) * rows * SIZE if fused else 0
    return Work((arrays * rows + FEATURES**2) * size, 2 * rows * FEATURES + rotation)


def _cayley_work(direction: str, dtype: torch.dtype) -> Work:
    """Forward: an elimination of b^3 multiply-adds a block. Backward: two products of as many each.

    They are done in float64, taken to run at half the rate of float32: four flops a multiply-add.
    Without a float32 rate, in runs in another dtype, the bytes alone count.
    """
    packed, square = N_BLOCKS * BLOCK * (BLOCK - 1) // 2, N_BLOCKS * BLOCK**2
    forward = Work(4 * (packed + square), 4 * N_BLOCKS * BLOCK**3)
    backward = Work(4 * (2 * square + packed), 8 * N_BLOCKS * BLOCK**3)
    total = {
        FORWARD: forward,
        BACKWARD: backward,
        BOTH: Work(forward.bytes + backward.bytes, forward.flops + backward.flops),
    }[direction]
    return total if dtype == torch.float32 else total._replace(flops=0)
