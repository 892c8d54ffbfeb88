"""A library with CUDA kernels, made with whatever torch there is: it links, loads and registers."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from boft_ops._runtime import build, paths

ROOT = paths.HERE.parent


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on PATH or in CUDA_HOME")
def test_a_library_for_cpu_and_cuda(tmp_path):
    for folder in ("boft_ops", "csrc", "triton"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "BOFT_OPS_CUDA": "1"}
    environment |= {"BOFT_OPS_FORCE_EXT": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "CXXFLAGS": "-O0"}
    environment["NVCC_APPEND_FLAGS"] = "-Xcicc -O0 -Xptxas -O0"  # nothing of it runs here

    def python(*arguments):
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    python("setup.py", "-q", "build_ext", "--inplace")
    code = """
import torch
from boft_ops._runtime import backend, native
print(*sorted(native.kernels("cuda")))
for name in native.kernels("cuda"):
    for op in (backend.ops()[name].raw, backend.ops()[name].native()):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name().partition(".")[0], "CUDA")
"""
    kernels = python("-c", code).split()
    header = (ROOT / "csrc" / "binding_ops.h").read_text()
    assert kernels == sorted(re.findall(r"OP\((\w+)\)", header.partition("BOFT_CUDA_OPS(OP)")[2]))
    assert f"{len(kernels)} on cuda for 9.0)" in python("-m", "boft_ops")
