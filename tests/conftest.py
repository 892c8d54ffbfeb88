"""Fixtures of all tests: seeds, poisoned memory, the backends of this machine."""

import os
import sys
import types

import hypothesis
import interpreter
import pytest
import torch

# Triton's interpreter where there is no GPU; @triton.jit reads it when a kernel is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# a pytest of its own, which a test starts, is no part of the processes that share the tests
os.environ.pop("PYTEST_XDIST_WORKER", None)
os.environ["HF_HUB_OFFLINE"] = "1"  # bitsandbytes would ask the hub
os.environ["BOFT_OPS_AUTOTUNE"] = "0"  # built-in defaults, whatever was measured on this machine

from boft_ops._runtime import backend as backends
from boft_ops._runtime import tuned

# In CI the same examples every time; elsewhere new ones, which may find what nobody thought of.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Mark the parameters of a test as exhaustive that ``exhaustive_if(condition=...)`` picks."""
    for item in items:
        for mark in item.iter_markers("exhaustive_if"):
            if mark.kwargs["condition"](**item.callspec.params):
                item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def _seed_and_poison():
    """Fixed seed, and torch.empty full of NaN: an element that a kernel forgets is seen."""
    torch.manual_seed(0)
    # torch.use_deterministic_algorithms imports torch.compile, a third of the time of a short run
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    interpreter.be_quick()
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    """Every implementation that can serve CPU tensors, forced in turn."""
    name = request.param
    # Absent kernels must fail here, not skip: with a silent fallback every test would pass.
    if name == "cpu" and os.environ.get("BOFT_OPS_SKIP_EXT") == "1":
        pytest.skip("BOFT_OPS_SKIP_EXT=1")
    if name == "triton" and sys.platform != "linux":
        pytest.skip("triton is a dependency on Linux only")
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton serves CPU tensors in its interpreter only; the gpu tests run it here")
    with backends.force(name):
        yield name


@pytest.fixture
def peft_extension(monkeypatch):
    """A stand-in for PEFT's CUDA extension: without it, m falls back to 1 on every machine here."""
    from peft.tuners.boft import layer

    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(grad, blocks):
        b = blocks.shape[-1]
        split = grad.unflatten(1, (-1, b)).unflatten(3, (-1, b))
        return [torch.diagonal(split, dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]

    extension = types.SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setattr(layer, "_FBD_CUDA", extension)
    # a benchmark in this process may have replaced the function for good (peers.forgo_extension)
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: layer._FBD_CUDA)


@pytest.fixture
def tuned_cache(tmp_path, monkeypatch):
    """Measurements count, and this empty folder is where they are kept."""
    monkeypatch.setenv("BOFT_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BOFT_OPS_AUTOTUNE", "")
    monkeypatch.setattr(tuned, "_warned", set())
    tuned.forget()
    yield tmp_path / "cache" / "tuned"
    tuned.forget()
