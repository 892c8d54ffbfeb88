"""Comparison of a layer's other operators: composing factors into stages, scaling outputs.

They are timed without autograd, as a layer calls them.
"""

from __future__ import annotations

import torch
from correctness import compare
from gpu_operators import forced, rivals
from interleave import Contestant
from sizes import BLOCK, COMPOSED, Sizes

from boft_ops import cayley
from boft_ops._runtime import backend as backends
from boft_ops.ops.compose import compose_backward, compose_forward
from boft_ops.ops.scale import scale_backward, scale_forward


def compose_contest(sizes: Sizes, backward: bool, device: torch.device) -> list[Contestant]:
    """Compare ways to compose ``COMPOSED`` factors into stages, in float32 in every run."""
    skew = 0.1 * torch.randn(COMPOSED, sizes.composed, BLOCK * (BLOCK - 1) // 2)
    with torch.no_grad():
        factors = cayley(skew.to(device))
        stage = compose_forward(factors, 0)
    if not backward:
        return _contest("compose", compose_forward, (factors, 0))
    return _contest("compose", compose_backward, (factors, torch.randn_like(stage)[None], 0))


def scale_contest(
    sizes: Sizes, backward: bool, device: torch.device, dtype: torch.dtype
) -> list[Contestant]:
    """Compare y = scale * (x - bias) + bias for rows of outputs, or its gradients."""
    x, grad = (torch.randn(sizes.rows, sizes.features).to(device, dtype) for _ in range(2))
    compute_dtype = torch.promote_types(dtype, torch.float32)
    scale = 1 + 0.1 * torch.randn(sizes.features).to(device, compute_dtype)
    bias = torch.randn(sizes.features).to(device, dtype)
    op, arguments = scale_forward, (x, scale, bias, bias)
    if backward:
        op, arguments = scale_backward, (grad, x, scale, bias.to(compute_dtype))
    return [Contestant("clone", lambda: x.clone()), *_contest("scale", op, arguments)]


def _contest(name: str, op: backends.Op, arguments: tuple) -> list[Contestant]:
    """Build the contestants of an operator, and check their results against float64.

    They are the default backend, the reference in plain torch, and the backends in ``rivals``.
    """

    def run() -> object:
        with torch.no_grad():  # with gradients on, ops run their reference
            return op(*arguments)

    contestants = [Contestant(name, run)]
    for backend in ("reference", *rivals()):
        contestants.append(Contestant(f"{name}-{backend}", forced(backend, run)))
    arguments64 = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    truth = _tuple(op.reference(*arguments64))
    dtype = arguments[0].dtype
    for contestant in contestants:
        for i, (one, other) in enumerate(zip(_tuple(contestant.run()), truth, strict=True)):
            compare(f"{contestant.name}: result {i}", one, other, dtype)
    return contestants


def _tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def names(op: str) -> tuple[str, ...]:
    """List the contestants of an operator, in their order."""
    return op, f"{op}-reference", *(f"{op}-{backend}" for backend in rivals())
