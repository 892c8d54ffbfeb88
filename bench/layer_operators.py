"""The operators beside a layer's rotation: factors composed into stages, the scale of outputs.

As on a GPU, without autograd: they are timed as a layer calls them.
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
    """The stages of a butterfly of ``COMPOSED`` factors, in float32 in every run."""
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
    """y = scale * (x - bias) + bias for the rows of a layer's outputs, and its gradients."""
    x, grad = (torch.randn(sizes.rows, sizes.features).to(device, dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    scale = 1 + 0.1 * torch.randn(sizes.features).to(device, wide)
    bias = torch.randn(sizes.features).to(device, dtype)
    op, arguments = scale_forward, (x, scale, bias, bias)
    if backward:
        op, arguments = scale_backward, (grad, x, scale, bias.to(wide))
    return [Contestant("clone", lambda: x.clone()), *_contest("scale", op, arguments)]


def _contest(name: str, op: backends.Op, arguments: tuple) -> list[Contestant]:
    """What serves the call, plain torch, and the other set of kernels where there are two."""

    def run() -> object:
        with torch.no_grad():  # where gradients are on, ops run their reference
            return op(*arguments)

    contestants = [Contestant(name, run)]
    for backend in ("reference", *rivals()):
        contestants.append(Contestant(f"{name}-{backend}", forced(backend, run)))
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    truth = _tuple(op.reference(*wide))
    dtype = arguments[0].dtype
    for contestant in contestants:
        for i, (one, other) in enumerate(zip(_tuple(contestant.run()), truth, strict=True)):
            compare(f"{contestant.name}: result {i}", one, other, dtype)
    return contestants


def _tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def names(op: str) -> tuple[str, ...]:
    """The contestants of an operator, in their order."""
    return op, f"{op}-reference", *(f"{op}-{backend}" for backend in rivals())
