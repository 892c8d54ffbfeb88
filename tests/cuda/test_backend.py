"""The CUDA kernels as a backend: chosen by force, and what a GPU alone can tell."""

import os
import re
import subprocess
import sys

import pytest
import torch

from boft_ops import boft_linear
from boft_ops._runtime import backend as backends
from boft_ops._runtime import native, paths
from boft_ops._runtime.tuned import Choice
from boft_ops.ops.stage_from_skew import SMALL_BLOCKS


def gpu(test):
    """For a GPU, and a native library with CUDA kernels."""
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    without = pytest.mark.skipif(not native.kernels("cuda"), reason="no CUDA kernels")
    return pytest.mark.gpu(absent(without(test)))


@pytest.mark.parametrize(
    ("triton", "forced", "expected"),
    [
        (True, None, "triton"),
        (False, None, "cuda"),
        (True, "cuda", "cuda"),
        (True, "triton", "triton"),
        (True, "reference", "reference"),
    ],
)
def test_what_the_raw_op_runs_on_cuda_tensors(monkeypatch, triton, forced, expected):
    op, ran = backends.ops()["cayley"], []
    monkeypatch.setattr(op, "unavailable", {} if triton else {"triton": "not installed"})
    monkeypatch.setattr(
        op, "defaults", {"cpu": Choice("triton" if triton else "cuda")}
    )  # the tensors'
    monkeypatch.setattr(op, "reference", lambda *_: ran.append("reference"))
    monkeypatch.setattr(op, "launcher", lambda: lambda *_: ran.append("triton"))
    monkeypatch.setattr(op, "native", lambda: lambda *_: ran.append("cuda"))
    with backends.force(forced):
        op._on_cuda(torch.zeros(2, 28), None)
        op._on_cuda(torch.zeros(2, 65 * 32), None)  # larger than any kernel takes
    assert ran == [expected, "reference"]


@pytest.mark.parametrize(
    ("name", "shapes", "dtype", "preferred"),
    [
        ("stage_from_skew", [(2, 8, 28)], torch.float32, True),
        ("stage_from_skew", [(4, 8, 28)], torch.float32, True),
        ("stage_from_skew", [(6, 32, 1)], torch.float32, True),
        ("stage_from_skew", [(2, 8, 28)], torch.float64, False),
        ("stage_from_skew", [(2, 8, 28)], torch.bfloat16, False),
        ("stage_from_skew", [(2, 8, 15)], torch.float32, False),  # blocks of 6
        ("stage_from_skew", [(2, 8, 120)], torch.float32, False),  # blocks of 16
        ("stage_from_skew", [(5, 16, 28)], torch.float32, False),  # a stage of 128
        ("stage_from_skew_backward", [(2, 8, 8, 8), (3, 4, 16, 16)], torch.float32, True),
        ("stage_from_skew_backward", [(2, 8, 8, 8), (3, 4, 16, 16)], torch.float64, False),
        ("stage_from_skew_backward", [(2, 8, 6, 6), (3, 4, 12, 12)], torch.float32, False),
        ("cayley", [(2, 28)], torch.bfloat16, True),
        ("cayley", [(2, 120)], torch.float32, False),
    ],
)
def test_calls_for_which_the_cuda_kernel_comes_before_triton(name, shapes, dtype, preferred):
    first, *rest = (torch.empty(shape, dtype=dtype) for shape in shapes)
    kernel = backends.ops()[name].kernels["cuda"]
    assert kernel.preferred(first, None, *rest) is preferred
    assert kernel.supports(first, None, *rest) or not preferred


def test_small_blocks_are_those_of_the_kernels():
    text = (paths.csrc() / "cuda" / "cayley_small.cuh").read_text()
    (listed,) = re.findall(r"define BOFT_SMALL_BLOCKS\(X\) (.*)", text)
    assert tuple(map(int, re.findall(r"\d+", listed))) == SMALL_BLOCKS


def test_the_ops_with_a_triton_kernel_are_those_with_a_cuda_kernel():
    text = (paths.csrc() / "binding_ops.h").read_text()
    listed = text[text.index("#define BOFT_CUDA_OPS") :]
    triton = {name for name, op in backends.ops().items() if "triton" in op.kernels}
    triton |= {"linear_from_skew", "linear_from_skew_backward"}  # the launches of several others
    cuda = {name for name in backends.ops() if f"OP({name})" in listed}
    assert cuda == triton


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_on_the_forced_backend(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = torch.randn(2, 96, 64, device="cuda", generator=generator).to(dtype)
    arguments = [
        x.requires_grad_(),
        weight,
        (0.2 * torch.randn(2, 8, 28, device="cuda", generator=generator)).requires_grad_(),
        torch.ones(96, device="cuda").requires_grad_(),
    ]
    results = []
    for backend in ("cuda", "reference"):
        with backends.force(backend):
            y = boft_linear(*arguments)
            trained = [a for a in arguments if a.requires_grad]
            results.append([y, *torch.autograd.grad(y.float().square().sum(), trained)])
    for got, want in zip(*results, strict=True):
        bound = 2e-2 if dtype != torch.float32 else 1e-4
        assert (got - want).norm() <= bound * want.norm()


@gpu
def test_streams_and_large_offsets():
    """On torch's current stream; and rows beyond 2^31 elements."""
    x = torch.randn(1 << 18, 64, device="cuda").bfloat16()
    stage = torch.eye(16, device="cuda").repeat(4, 1, 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), backends.force("cuda"):
        y = backends.ops()["rotate"](x, stage, 8, 1, False)
    stream.synchronize()
    assert torch.equal(x, y)
    if torch.cuda.mem_get_info()[0] > 20 << 30:
        x = torch.ones((1 << 25) + 3, 72, device="cuda", dtype=torch.bfloat16)
        x[-1] = 2
        stage = torch.eye(8, device="cuda").repeat(9, 1, 1)
        with backends.force("cuda"), torch.no_grad():
            assert torch.equal(backends.ops()["rotate"](x, stage, 4, 1, False), x)


@gpu
def test_the_first_result_comes_within_a_second_of_the_import():
    """Compiled ahead of time: nothing is compiled at run time. CUDA's own start is not counted."""
    code = """
import time, torch
torch.zeros(1, device="cuda")
start = time.perf_counter()
import boft_ops
boft_ops.cayley(torch.zeros(4, 28, device="cuda")).sum().item()
print(time.perf_counter() - start)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BOFT_OPS_BACKEND": "cuda"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 1.0
