"""Which calls share a measurement (docs/tuning.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .checks import block_size_from_packed


class Classes(NamedTuple):
    """How an operator's arguments become a shape class.

    Attributes:
        structure: names of what has to agree exactly.
        sizes: names of what is to be near.
        of: arguments -> (structure, sizes).
    """

    structure: tuple[str, ...]
    sizes: tuple[str, ...]
    of: Callable[..., tuple[tuple, tuple]]


def _packed(skew: torch.Tensor) -> int:
    return block_size_from_packed("skew", skew.shape[-1])


def _factors(blocks: torch.Tensor, *_: object) -> tuple[tuple, tuple]:
    return (blocks.shape[0], blocks.shape[-1]), (blocks.shape[1],)


def _layer(x: torch.Tensor, n_factors: int, block_size: int, outputs: int | None):
    features = x.shape[-1]
    rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
    return (n_factors, block_size), (rows, features, outputs)


_BUTTERFLY = ("n_factors", "block_size")
_STAGE, _ROWS = ("size", "chunk", "stride"), ("rows", "features")
_LINEAR = Classes(
    ("size",),
    ("rows", "inputs", "outputs"),
    lambda x, weight, stage, *_: ((stage.shape[-1],), (*x.shape, weight.shape[0])),
)
CLASSES = {
    "cayley": Classes(
        ("block_size",),
        ("blocks",),
        lambda skew, _: ((_packed(skew),), (math.prod(skew.shape[:-1]),)),
    ),
    "cayley_backward": Classes(
        ("block_size",), ("blocks",), lambda r, *_: (r.shape[-1:], (math.prod(r.shape[:-2]),))
    ),
    "compose": Classes(_BUTTERFLY, ("blocks",), _factors),
    "compose_backward": Classes(_BUTTERFLY, ("blocks",), _factors),
    "stage_from_skew": Classes(
        _BUTTERFLY,
        ("blocks",),
        lambda skew, _: ((skew.shape[0], _packed(skew)), (skew.shape[1],)),
    ),
    "stage_from_skew_backward": Classes(_BUTTERFLY, ("blocks",), _factors),
    "rotate": Classes(
        _STAGE,
        _ROWS,
        lambda x, stage, chunk, stride, _: ((stage.shape[-1], chunk, stride), x.shape),
    ),
    "rotate_backward": Classes(
        _STAGE,
        _ROWS,
        lambda grad, x, stage, chunk, stride, *_: ((stage.shape[-1], chunk, stride), x.shape),
    ),
    "rotate_indexed": Classes(
        _STAGE,
        _ROWS,
        lambda x, stages, _, chunk, stride, *__: ((stages.shape[-1], chunk, stride), x.shape),
    ),
    "gram": Classes(
        _STAGE, _ROWS, lambda x, grad, size, chunk, stride, _: ((size, chunk, stride), x.shape)
    ),
    "scale": Classes((), _ROWS, lambda x, *_: ((), x.shape)),
    "scale_backward": Classes((), _ROWS, lambda grad, *_: ((), grad.shape)),
    "rotated_linear": _LINEAR,
    # not operators: stages and side of a layer, and what the C++ kernels have for the whole process
    "plan": Classes(_BUTTERFLY, (*_ROWS, "outputs"), _layer),
    "grain": Classes((), (), tuple),
    "blocking": Classes((), (), tuple),
}
# These go where their forward goes, with which they were measured; the gradient is their first
# argument, the forward's follow.
BACKWARD_OF = {"rotated_linear_backward": "rotated_linear"}
