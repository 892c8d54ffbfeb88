"""The choice of a backend: what serves where, forcing one, and saying why not."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from boft_ops import boft_linear, butterfly_matmul, cayley
from boft_ops._runtime import backend as backends
from boft_ops._runtime import native
from boft_ops.ops.scale import Scale


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_the_native_library_is_loaded():
    """Without this, a failed build leaves the fallback and every other test passes on it."""
    if os.environ.get("BOFT_OPS_SKIP_EXT") == "1":
        pytest.skip("BOFT_OPS_SKIP_EXT=1")
    assert native.status.startswith("loaded"), native.status
    neumann = {"cayley_neumann5", "cayley_neumann5_backward"}  # in plain torch on every device
    assert native.kernels("cpu") == backends.ops().keys() - neumann


def test_report_names_every_op_once_per_device():
    rows = backends.report()
    assert len({(r["op"], r["device"]) for r in rows}) == len(rows) == 2 * len(backends.ops())
    by_op = {(r["op"], r["device"]): r for r in rows}
    assert by_op["cayley", "cpu"]["serving"] == ("cpu" if native.kernels("cpu") else "reference")
    assert by_op["cayley_neumann5", "cpu"]["serving"] == "reference"
    assert by_op["cayley_neumann5", "cuda"]["others"]["triton"] == "no Triton kernel of this op"
    assert by_op["rotate", "cuda"]["serving"] == (
        "triton" if backends.has_triton() else "reference"
    )


def test_each_backend_is_the_one_that_runs(backend, monkeypatch, interpreted):
    ran = []
    op = backends.ops()["cayley"]
    monkeypatch.setattr(op, "reference", lambda s, _: ran.append("reference") or s.new_zeros(1))
    monkeypatch.setattr(op, "raw", lambda s, _: ran.append("cpu") or s.new_zeros(1))
    monkeypatch.setattr(op, "launcher", lambda: lambda s, _: ran.append("triton") or s.new_zeros(1))
    with torch.no_grad():
        cayley(torch.zeros(3, 6))
    assert ran == [backend]


def test_forcing_a_backend_without_a_kernel_raises(interpreted):
    x, weight, skew = torch.randn(2, 16), torch.randn(4, 16), torch.zeros(2, 4, 6)
    if backends.has_triton():
        match = "=triton: cayley_neumann5: no Triton kernel"
        with backends.force("triton"), pytest.raises(RuntimeError, match=match):
            boft_linear(x, weight, skew, method="neumann5")
    match = "=cuda: expected tensors on cuda, got cpu"
    if "cuda" in backends.ops()["cayley"].unavailable:  # a library without CUDA kernels, or none
        match = "=cuda: cayley: .*native library"
    with backends.force("cuda"), pytest.raises(RuntimeError, match=match):
        cayley(skew)
    half = torch.zeros(3, 6, dtype=torch.float16)
    if native.kernels("cpu"):
        with backends.force("cpu"), pytest.raises(RuntimeError, match=r"does not take.*float16"):
            cayley(half)
    with pytest.raises(ValueError, match="backend: expected one of"), backends.force("fpga"):
        pass
    assert cayley(half).dtype == torch.float16  # unforced, the reference serves


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    if not backends.has_triton():
        pytest.skip("triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backends.force("triton"), pytest.raises(RuntimeError, match="tensors on cuda, got cpu"):
        cayley(torch.zeros(3, 6))


def test_report_shows_a_forced_backend():
    with backends.force("reference"):
        assert {row["serving"] for row in backends.report()} == {"reference"}
    with backends.force("cuda"):
        rows = {(r["op"], r["device"]): r for r in backends.report()}
    assert rows["cayley", "cpu"]["serving"] == "nothing"
    assert "BOFT_OPS_BACKEND=cuda: " in rows["cayley", "cpu"]["others"]["cuda"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "ok"),
        ("nonsense", "BOFT_OPS_BACKEND: expected one of"),
        ("cuda", "BOFT_OPS_BACKEND=cuda"),
    ],
)
def test_environment_variable(value, expected):
    code = "import torch, boft_ops; boft_ops.cayley(torch.zeros(2, 6)); print('ok')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BOFT_OPS_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert expected in run.stdout + run.stderr
    assert (run.returncode == 0) == (expected == "ok")


def test_results_do_not_depend_on_threads():
    """Bit for bit: every kernel splits its work into units that no other thread touches."""
    x = torch.randn(700, 512, requires_grad=True)
    skew, upstream = torch.randn(8, 128, 6, requires_grad=True), torch.randn(700, 96)
    scale, bias = torch.randn(96, requires_grad=True), torch.randn(96)
    weight = torch.randn(96, 512)
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            blocks = cayley(skew)
            y = butterfly_matmul(x, blocks)
            grads = torch.autograd.grad(y, (x, skew), torch.ones_like(y) + x.detach())
            z = Scale.apply(x[:, :96].contiguous(), scale, bias, bias)
            results.append([blocks, y, *grads, *torch.autograd.grad(z, (x, scale), upstream)])
            for parameter in (skew, skew[:2]):  # several stages, and one
                z = boft_linear(x, weight, parameter, scale, bias)
                results[-1] += [z, *torch.autograd.grad(z, (x, skew, scale), upstream)]
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_call_goes_past_the_dispatcher_only_where_nobody_looks():
    tensor = torch.zeros(2)
    assert backends.bypasses_dispatch(tensor)
    assert backends.bypasses_dispatch(torch.nn.Parameter(tensor))
    assert not backends.bypasses_dispatch(tensor.as_subclass(type("Sub", (torch.Tensor,), {})))
    with FakeTensorMode() as mode:
        assert not backends.bypasses_dispatch(tensor)
        assert not backends.bypasses_dispatch(torch.zeros(2))
    assert not backends.bypasses_dispatch(mode.from_tensor(tensor))
    with torch.overrides.BaseTorchFunctionMode():
        assert not backends.bypasses_dispatch(tensor)
