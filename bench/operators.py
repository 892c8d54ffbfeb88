"""Single operators, the contestants that each is compared with, and the least work of each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from correctness import compare
from gpu_operators import cayley_contest, rivals, rotation_contest
from interleave import Contestant
from layer_operators import compose_contest, names, scale_contest
from sizes import BLOCK, COMPOSED, Sizes, sizes_on

from boft_ops import butterfly_matmul, cayley
from boft_ops.ops.rotated_linear import rotated_linear_backward, rotated_linear_forward
from boft_ops.ops.stages import plan

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

SIZE = 16  # size of the stage's blocks inside the fused layer
LABELS = {
    "mm": "torch.mm",
    "solve": "torch.linalg.solve",
    "cayley": "cayley",
    "butterfly_groups": "butterfly_groups of all layers",
    "clone": "x.clone()",
    "f-linear": "F.linear",
    "grad-weight": "grad @ weight",
    "boft-linear": "rotated layer, fused",
    "compose": "compose",
    "scale": "scale",
}


def members(device: torch.device, dtype: torch.dtype) -> dict[tuple[str, str], tuple[str, ...]]:
    """List the contestants of each group and direction; the others are compared with the first.

    The fused layer takes part only if a kernel serves it. Without one, layers use other ops.
    """
    sizes = sizes_on(device.type)
    contestants = {(sizes.product, FORWARD): ("mm",)}
    if sizes.linears:
        others = (f"cayley-{backend}" for backend in rivals())
        contestants[sizes.cayley, FORWARD] = ("solve", "cayley", "butterfly_groups", *others)
    else:
        for direction in (FORWARD, BACKWARD, BOTH):
            contestants[sizes.cayley, direction] = ("solve", "cayley")
    for direction in (FORWARD, BACKWARD):
        contestants[sizes.rotation, direction] = ("clone", *sizes.rotations)
        if sizes.raw:  # on a GPU each rotation is followed by the same one on other backends
            pairs = ((name, *(f"{name}-{b}" for b in rivals())) for name in sizes.rotations)
            contestants[sizes.rotation, direction] = ("clone", *chain.from_iterable(pairs))
        contestants[sizes.compose, direction] = names("compose")
        contestants[sizes.scale, direction] = ("clone", *names("scale"))
    x = torch.empty(sizes.rows, SIZE, device=device, dtype=dtype)
    weight, stage = x[:SIZE], torch.empty(1, SIZE, SIZE, device=device)
    if rotated_linear_forward.kernel_backend(x, weight, stage, None, None, False, True):
        contestants[sizes.linear, FORWARD] = ("f-linear", "boft-linear")
        contestants[sizes.linear, BACKWARD] = ("grad-weight", "boft-linear")
    return contestants


def label(name: str, device: torch.device) -> str:
    """Name of a contestant in tables."""
    sizes = sizes_on(device.type)
    for backend in ("reference", *rivals()):
        if name.endswith(f"-{backend}"):
            return f"{label(name.removesuffix(f'-{backend}'), device)}, {backend}"
    if name not in sizes.rotations:
        return LABELS[name]
    m, b = sizes.rotations[name]
    return f"{'stages of' if sizes.raw else 'butterfly_matmul'} ({m},{b})"


def contest(
    group: str, direction: str, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """Build the contestants of a group, ready to be timed.

    Raises:
        AssertionError: the results of a contestant are wrong.
    """
    torch.manual_seed(0)
    sizes = sizes_on(device.type)
    if group == sizes.product:
        a, b = (torch.randn(sizes.features, sizes.features).to(device, dtype) for _ in range(2))
        return [Contestant("mm", lambda: torch.mm(a, b))]
    if group == sizes.cayley:
        if sizes.linears:
            return cayley_contest(sizes, device, solve)
        return _cayley_contest(sizes, direction, device)
    if group == sizes.rotation:
        if sizes.raw:
            return rotation_contest(sizes, direction == BACKWARD, device, dtype)
        return _rotation_contest(sizes, direction, device, dtype)
    if group == sizes.compose:
        return compose_contest(sizes, direction == BACKWARD, device)
    if group == sizes.scale:
        return scale_contest(sizes, direction == BACKWARD, device, dtype)
    return _linear_contest(sizes, direction, device, dtype)


def solve(skew: torch.Tensor) -> torch.Tensor:
    """Compute the Cayley transform with torch.linalg.solve, for autograd."""
    i, j = torch.triu_indices(BLOCK, BLOCK, 1, device=skew.device)
    upper = skew.new_zeros(len(skew), BLOCK, BLOCK)
    upper[:, i, j] = skew
    q = upper - upper.mT
    eye = torch.eye(BLOCK, dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - q, eye + q)


def _cayley_contest(sizes: Sizes, direction: str, device: torch.device) -> list[Contestant]:
    # Every run uses float32, because batched solvers do not support bfloat16.
    skew = 0.1 * torch.randn(sizes.n_blocks, BLOCK * (BLOCK - 1) // 2)
    skew = skew.to(device).requires_grad_(True)
    grad = torch.randn(sizes.n_blocks, BLOCK, BLOCK).to(device)
    compare("cayley", cayley(skew), solve(skew), skew.dtype)

    def run(function: Callable) -> Callable[[], object]:
        if direction == FORWARD:
            return lambda: function(skew)
        if direction == BACKWARD:
            return _backward(function(skew), (skew,), grad)
        return lambda: torch.autograd.grad(function(skew), skew, grad)

    return [Contestant("solve", run(solve)), Contestant("cayley", run(cayley))]


def _rotation_contest(
    sizes: Sizes, direction: str, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    x = torch.randn(sizes.rows, sizes.features).to(device, dtype).requires_grad_(True)
    grad = torch.randn(sizes.rows, sizes.features).to(device, dtype)
    source = x.detach()
    contestants = [Contestant("clone", lambda: source.clone())]
    for name, (m, b) in sizes.rotations.items():
        skew = 0.1 * torch.randn(m, sizes.features // b, b * (b - 1) // 2)
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
    """Return a function that runs the backward of one graph, any number of times."""
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _linear_contest(
    sizes: Sizes, direction: str, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """Compare the ops themselves, without autograd and without the time to make the stage."""
    d = sizes.features
    x, grad = (torch.randn(sizes.rows, d).to(device, dtype) for _ in range(2))
    weight = (torch.randn(d, d) / d**0.5).to(device, dtype)
    bias = torch.randn(d).to(device, dtype)
    scale = 1 + 0.1 * torch.randn(d).to(device)
    stage = cayley(0.1 * torch.randn(d // SIZE, SIZE * (SIZE - 1) // 2).to(device))
    arguments = (x, weight, stage, scale, bias, False, True)
    y, z = rotated_linear_forward.raw(*arguments)
    if direction == FORWARD:
        compare("fused layer", y, rotated_linear_forward.reference(*arguments)[0], dtype)
        return [
            Contestant("f-linear", lambda: F.linear(x, weight, bias)),
            Contestant("boft-linear", lambda: rotated_linear_forward.raw(*arguments)),
        ]
    arguments = (grad, x, weight, stage, scale, None, z, 1, True)
    names = ("x", "the stage", "the scale", "the bias")
    ours, theirs = (
        rotated_linear_backward.raw(*arguments),
        rotated_linear_backward.reference(*arguments),
    )
    for name, one, other in zip(names, ours, theirs, strict=True):
        compare(f"fused layer: gradient of {name}", one, other, dtype)
    return [
        Contestant("grad-weight", lambda: grad @ weight),
        Contestant("boft-linear", lambda: rotated_linear_backward.raw(*arguments)),
    ]


class Work(NamedTuple):
    """Least work of an operator.

    Attributes:
        bytes: bytes of all large tensors that are read or written, each counted once.
        flops: number of operations at the rate of a matrix product in the run's dtype. A
            multiply-add counts as two.
    """

    bytes: int
    flops: int


def work(group: str, direction: str, name: str, device: torch.device, dtype: torch.dtype) -> Work:
    """Compute the least work of a contestant in its group."""
    sizes, size = sizes_on(device.type), dtype.itemsize
    d = sizes.features
    for backend in ("reference", *rivals()):
        name = name.removesuffix(f"-{backend}")
    if group == sizes.product:
        return Work(3 * d**2 * size, 2 * d**3)
    if group == sizes.cayley:
        return _cayley_work(sizes.n_blocks, direction, dtype)
    if group == sizes.rotation:
        array = sizes.rows * d
        if name == "clone":
            return Work(2 * array * size, 0)
        # The number of features that a rotation mixes, summed over its stages.
        mixed = sum(stage.size for stage in plan(*sizes.rotations[name], device.type))
        if direction == FORWARD:  # reads x and writes y
            return Work(2 * array * size, 2 * array * mixed)
        # Reads x and the gradient, writes the gradient of x; one product and the Gram matrix.
        return Work(3 * array * size, 4 * array * mixed)
    if group == sizes.compose:
        return _compose_work(sizes, direction, dtype)
    if group == sizes.scale:
        # A multiply-add for each number; the backward makes a product and two sums.
        arrays, flops = (2, 2) if direction == FORWARD else (3, 5)
        if name == "clone":
            arrays, flops = 2, 0
        return Work(arrays * sizes.rows * d * size, flops * sizes.rows * d)
    # In both directions a product reads the weight and rows, and writes rows.
    array = sizes.rows * d
    arrays, rotation = 2, 0
    if name == "boft-linear" and direction == FORWARD:
        # The fused layer also writes the output before the scale.
        arrays, rotation = 3, 2 * array * SIZE
    elif name == "boft-linear":
        # Its backward also reads that output and x.
        arrays, rotation = 4, 4 * array * SIZE
    return Work((arrays * array + d**2) * size, 2 * array * d + rotation)


def _compose_work(sizes: Sizes, direction: str, dtype: torch.dtype) -> Work:
    """Compute the least work of composing factors into a stage.

    Forward reads the factors and writes the stage. Backward reads the factors and the stage's
    gradient, and writes the factors' gradients. A product of a factor of size b with groups takes b
    multiply-adds for each number of the result. Backward makes two such products, and makes the
    groups again.
    """
    features = sizes.composed * BLOCK
    factors = COMPOSED * features * BLOCK
    groups = [features * BLOCK << i for i in range(COMPOSED)]
    flops = 2 * BLOCK * sum(groups[1:])
    if direction == FORWARD:
        result = Work(4 * (factors + groups[-1]), flops)
    else:
        result = Work(4 * (2 * factors + groups[-1]), 3 * flops)
    return result if dtype == torch.float32 else result._replace(flops=0)


def _cayley_work(n_blocks: int, direction: str, dtype: torch.dtype) -> Work:
    """Compute the least work of the Cayley transform.

    For each block, forward is an elimination of b^3 multiply-adds, and backward two products of b^3
    multiply-adds each. They run in float64, at half the rate of float32 by assumption, so a
    multiply-add counts as four flops. Runs in other dtypes do not measure the rate of float32;
    there only the bytes count. Two factors composed into stages have as many numbers as their
    blocks, so the bytes of ``butterfly_groups`` are the same.
    """
    packed, square = n_blocks * BLOCK * (BLOCK - 1) // 2, n_blocks * BLOCK**2
    forward = Work(4 * (packed + square), 4 * n_blocks * BLOCK**3)
    backward = Work(4 * (2 * square + packed), 8 * n_blocks * BLOCK**3)
    total = {
        FORWARD: forward,
        BACKWARD: backward,
        BOTH: Work(forward.bytes + backward.bytes, forward.flops + backward.flops),
    }[direction]
    return total if dtype == torch.float32 else total._replace(flops=0)
