"""Every Triton kernel, compiled for GPUs that are not there: it compiles, nothing is spilled.

In a process of its own: under the interpreter, which the other tests use, nothing is compiled.
"""

import json
import os
import subprocess
import sys

import pytest

from boft_ops import _backend

pytestmark = pytest.mark.skipif(not _backend.has_triton(), reason="triton is not installed")

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
BLOCK_SIZES = [2, 3, 4, 8, 16, 32, 64]

PROGRAM = """
import json, os, re, subprocess, sys, tempfile, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from boft_ops.triton_kernels import cayley as module

target, sizes, dtypes = json.loads(sys.argv[1])
dump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for kernel in (module.cayley_kernel, module.cayley_backward_kernel):
    for b in sizes:
        for dtype in dtypes:
            tile = module.config(b)
            warps = tile.pop("num_warps")
            constants = {"b": b, **tile}
            types = {
                name: "constexpr" if name in constants else "*" + dtype if "ptr" in name else "i32"
                for name in kernel.arg_names
            }
            source = ASTSource(fn=kernel, signature=types, constexprs=constants)
            out = triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps})
            row = {"kernel": kernel.__name__, "b": b, "dtype": dtype, "shared": out.metadata.shared}
            if target[0] == "cuda":
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(out.asm["cubin"])
                    file.flush()
                    usage = subprocess.run(
                        [dump, "--dump-resource-usage", file.name],
                        capture_output=True, text=True, check=True,
                    ).stdout
                row.update({k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)})
            else:
                row["STACK"] = int(re.search(r"scratch_size:\\s*(\\d+)|ScratchSize: (\\d+)",
                                             out.asm["amdgcn"]).group(2) or 0)
                row["REG"] = int(re.search(r"; (?:Num)?Vgprs: (\\d+)", out.asm["amdgcn"]).group(1))
            print(json.dumps(row))
"""


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t[1]))
def test_kernels_compile_without_spills(target, tmp_path):
    # all dtypes on one target; the others differ in nothing but the load
    dtypes = ["fp32", "fp64", "bf16", "fp16"] if target[1] == 90 else ["fp32"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([target, BLOCK_SIZES, dtypes])],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 2 * len(BLOCK_SIZES) * len(dtypes)
    for row in rows:
        assert row["STACK"] == 0, row
        assert row.get("LOCAL", 0) == 0, row
        assert 0 < row["REG"] <= 255, row
        assert row["shared"] <= 48 * 1024, row  # every architecture's static limit
