"""The choice of a backend: what serves where, forcing one, and saying why not."""

import os
import subprocess
import sys

import pytest
import torch

from boft_ops import _backend, _native, boft_linear, cayley


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_the_native_library_is_loaded():
    """Without this, a failed build leaves the fallback and every other test passes on it."""
    if os.environ.get("BOFT_OPS_SKIP_EXT") == "1":
        pytest.skip("BOFT_OPS_SKIP_EXT=1")
    assert _native.status.startswith("loaded"), _native.status
    assert {"cayley", "cayley_backward"} <= _native.kernels("cpu")


def test_report_names_every_op_once_per_device():
    rows = _backend.report()
    assert len({(r["op"], r["device"]) for r in rows}) == len(rows) == 2 * len(_backend._ops)
    by_op = {(r["op"], r["device"]): r for r in rows}
    assert by_op["cayley", "cpu"]["serving"] == ("cpu" if _native.kernels("cpu") else "reference")
    assert by_op["rotate", "cpu"]["serving"] == "reference"
    assert "no cpu kernel of this op" in by_op["rotate", "cpu"]["others"]["cpu"]


def test_each_backend_is_the_one_that_runs(cayley_backend, monkeypatch, interpreted):
    ran = []
    op = _backend._ops["cayley"]
    monkeypatch.setattr(op, "reference", lambda s: ran.append("reference") or s.new_zeros(1))
    monkeypatch.setattr(op, "raw", lambda s: ran.append("cpu") or s.new_zeros(1))
    monkeypatch.setattr(op, "launcher", lambda: lambda s: ran.append("triton") or s.new_zeros(1))
    with torch.no_grad():
        cayley(torch.zeros(3, 6))
    assert ran in ([cayley_backend], [])  # under no_grad the Function still calls forward once
    assert ran == [cayley_backend]


def test_forcing_a_backend_without_a_kernel_raises(interpreted):
    x, weight, skew = torch.randn(2, 16), torch.randn(4, 16), torch.zeros(2, 4, 6)
    with _backend.force("cpu"), pytest.raises(RuntimeError, match="=cpu: compose: no cpu kernel"):
        boft_linear(x, weight, skew)
    with (
        _backend.force("cuda"),
        pytest.raises(RuntimeError, match="BOFT_OPS_BACKEND=cuda: cayley: .*native library"),
    ):
        cayley(skew)
    half = torch.zeros(3, 6, dtype=torch.float16)
    if _native.kernels("cpu"):
        with _backend.force("cpu"), pytest.raises(RuntimeError, match=r"does not take.*float16"):
            cayley(half)
    with pytest.raises(ValueError, match="backend: expected one of"), _backend.force("fpga"):
        pass
    assert cayley(half).dtype == torch.float16  # unforced, the reference serves


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    if not _backend.has_triton():
        pytest.skip("triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with _backend.force("triton"), pytest.raises(RuntimeError, match="tensors on cuda, got cpu"):
        cayley(torch.zeros(3, 6))


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
    skew = torch.randn(5000, 28)
    many = cayley(skew)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(cayley(skew), many)
    finally:
        torch.set_num_threads(threads)
