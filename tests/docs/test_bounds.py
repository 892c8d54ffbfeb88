"""The bounds that docs/kernels.md gives for the kernels are those of the code."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from boft_ops._runtime import native
from boft_ops._runtime.checks import packed_size
from boft_ops.ops.cayley import cayley_backward, cayley_forward
from boft_ops.ops.compose import compose_forward
from boft_ops.ops.rotate import rotate_backward, rotate_rows
from boft_ops.ops.rotate_indexed import rotate_indexed_rows
from boft_ops.ops.rotated_linear import rotated_linear_forward
from boft_ops.ops.stage_from_skew import is_one_small_stage
from boft_ops.ops.stages import plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
SIZES = (16, 32, 64, 128, 256, 512)  # blocks and stages


def tensor(*shape):
    return torch.empty(shape, device="meta")


def skew(size):
    return (tensor(1, packed_size(size)),)


def blocks(size):
    return tensor(1, size, size), None, tensor(1, size, size)


def factors(size):
    """Return the log2(size / 4) factors of a stage, with blocks of 8."""
    return tensor((size // 4).bit_length() - 1, 1, 8, 8), 0


def rows(size):
    return tensor(64, 512), tensor(1, size, size), 1, 1, False


def gradients(size):
    return tensor(64, 512), tensor(64, 512), tensor(1, size, size), 1, 1, False, 1


def layer(size):
    return tensor(64, 512), tensor(512, 512), tensor(1, size, size)


@cache
def cells():
    """The cells of the page's table of kernels, by the first operator of their row."""
    table = PAGE.read_text().split("## Which kernel runs an operator")[1].split("\n\n")[1]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {re.match(r"`(\w+)`", line[0])[1]: line[1:] for line in lines}


@pytest.mark.parametrize(
    ("row", "backend", "pattern", "op", "arguments"),
    [
        ("cayley", "cpu", r"forward to b = (\d+)", cayley_forward, skew),
        ("cayley", "cpu", r"backward to (\d+)", cayley_backward, blocks),
        ("cayley", "triton", r"to b = (\d+)", cayley_forward, skew),
        ("compose", "cpu", r"stages to (\d+)", compose_forward, factors),
        ("compose", "triton", r"stages to (\d+)", compose_forward, factors),
        ("rotate", "cpu", r"stages to (\d+)", rotate_rows, rows),
        ("rotate", "triton", r"stages to (\d+)", rotate_rows, rows),
        ("rotate", "cpu", r"stages to (\d+)", rotate_backward, gradients),
        ("rotate", "triton", r"stages to (\d+)", rotate_backward, gradients),
        ("rotate_indexed", "cpu", r"stages to (\d+)", rotate_indexed_rows, rows),
        ("rotate_indexed", "triton", r"stages to (\d+)", rotate_indexed_rows, rows),
        ("rotated_linear", "triton", r"stages to (\d+)", rotated_linear_forward, layer),
    ],
)
def test_the_largest_size(row, backend, pattern, op, arguments):
    (bound,) = re.findall(pattern, cells()[row][("cpu", "triton").index(backend)])
    supports = op.kernels[backend].supports
    assert max(size for size in SIZES if supports(*arguments(size))) == int(bound)


def test_the_fused_product_takes_what_divides_its_columns(monkeypatch):
    (multiple,) = re.findall(r"whose size divides (\d+)", cells()["rotated_linear"][0])
    monkeypatch.setattr(native, "isa", "avx2")
    supports = rotated_linear_forward.kernels["cpu"].supports
    taken = {size for size in range(1, 257) if supports(*layer(size))}
    assert taken == {size for size in range(1, 257) if int(multiple) % size == 0}


def test_the_largest_stage_that_is_made_in_one_launch():
    bounds = [
        int(re.search(r"one stage to (\d+)", cell)[1]) for cell in cells()["stage_from_skew"][:2]
    ]
    for device, bound in zip(("cpu", "cuda"), bounds, strict=True):
        sizes = [8 << m for m in range(6) if is_one_small_stage(plan(m + 1, 8, device), "exact")]
        assert max(sizes) == bound
