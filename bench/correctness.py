"""Checks of a layer's results, made before the layer is timed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from boft_ops import BOFTLinear

# Limits of relative errors in the Frobenius norm, with room for sums in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-10}


def check_merged(layer: BOFTLinear, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Compare the output and the input gradient of a layer with those of its merged weight.

    Raises:
        AssertionError: they differ.
    """
    weight = layer.merged_weight()
    x = x.detach().requires_grad_(True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    compare("output", y, F.linear(x, weight, layer.bias), x.dtype)
    compare("gradient of x", dx, grad @ weight, x.dtype)


def check_gradients(
    m: int, b: int, device: torch.device, dtype: torch.dtype, scale: bool = True
) -> None:
    """Compare all gradients of a small layer with autograd through dense float64 matrices.

    The layer has 256 features, and at most as many factors as it takes to mix all of them.

    Raises:
        AssertionError: they differ.
    """
    d, n, tokens = 256, 48, 97  # enough rows for the kernels that compute a whole layer
    m = min(m, (d // b).bit_length())
    torch.manual_seed(3)
    layer = BOFTLinear(d, n, n_factors=m, block_size=b, scale=scale, device=device, dtype=dtype)
    names = ("skew", "scale_offset") if scale else ("skew",)
    with torch.no_grad():
        layer.skew.normal_(0, 0.3)
        if scale:
            layer.scale_offset.normal_(0, 0.3)
    x = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, n, device=device, dtype=dtype)
    y = layer(x)
    trained = [getattr(layer, name) for name in names]
    ours = torch.autograd.grad(y, (x, *trained), grad)

    leaves = [t.detach().cpu().double().requires_grad_(True) for t in (x, *trained)]
    x64, skew64, offset64 = leaves if scale else (*leaves, 0.0)
    weight, bias = layer.frozen_weight.cpu().double(), layer.bias.cpu().double()
    y64 = (1 + offset64) * (x64 @ dense_rotation(skew64, b) @ weight.T) + bias
    theirs = torch.autograd.grad(y64, leaves, grad.cpu().double())
    compare("output", y, y64, dtype)
    for name, one, other in zip(("x", *names), ours, theirs, strict=True):
        compare(f"gradient of {name}", one, other, dtype)


def dense_rotation(skew: torch.Tensor, b: int) -> torch.Tensor:
    """Compute R = C_{m-1} ... C_0 from its definition, element by element (docs/butterfly.md)."""
    m, n_blocks, _ = skew.shape
    d, r = n_blocks * b, max(b // 2, 1)
    rows, columns = torch.triu_indices(b, b, 1)
    upper = skew.new_zeros(m, n_blocks, b, b).index_put(
        (torch.arange(m)[:, None, None], torch.arange(n_blocks)[:, None], rows, columns), skew
    )
    q = upper - upper.mT
    eye = torch.eye(b, dtype=q.dtype)
    blocks = torch.linalg.solve(eye - q, eye + q)
    rotation = torch.eye(d, dtype=q.dtype)
    for i in range(m):
        features = torch.tensor([[_feature(i, k, e, r) for e in range(b)] for k in range(n_blocks)])
        index = features[:, :, None], features[:, None, :]
        rotation = q.new_zeros(d, d).index_put(index, blocks[i]) @ rotation
    return rotation


def _feature(i: int, k: int, e: int, r: int) -> int:
    """Number of the feature that is element e of block k of factor i."""
    group, chunk = divmod(k, 2**i)
    return (group * 2 ** (i + 1) + chunk + e // r * 2**i) * r + e % r


def compare(
    name: str, actual: torch.Tensor, expected: torch.Tensor, computed_in: torch.dtype
) -> None:
    """Raise AssertionError if the relative error is larger than rounding in a dtype explains."""
    tolerance = TOLERANCE[computed_in]
    expected = expected.detach().double()
    actual = actual.detach().to(expected.device).double()
    error = float((actual - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error {error:.2g}, expected at most {tolerance:g}")
