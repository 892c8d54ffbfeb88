"""Comparison of operators at the sizes of a GPU: the rotations of whole models, and many rows.

Only the sizes are specific to a GPU; the code runs on any device.
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
    """Compare ways to make all rotations of a model, from one skew a layer and from one tensor.

    All skews are in float32.
    """
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
    """Backends to measure besides the default one: CUDA C++ if Triton is available too."""
    return ("cuda",) if native.kernels("cuda") and backends.has_triton() else ()


def forced(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that makes the same call on one backend."""

    def on_backend() -> object:
        with backends.force(backend):
            return run()

    return on_backend


def rotation_contest(
    sizes: Sizes, backward: bool, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """Compare passes over the rows, without autograd and without the time to make the stages.

    Autograd is left out because one of its steps takes Python longer than a GPU takes to copy
    operands of this size.
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
        with torch.no_grad():  # with gradients on, ops run their reference
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
    """Compare the rows, their gradient and the gradients of the stages with float64."""
    y = _forward(x, matrices, stages)()
    dx, d_stages = _backward(grad, x, matrices, stages)()
    matrices64 = [matrix.double() for matrix in matrices]
    with backends.force("reference"):
        y64 = _forward(x.double(), matrices64, stages)()
        dx64, d_stages64 = _backward(grad.double(), x.double(), matrices64, stages)()
    compare(f"{name}: output", y, y64, x.dtype)
    compare(f"{name}: gradient of x", dx, dx64, x.dtype)
    for one, other in zip(d_stages, d_stages64, strict=True):
        compare(f"{name}: gradient of a stage", one.sum(0), other.sum(0), x.dtype)
