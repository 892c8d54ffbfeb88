"""Flops that torch's FlopCounterMode counts: the products of our operators are not invisible."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from boft_ops import BOFTLinear, butterfly_matmul, cayley
from boft_ops._runtime import backend as backends
from boft_ops._runtime.namespace import NS, PACKAGE
from boft_ops._runtime.workload import Workload

ELEMENTWISE = {"scale", "scale_backward"}


def count(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("rows", [8, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_counts_its_products(dtype, rows):
    d, n = 96, 48
    layer = BOFTLinear(d, n, block_size=8, n_factors=2, dtype=dtype)
    torch.nn.init.normal_(layer.skew, std=0.1)
    x = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    product, rotation = 2 * rows * d * n, 2 * rows * d * 16
    blocks = 2 * 12 * 2 * 8**3 + 2 * 12 * 8 * 16 * 8  # Cayley transform and composition
    forward = count(layer, x)
    assert product + rotation <= forward <= product + rotation + blocks
    step = count(lambda: layer(x).sum().backward())
    assert 2 * product + 3 * rotation <= step <= 2 * product + 3 * rotation + 5 * blocks
    backward = count(layer(x).sum().backward)  # the forward was not watched
    assert product + 2 * rotation <= backward <= product + 2 * rotation + 5 * blocks


@pytest.mark.parametrize("name", sorted(backends.ops().keys() - ELEMENTWISE))
def test_every_operator_has_a_formula(name):
    from torch.utils import flop_counter

    op = backends.ops()[name]
    assert op.raw.overloadpacket in flop_counter.flop_registry
    workload = Workload(rows=8, d=64, n=32, n_factors=2, block_size=8)
    for arguments in op.samples(workload):
        with torch.no_grad():
            assert count(op.raw, *arguments) > 0


def test_numbers_of_single_operators():
    assert count(cayley, torch.randn(5, 28)) == 5 * 2 * 8**3
    blocks = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert count(butterfly_matmul, torch.randn(100, 32), blocks) == 2 * 100 * 32 * 8


@pytest.mark.parametrize("first", [PACKAGE, "torch.utils.flop_counter"])
def test_either_import_may_come_first(first):
    """The package does not import the counter, which would take longer than the package."""
    second = {PACKAGE: "torch.utils.flop_counter"}.get(first, PACKAGE)
    program = f"""
import sys
import {first}
assert "torch.utils.flop_counter" in sys.modules or {first == PACKAGE}
import {second}
import torch
from torch.utils.flop_counter import flop_registry
assert torch.ops.{NS}.rotate in flop_registry
"""
    subprocess.run([sys.executable, "-c", program], check=True)
