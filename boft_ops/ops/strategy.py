"""How a rotated layer comes about: decided once for every kind of call, as each takes host time.

Ways, with the rows x and the frozen weight W: "fused", one product of its own; "launched", other
operators in one call each way; "composed" of them one by one; "weight side", where it is W that
goes through the stages.

``known`` comes before the matrices of the stages are made, ``decide`` after: what a kernel takes
depends on them.
"""

from __future__ import annotations

import torch

from .._runtime import backend, checks, tuned
from .fused_linear import linear_forward
from .planner import layer_plan
from .rotate_linear import rotate_linear_forward, same_backend
from .stage_from_skew import ALL_GIVEN, ORTHOGONAL
from .stages import Stage

_decisions: dict[tuple, tuple[tuple[Stage, ...], str]] = {}  # kind of call -> stages, way
_generation = 0  # of the measurements that they rest on


def known(
    rows: torch.Tensor, weight: torch.Tensor, skew: torch.Tensor, method: str
) -> tuple[tuple | None, tuple[Stage, ...], str | None]:
    """The kind of a layer's call, its stages, and the way to it; None: that is for ``decide``."""
    global _generation
    if _generation != tuned.generation:
        _decisions.clear()
        _generation = tuned.generation
    kind = _kind(rows, weight, skew, method)
    decision = None if kind is None else _decisions.get(kind)
    if decision is not None:
        return kind, *decision
    given = method in ALL_GIVEN
    b = skew.shape[-1] if given else checks.block_size_from_packed("skew", skew.shape[-1])
    # the gradients of a rotated W take R to be orthogonal
    outputs = weight.shape[0] if method in ORTHOGONAL else None
    stages, weight_side = layer_plan(rows, 1 if given else len(skew), b, outputs)
    return kind, stages, "weight side" if weight_side else None


def decide(
    kind: tuple | None,
    rows: torch.Tensor,
    weight: torch.Tensor,
    stages: tuple[Stage, ...],
    matrices: list[torch.Tensor],
) -> str:
    """The way to a layer where x goes through the stages, of which these are the matrices."""
    # an exported graph is for any number of rows, a compiled one is made again for few
    fused = not torch.compiler.is_exporting()
    # whoever looks at what is called, as flop counters do, is to see the products
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    launched = len(matrices) == 1 and not watched
    if fused and linear_forward.has_kernel(rows, weight, matrices[0]):
        way = "fused"
    elif (
        launched
        and rotate_linear_forward.has_kernel(rows, weight, matrices[0])
        and same_backend(rows, weight, matrices[0])
    ):
        way = "launched"
    else:
        way = "composed"
    if kind is not None:
        if len(_decisions) >= tuned.MEMO:  # batches of ever new sizes must not fill the memory
            _decisions.clear()
        _decisions[kind] = stages, way
    return way


def _kind(
    rows: torch.Tensor, weight: torch.Tensor, skew: torch.Tensor, method: str
) -> tuple | None:
    """All that decides, but for measurements; None: not to be remembered, as in a graph that is
    being made, or where the next call may measure something."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if type(rows) is not torch.Tensor:
        return None
    shapes = rows.shape, weight.shape, skew.shape
    return backend.forced(), rows.device, rows.dtype, skew.dtype, *shapes, method


def is_rotated(skew: torch.Tensor) -> bool:
    """Whether R may differ from the identity: if not, the layer is to be torch's own bit for bit.

    A look at the data, on a CPU and not in a compiled graph.
    """
    if torch.compiler.is_compiling() or not skew.is_cpu:
        return True
    try:
        return bool(skew.detach().count_nonzero())
    except RuntimeError:  # no data to look at: FakeTensorMode, make_fx
        return True
