"""Arguments of boft_linear for a small layer, which fits every m up to 3."""

import torch

N, D_IN, D_OUT = 6, 32, 16


def operands(side="in", m=2, b=4, dtype=torch.float64, std=0.3):
    """Make random tensors by the names of their arguments."""
    features = D_IN if side == "in" else D_OUT
    return {
        "x": torch.randn(N, D_IN, dtype=dtype),
        "weight": torch.randn(D_OUT, D_IN, dtype=dtype),
        "skew": std * torch.randn(m, features // b, b * (b - 1) // 2, dtype=dtype),
        "scale": torch.randn(D_OUT, dtype=dtype),
        "bias": torch.randn(D_OUT, dtype=dtype),
    }


def call(function, tensors, **options):
    """Call a function with the tensors in the order of its arguments, missing ones as None."""
    names = ("x", "weight", "skew", "scale", "bias")
    return function(*(tensors.get(n) for n in names), **options)
