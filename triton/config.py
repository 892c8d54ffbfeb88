"""Tiles of the Triton kernels that make the stages: a frozen config per kernel, chosen purely.

``config_for`` depends on the structure of the operands alone: not on the device, the dtype or a
measurement. Block sizes are padded to powers of two, with the group sizes that follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

MAX_BLOCK_SIZE = 64
MAX_SIZE = 256  # of a composed stage
MAX_ROTATION = 64  # of a stage whose groups stay in one program

Config = Any  # one of the tuples below


class CayleyConfig(NamedTuple):
    """G blocks of B x B per program."""

    B: int
    G: int
    num_warps: int


class ComposeConfig(NamedTuple):
    """U units (halves of blocks) of B x T per program: B rows of a block, T inner features."""

    B: int
    T: int
    U: int
    num_warps: int


class RotationConfig(NamedTuple):
    """G groups per program, of blocks padded to B x B, C of which are transformed at a time."""

    B: int
    G: int
    C: int
    num_warps: int


# (op, number of the device, dtype, structure, sizes) -> fields of a config that were measured, or
# None. The package sets it when it first launches a kernel; launches are made with what it says
# then, until launch.forget().
measured: Callable[..., dict[str, int] | None] | None = None


def tuned(
    config: Config, op: str, device: int, dtype: Any, structure: tuple, sizes: tuple
) -> Config:
    """The config to launch with: the one place where a measurement overrides ``config_for``."""
    found = None if measured is None else measured(op, device, dtype, structure, sizes)
    return config if found is None else config._replace(**found)


def fields_of(op: str) -> frozenset[str]:
    """What a measurement may say of the tile of an op's kernel."""
    from . import config_rotate, config_scale

    kinds = {"cayley": CayleyConfig, "cayley_backward": CayleyConfig}
    kinds |= dict.fromkeys(("stage_from_skew", "stage_from_skew_backward"), RotationConfig)
    kinds |= dict.fromkeys(
        ("rotate", "rotate_indexed", "rotate_backward", "gram"), config_rotate.Tile
    )
    kinds |= dict.fromkeys(("scale", "scale_backward"), config_scale.ScaleConfig)
    return frozenset(kinds[op]._fields) if op in kinds else frozenset()


@cache
def config_for(op: str, **structure: int) -> Config:
    """The config of ``op``: "cayley", "compose", "stage_from_skew", or a backward of those two.

    The backward of compose shares its config. ``structure``: b for cayley; b and s, the inner
    group's features, for compose; m and b for rotation.
    """
    return _CHOICES[op](**structure)


