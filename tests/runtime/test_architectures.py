"""GPUs that the native library was compiled for, and what serves the others."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from boft_ops import __main__ as command
from boft_ops._runtime import backend as backends
from boft_ops._runtime import build, gpu, native
from boft_ops._runtime.tuned import Choice

FAULT = r"compute capability 9.0, and device 0 \(A card\) has 8.6; install again with "
FAULT += "TORCH_CUDA_ARCH_LIST=8.6"


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),  # machine code of another generation
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 6), False),
        ("8.0;9.0;10.0+PTX", (12, 0), True),
        ("8.0;9.0;10.0+PTX", (7, 5), False),
        ("10.3", (10, 0), False),
        ("8.0 9.0, 10.0", (10, 3), True),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),
        ("10.0f+PTX", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
    ],
)
def test_what_code_runs_on(archs, capability, served):
    assert gpu.serves(archs, capability) is served


def test_the_default_serves_what_the_kernels_are_written_for():
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]:
        assert gpu.serves(build.DEFAULT_ARCHS, capability)


@pytest.fixture
def library_for(monkeypatch):
    """A function that pretends to have a card, and a library for these architectures."""

    def pretend(archs, capability=(8, 6), driver=13000):
        monkeypatch.setattr(native, "archs", lambda: archs)
        monkeypatch.setattr(native, "cuda_version", lambda: "13.0")
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")
        gpu._cached_has_native_code.cache_clear()

    yield pretend
    gpu._cached_has_native_code.cache_clear()


def on_cuda(*shape):
    """All that the choice of a backend looks at."""
    return SimpleNamespace(
        shape=shape, dtype=torch.float32, is_cpu=False, is_cuda=True, get_device=lambda: 0
    )


def choose(monkeypatch, name, shape, *more, triton=True, default="triton"):
    op = backends.ops()[name]
    monkeypatch.setattr(op, "unavailable", {} if triton else {"triton": "not installed"})
    monkeypatch.setattr(op, "defaults", {"cuda": Choice(default)})
    return op.choose((on_cuda(*shape), *more)).backend


@pytest.mark.parametrize("archs", ["8.0", "8.6+PTX", None])
def test_a_library_for_the_gpu_is_used(monkeypatch, library_for, archs):
    library_for(archs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(monkeypatch, "stage_from_skew", (2, 8, 28), None) == "cuda"


def test_a_library_for_another_gpu_is_not(monkeypatch, library_for):
    library_for("9.0")
    with pytest.warns(RuntimeWarning, match=FAULT):
        assert choose(monkeypatch, "stage_from_skew", (2, 8, 28), None) == "triton"
    call = "cayley", (8, 28), None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once for a device
        assert choose(monkeypatch, *call) == "triton"
    assert choose(monkeypatch, *call, triton=False, default="cuda") == "reference"
    op = backends.ops()["cayley"]
    monkeypatch.setattr(op, "_measured", lambda *_: Choice("cuda"))
    assert choose(monkeypatch, *call) == "triton"
    assert not op.supports("cuda", (on_cuda(8, 28), None))


def test_a_library_that_is_newer_than_the_driver_is_not_used(monkeypatch, library_for):
    call = "cayley", (8, 28), None
    library_for("8.0", driver=12040)
    with pytest.warns(RuntimeWarning, match=r"CUDA 13.0, and the driver is one for CUDA 12.4; upd"):
        assert choose(monkeypatch, *call) == "triton"
    library_for("8.0", driver=13020)  # a minor version does not matter
    assert choose(monkeypatch, *call) == "cuda"


def test_amd_gpus_get_no_cuda_kernels(monkeypatch):
    if native.library is None:
        pytest.skip("the native library is not built")

    class Library:  # as of a wheel with CUDA kernels
        boft_ops_isa, boft_ops_register = (lambda: b"avx2"), (lambda *_: 0)

        def boft_ops_kernels(device):
            return b"cayley"

    def names():
        return native._open(native.library, None)[3]

    monkeypatch.setattr(native.ctypes, "CDLL", lambda _: Library)
    Library.boft_ops_register = lambda *call: registered.append(call[1]) or 0
    for hip, devices in ((None, [b"cpu", b"cuda"]), ("6.4", [b"cpu"])):
        registered = []
        monkeypatch.setattr(torch.version, "hip", hip)
        assert [device.encode() for device, ops in names().items() if ops] == devices == registered


def test_a_gpu_that_is_too_old_for_the_kernels_is_left_to_triton(monkeypatch, library_for):
    library_for(build.DEFAULT_ARCHS, (7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(monkeypatch, "cayley", (8, 28), None) == "triton"
    assert gpu.native_fault(0) == (
        "the CUDA C++ kernels need compute capability 8.0, and device 0 (A card) has 7.5"
    )


def test_the_native_call_of_a_layer_needs_code_for_the_gpu(monkeypatch, library_for):
    op = backends.ops()["linear_from_skew"]
    x, weight, skew = on_cuda(4, 16), on_cuda(8, 16), on_cuda(2, 2, 28)
    weight.is_contiguous = lambda: True
    monkeypatch.setattr(op, "unavailable", {"triton": "no Triton kernel of this op"})
    monkeypatch.setattr(op, "defaults", {"cuda": Choice("cuda")})
    library_for("8.0")
    assert op.kernel_backend(x, weight, skew) == "cuda"
    library_for("9.0")
    with pytest.warns(RuntimeWarning, match=FAULT):
        assert op.kernel_backend(x, weight, skew) is None


@pytest.mark.filterwarnings("ignore:boft_ops. the native library was compiled:RuntimeWarning")
def test_forced_it_raises(monkeypatch, library_for):
    library_for("9.0")
    op = backends.ops()["cayley"]
    with backends.force("cuda"):
        assert choose(monkeypatch, "cayley", (8, 28), None) == "reference"
        x = on_cuda(8, 28)
        x.device = torch.device("cuda", 0)
        with pytest.raises(RuntimeError, match=f"BOFT_OPS_BACKEND=cuda: cayley: .*{FAULT}"):
            op._check_forced((x, None))


def test_the_command_says_so(library_for):
    library_for("8.0")
    assert "install again" not in command.info()
    library_for("9.0")
    assert "TORCH_CUDA_ARCH_LIST=8.6" in command.info()


def test_the_record_of_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "library", tmp_path / build.LIB)
    monkeypatch.setattr(native, "_kernels", {"cuda": frozenset({"cayley"})})
    assert native.archs() is None
    build.write_info(tmp_path, archs="8.0;9.0", cuda="13.0")
    assert (native.archs(), native.cuda_version()) == ("8.0;9.0", "13.0")
    monkeypatch.setattr(native, "_kernels", {"cuda": frozenset()})
    assert native.archs() is None


def test_native_architectures_are_those_of_the_gpus_here(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"

    def says(text):
        nvcc.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        nvcc.chmod(0o755)
        return str(nvcc)

    lines = [f'#$ ptxas -arch=sm_{n} -m64 "x.ptx" -o "x.sm_{n}.cubin"' for n in (120, 86)]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.wanted_archs(says("")) == build.DEFAULT_ARCHS
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " native ")
    assert build.wanted_archs(says("\n".join(lines))) == "8.6;12.0"
    absent = "nvcc warning : Cannot find valid GPU for '-arch=native', default arch is used\n"
    with pytest.raises(build.SettingError, match="nvcc finds no GPU"):
        build.wanted_archs(says(absent + lines[0]))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert build.wanted_archs(says("")) == "9.0a"
