"""The operators where they are compared on a GPU: whole models' rotations, and rows in bulk.

Nothing here is tied to a GPU but the sizes that it is called with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from correctness import compare
from interleave import Contestant
from sizes import BLOCK, LLAMA_FACTORS, Sizes

from boft_ops import butterfly_groups, cayley
from boft_ops._runtime import backend as backends
from boft_ops._runtime import native
from boft_ops.ops.compose import compose_forward
from boft_ops.ops.rotate import apply_stages, apply_stages_backward
from boft_ops.ops.stage_from_skew import stages_from_skew
from boft_ops.ops.stages import Stage, plan


def cayley_contest(
    sizes: Sizes, device: torch.device, solve: Callable[[torch.Tensor], torch.Tensor]
) -> list[Contestant]:
    """All rotations of a model, in float32: their skews one by one, and as one tensor."""
    packed = BLOCK * (BLOCK - 1) // 2
    skews = [0.1 * torch.randn(LLAMA_FACTORS, d // BLOCK, packed) for d in sizes.linears]
    skews = [skew.to(device).requires_grad_(True) for skew in skews]
    whole = torch.cat([skew.detach() for skew in skews], 1).requires_grad_(True)
    flat = whole.detach().flatten(0, 1).requires_grad_(True)

    with torch.no_grad():
        blocks = solve(flat).view(*whole.shape[:2], BLOCK, BLOCK)
        for backend in rivals():
            with backends.force(backend):
                compare(f"cayley by {backend}", cayley(whole), blocks, flat.dtype)
        compare("cayley", cayley(whole), blocks, flat.dtype)
        expected = compose_forward.reference(blocks, 0)
        compare("butterfly_groups", torch.cat(butterfly_groups(skews)), expected, flat.dtype)
    return [
        Contestant("solve", lambda: solve(flat)),
        Contestant("cayley", lambda: cayley(whole)),
        Contestant("butterfly_groups", lambda: butterfly_groups(skews)),
        *[Contestant(f"cayley-{b}", forced(b, lambda: cayley(whole))) for b in rivals()],
    ]


def rivals() -> tuple[str, ...]:
    """The set of GPU kernels that is not the one which serves by default, where both are there."""
    return ("cuda",) if native.kernels("cuda") and backends.has_triton() else ()


def forced(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """The same on one backend."""

    def on_backend() -> object:
        with backends.force(backend):
            return run()

    return on_backend


def rotation_contest(
    sizes: Sizes, backward: bool, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """The passes over the rows, without autograd and without making the stages.

    A copy of this size takes a GPU less time than Python takes for a step of autograd.
    """
    x, grad = (torch.randn(sizes.rows, sizes.features).to(device, dtype) for _ in range(2))
    contestants = [Contestant("clone", lambda: x.clone())]
    for name, (m, b) in sizes.rotations.items():
        skew = (0.1 * torch.randn(m, sizes.features // b, b * (b - 1) // 2)).to(device)
        stages = plan(m, b, device.type)
        with torch.no_grad():
            _, matrices = stages_from_skew(skew, None, "exact", stages, dtype)
            _check(name, x, grad, matrices, stages)
        run = _backward(grad, x, matrices, stages) if backward else _forward(x, matrices, stages)
        contestants.append(Contestant(name, run))
        for backend in rivals():
            with backends.force(backend), torch.no_grad():
                _check(f"{name} by {backend}", x, grad, matrices, stages)
            contestants.append(Contestant(f"{name}-{backend}", forced(backend, run)))
    return contestants


def _forward(
    x: torch.Tensor, matrices: list[torch.Tensor], stages: tuple[Stage, ...]
) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():  # where gradients are on, ops run their reference
            return apply_stages(x, matrices, stages, False)

    return run


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    stages: tuple[Stage, ...],
) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return apply_stages_backward(grad, x, matrices, stages, False, True)

    return run


def _check(
    name: str,
    x: torch.Tensor,
    grad: torch.Tensor,
    matrices: list[torch.Tensor],
    stages: tuple[Stage, ...],
) -> None:
    """The rows, their gradient and the gradients of the stages agree with float64."""
    ours = _forward(x, matrices, stages)(), *_backward(grad, x, matrices, stages)()
    wide = [matrix.double() for matrix in matrices]
    with backends.force("reference"):
        y = _forward(x.double(), wide, stages)()
        theirs = y, *_backward(grad.double(), x.double(), wide, stages)()
    compare(f"{name}: output", ours[0], theirs[0], x.dtype)
    compare(f"{name}: gradient of x", ours[1], theirs[1], x.dtype)
    for one, other in zip(ours[2], theirs[2], strict=True):
        compare(f"{name}: gradient of a stage", one.sum(0), other.sum(0), x.dtype)