def _cayley(b: int) -> CayleyConfig:
    # Up to B = 8 one warp, whose reductions are shuffles; above, the tile is spread over more warps
    # so that float64 stays in registers.
    B = _padded(b)
    # Of B = 8 in 16: of those tried on an H200 the fastest, 1.7 times as fast as in 2.
    G = 16 if B == 8 else max(1, 16 // B)
    return CayleyConfig(B, G, num_warps={16: 2, 32: 4, 64: 8}.get(B, 1))


def _cayley_backward(b: int) -> CayleyConfig:
    # B = 8 in 8, 2.5 times as fast as in 2 on an H200; 16 are faster there, and spill elsewhere.
    forward = _cayley(b)
    return forward._replace(G=8) if forward.B == 8 else forward


def _compose(b: int, s: int) -> ComposeConfig:
    # 4 numbers per thread, more only where a unit alone has more
    B = _padded(b)
    T = B * (s // b)
    num_warps = min(8, max(1, B * T // 128))
    return ComposeConfig(B, T, U=max(1, 128 * num_warps // (B * T)), num_warps=num_warps)


def _rotation(m: int, b: int) -> RotationConfig:
    # Up to groups of 16 x 16 one warp; 64 x 64 over 8 warps are 16 numbers per thread. Above one
    # warp the Cayley transform, in float64, takes as many blocks at a time as there are threads.
    B = _padded(b)
    size = B << (m - 1)
    G = max(1, 256 // size**2)
    C = min(G << (m - 1), max(1, (128 if size == 32 else 256) // B**2))
    return RotationConfig(B, G, C, num_warps={32: 4, 64: 8}.get(size, 1))


def _rotation_backward(m: int, b: int) -> RotationConfig:
    # More warps where a few numbers would spill: many small blocks, or large blocks in float64.
    forward = _rotation(m, b)
    if forward.num_warps == 8 and forward.B <= 8:
        return forward._replace(num_warps=16)
    return forward._replace(num_warps=8) if forward.B == 32 else forward


def _padded(b: int) -> int:
    return max(2, 1 << (b - 1).bit_length())


_CHOICES = {
    "cayley": _cayley,
    "cayley_backward": _cayley_backward,
    "compose": _compose,
    "stage_from_skew": _rotation,
    "stage_from_skew_backward": _rotation_backward,
}


def structures(op: str) -> Iterator[dict[str, int]]:
    """Every structure that ``op`` takes."""
    sizes = range(1, MAX_BLOCK_SIZE + 1)
    if op in ("cayley", "cayley_backward"):
        yield from ({"b": b} for b in sizes)
    elif op == "compose":
        for b in sizes[1::2]:
            s = b
            while 2 * s <= MAX_SIZE:
                yield {"b": b, "s": s}
                s *= 2
    else:
        for b in sizes:
            yield {"m": 1, "b": b}
            m = 2
            while b % 2 == 0 and b << (m - 1) <= MAX_ROTATION:
                yield {"m": m, "b": b}
                m += 1


def reachable(op: str) -> Iterator[tuple[dict[str, int], Config]]:
    """Every config that ``config_for(op)`` can return, with a structure that leads to it.

    Rotation's code depends on m beyond its config: every m. And for each the least b, padded, as
    well as the power of two itself, without masks.
    """
    seen = set()
    for structure in structures(op):
        config = config_for(op, **structure)
        key = config, structure.get("m"), structure["b"] == config.B
        if key not in seen:
            seen.add(key)
            yield structure, config


class Case(NamedTuple):
    """What offline compilation needs to know of one kernel with one config.

    Attributes:
        kernel: ``"module:kernel"`` under triton/.
        constants: its constexpr arguments; a pointer that is None is one.
        pointers: the element type of each other pointer; remaining arguments are i32.
        everywhere: for every target. Otherwise for one: what differs from a case for every target
            in its masks or its loads and stores alone.
    """

    kernel: str
    constants: dict[str, Any]
    pointers: dict[str, str]
    num_warps: int
    num_stages: int
    everywhere: bool = True


# Each kernel: what chooses its config, the dtypes of its parameters, and its pointers with their
# types, "" being that of the parameters and "wide" at least float32.
_KERNELS = {
    "cayley:cayley_kernel": (
        "cayley",
        ("fp32", "fp64", "bf16", "fp16"),
        {"skew_ptr": "", "drop_ptr": "i1", "blocks_ptr": ""},
    ),
    "cayley:cayley_backward_kernel": (
        "cayley_backward",
        ("fp32", "fp64", "bf16", "fp16"),
        {"blocks_ptr": "", "drop_ptr": "i1", "grad_ptr": "", "skew_grad_ptr": ""},
    ),
    "compose:compose_kernel": (
        "compose",
        ("fp32", "fp64"),
        dict.fromkeys(("factor_ptr", "inner_ptr", "outer_ptr"), ""),
    ),
    "compose:compose_backward_kernel": (
        "compose",
        ("fp32", "fp64"),
        dict.fromkeys(
            ("factor_ptr", "inner_ptr", "grad_ptr", "factor_grad_ptr", "inner_grad_ptr"), ""
        ),
    ),
    "rotation:rotation_kernel": (
        "stage_from_skew",
        ("fp32", "fp64", "bf16"),
        {
            "skew_ptr": "",
            "drop_ptr": "i1",
            **dict.fromkeys(("blocks_ptr", "scratch_ptr", "stage_ptr"), "wide"),
        },
    ),
    "rotation:rotation_backward_kernel": (
        "stage_from_skew_backward",
        ("fp32", "fp64"),
        {
            "drop_ptr": "i1",
            **dict.fromkeys(("blocks_ptr", "grad_ptr", "scratch_ptr", "skew_grad_ptr"), ""),
        },
    ),
}


def compile_cases() -> Iterator[Case]:
    """Every kernel with every reachable config.

    Powers of two without a dropout mask in every dtype; padded blocks with a mask, where there can
    be one, in float32.
    """
    for kernel, (op, dtypes, pointers) in _KERNELS.items():
        for structure, config in reachable(op):
            exact = structure["b"] == config.B
            constants = structure | config._asdict()
            num_warps = constants.pop("num_warps")
            if exact and "drop_ptr" in pointers:
                constants["drop_ptr"] = None
            for dtype in dtypes if exact else dtypes[:1]:
                wide = "fp64" if dtype == "fp64" else "fp32"
                types = {
                    name: {"": dtype, "wide": wide}.get(kind, kind)
                    for name, kind in pointers.items()
                    if name not in constants
                }
                # num_stages: nothing here is pipelined
                yield Case(kernel, constants, types, num_warps, 1, exact and dtype == "fp32")
