"""The C++ extension of docs/examples/cpp_extension: built beside a copy of csrc/, and compared."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import numpy as np
import pytest
import torch

import boft_ops
from boft_ops._runtime import build as build_tools

ROOT = Path(__file__).resolve().parents[2]
CUDA_RUNTIME = """
#include <cstdlib>
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaMalloc(void** data, size_t bytes) { return (*data = std::malloc(bytes)) == nullptr; }
inline int cudaFree(void* data) { return std::free(data), 0; }
"""


@pytest.fixture
def extension(tmp_path):
    """A folder with the example and, of this repository, the kernels alone."""
    if shutil.which("c++") is None or build_tools.find_ninja() is None:
        pytest.skip("no C++ compiler or no ninja")
    folder = shutil.copytree(ROOT / "docs" / "examples" / "cpp_extension", tmp_path / "extension")
    vendored = folder / "third_party" / "boft_csrc"
    for kernels in ("cpu", "cuda"):
        shutil.copytree(ROOT / "csrc" / kernels, vendored / kernels)
    for header in ("boft_kernels.h", "boft_cuda.h"):
        shutil.copy(ROOT / "csrc" / header, vendored)
    return folder


def operands():
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 8, 28), (33, 64), (24, 64), (33, 24)  # skew, x, weight, target
    skew, *others = (torch.randn(shape, generator=generator) for shape in shapes)
    return 0.3 * skew, *others


def check_close(got, expected):
    """Compare with float64: within 1e-5 of the largest number, since a sum's terms may cancel."""
    for name, one in expected.items():
        one = np.asarray(torch.as_tensor(one).detach())
        error = np.abs(got[name] - one).max() / np.abs(one).max()
        assert error < 1e-5, (name, error)


def loss_of(skew, x, weight, target):
    return (boft_ops.boft_linear(x, weight, skew) - target).square().mean() / 2


TRAIN = """
import sys
import numpy as np
import trainer
data = dict(np.load("operands.npz"))
loss, x_grad, skew_grad = trainer.loss_and_gradients(**data)
losses = trainer.train(**data, steps=20, rate=0.05)
np.savez("results", loss=loss, x_grad=x_grad, skew_grad=skew_grad, losses=losses, skew=data["skew"])
try:
    trainer.loss_and_gradients(**data | {"skew": data["skew"][:, :3].copy()})
except ValueError as error:
    print(error)
assert not {"torch", "boft_ops"} & set(sys.modules)
"""


@pytest.mark.exhaustive
def test_the_training_loop_computes_what_the_package_computes(extension):
    environment = {**os.environ, "PYTHON": sys.executable, "CXXFLAGS": "-O0 -Werror"}
    ninja = [build_tools.find_ninja(), "-C", extension]
    subprocess.run(ninja, check=True, env=environment, stdout=subprocess.DEVNULL)
    names, tensors = ("skew", "x", "weight", "target"), operands()
    arrays = {name: tensor.numpy() for name, tensor in zip(names, tensors)}
    np.savez(extension / "operands.npz", **arrays)
    run = subprocess.run(
        [sys.executable, "-c", TRAIN], cwd=extension, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "skew: expected (m, d/b, b(b-1)/2)\n"
    got = np.load(extension / "results.npz")

    skew, x, weight, target = (tensor.double() for tensor in tensors)
    loss = loss_of(skew.requires_grad_(), x.requires_grad_(), weight, target)
    x_grad, skew_grad = torch.autograd.grad(loss, (x, skew))
    check_close(got, {"loss": loss, "x_grad": x_grad, "skew_grad": skew_grad})
    skew, x, losses = skew.detach(), x.detach(), []
    for _ in range(20):
        loss = loss_of(skew.requires_grad_(), x, weight, target)
        losses.append(loss.item())
        skew = (skew - 0.05 * torch.autograd.grad(loss, skew)[0]).detach()
    assert losses[-1] < 0.9 * losses[0]  # it learns
    check_close(got, {"losses": losses, "skew": skew})


ROTATE = """
import numpy as np
import rotation_cuda
data = np.load("operands.npz")
skew, x = data["skew"], data["x"]
grad = data["target"] @ data["weight"]
y, x_grad, skew_grad = (np.full_like(a, np.nan) for a in (x, x, skew))
at = lambda array: array.ctypes.data
rotation = rotation_cuda.Rotation(d=64, m=2, b=8)
rotation.forward(at(skew), at(x), at(y), len(x))
rotation.backward(at(x), at(grad), at(x_grad), at(skew_grad), len(x))
np.savez("results", y=y, x_grad=x_grad, skew_grad=skew_grad, grad=grad)
"""


@pytest.mark.exhaustive
def test_the_rotation_on_a_gpu_is_the_packages(extension):
    """The sources of the CUDA extension, with the kernels emulated on the CPU."""
    emulated = cuda_emulation.build_once()
    (extension / "cuda_runtime_api.h").write_text(CUDA_RUNTIME)
    asked = [sys.executable, "-m", "pybind11", "--includes"]
    includes = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    command = ["g++", "-std=c++17", "-O0", "-fPIC", "-shared", *includes, f"-I{extension}"]
    command += [f"-I{extension / 'third_party' / 'boft_csrc'}"]
    command += ["cuda_module.cpp", "rotation_cuda.cpp", str(emulated / cuda_emulation.LIB)]
    for folder in (emulated, build_tools.find_torch().root / "lib"):  # its bindings need torch
        command += [f"-Wl,-rpath,{folder}", "-Wl,--disable-new-dtags"]
    command += ["-Wl,--allow-shlib-undefined", "-o", "rotation_cuda.so"]
    subprocess.run(command, check=True, cwd=extension)
    skew, x, weight, target = operands()
    np.savez(extension / "operands.npz", skew=skew, x=x, weight=weight, target=target)
    subprocess.run([sys.executable, "-c", ROTATE], check=True, cwd=extension)
    got = np.load(extension / "results.npz")

    leaves = [tensor.double().requires_grad_() for tensor in (x, skew)]
    y = boft_ops.butterfly_matmul(leaves[0], boft_ops.cayley(leaves[1]))
    grads = torch.autograd.grad(y, leaves, torch.from_numpy(got["grad"]).double())
    check_close(got, {"y": y, "x_grad": grads[0], "skew_grad": grads[1]})


@pytest.mark.exhaustive
def test_the_gpu_target_compiles(extension):
    """The file with the launches; tests/cuda compiles the kernels, which takes a minute."""
    nvcc = build_tools.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    path = os.pathsep.join([os.path.dirname(nvcc), os.environ["PATH"]])
    command = [build_tools.find_ninja(), "-C", extension, "build/rotation_cuda.o"]
    environment = {**os.environ, "PYTHON": sys.executable, "PATH": path}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
