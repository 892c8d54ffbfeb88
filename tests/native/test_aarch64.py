"""The CPU kernels on aarch64: cross-compiled, and run by qemu's user mode."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from boft_ops import boft_linear, butterfly_matmul, cayley

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # folder of the cross compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Compile the kernels of csrc/cpu for aarch64, with a layer made of them."""
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    path = tmp_path_factory.mktemp("aarch64") / "layer"
    sources = [
        ROOT / "tests/native/layer_by_kernels.cpp",
        *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
    ]
    flags = ["-std=c++17", "-O1", "-DNDEBUG", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, *sources, "-o", path], check=True)
    return path


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("rows", "d", "n", "m", "b"),
    [(70, 64, 40, 2, 8), (600, 48, 200, 1, 16), (33, 64, 72, 4, 4), (5, 16, 8, 2, 8)],
)
def test_a_layer_and_its_gradients(program, rows, d, n, m, b):
    generator = torch.Generator().manual_seed(0)
    shapes = ((m, d // b, b * (b - 1) // 2), (rows, d), (n, d), (n,), (n,), (rows, n))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[0] *= 0.3
    command = [EMULATOR, "-L", LIBRARIES, program, *map(str, (rows, d, n, m, b))]
    text = b"".join(t.numpy().tobytes() for t in tensors)
    run = subprocess.run(command, input=text, capture_output=True, check=True)
    numbers = torch.frombuffer(bytearray(run.stdout), dtype=torch.float32)

    skew, x, weight, scale, bias, grad = (t.double() for t in tensors)
    leaves = [t.requires_grad_(True) for t in (x, skew, scale, bias)]
    y = boft_linear(x, weight, skew, scale, bias)
    gradients = torch.autograd.grad(y, leaves, grad)
    expected = [y, butterfly_matmul(x, cayley(skew)), *gradients]
    actual = numbers.split([t.numel() for t in expected])
    assert sum(map(len, actual)) == len(numbers)
    for one, other in zip(actual, expected, strict=True):
        error = (one.double() - other.detach().flatten()).norm() / other.norm()
        assert error < 1e-5
        assert error > 0  # float32 was at work
