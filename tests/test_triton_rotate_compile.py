"""Every tile of the rotate kernels, compiled for GPUs that are not there: nothing is spilled.

In a process of its own: under the interpreter, which the other tests use, nothing is compiled.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from boft_ops import _backend

pytestmark = [
    pytest.mark.skipif(not _backend.has_triton(), reason="triton is not installed"),
    pytest.mark.slow,
]

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

# d and the tensors count as multiples of 16, as launches find them for any real width
PROGRAM = """
import json, os, re, subprocess, sys, tempfile, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from boft_ops.triton_kernels import config_rotate, rotate

target, dtypes = json.loads(sys.argv[1])
dump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for case in config_rotate.compile_cases():
    if case["structure"]["dtype"] not in dtypes:
        continue
    kernel = getattr(rotate, case["kernel_name"])
    constants, pointers = case["constexprs"], case["pointers"]
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in pointers or name == "d"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    out = triton.compile(source, target=GPUTarget(*target), options=options)
    row = case | {"shared": out.metadata.shared}
    if target[0] == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(out.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [dump, "--dump-resource-usage", file.name],
                capture_output=True, text=True, check=True,
            ).stdout
        used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
        row |= {"registers": used["REG"], "stack": used["STACK"] + used["LOCAL"]}
        row["assembly"] = out.asm["ptx"]
    else:
        text = out.asm["amdgcn"]
        row["registers"] = int(re.search(r"; (?:Num)?Vgprs: (\\d+)", text).group(1))
        row["stack"] = int(re.search(r"ScratchSize: (\\d+)", text).group(1))
        row["assembly"] = text
    print(json.dumps(row))
"""


def compile_rows(target: str, dtypes: list[str], cache: os.PathLike) -> list[dict]:
    """A row per case: kernel, constants, dtype, registers, shared memory, stack, assembly."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([TARGETS[target], dtypes])],
        env={**env, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float32"], ["float64"]], ids=lambda d: d[0])
@pytest.mark.parametrize("target", TARGETS)
def test_rotate_kernels_compile_without_spills(target, dtypes, tmp_path):
    # float16 differs from bfloat16 in the name of its instructions alone: once is enough
    if (target, dtypes) == ("sm_90", ["bfloat16"]):
        dtypes = [*dtypes, "float16"]
    rows = compile_rows(target, dtypes, tmp_path)
    assert {row["structure"]["dtype"] for row in rows} == set(dtypes)
    for row in rows:
        assembly = row.pop("assembly")
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED[target], row
        if target == "gfx942":
            continue
        assert 0 < row["registers"] <= 255, row
        if row["dtype"] in ("bf16", "fp16"):
            assert re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", assembly), row
            if row["structure"]["stride"] == 1 and row["structure"]["size"] % 16 == 0:
                # rows travel in 16-byte pieces
                assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* .*, 0x10,", assembly), (
                    row
                )
                assert re.search(r"st\.global\S*\.v4\.b32", assembly), row
