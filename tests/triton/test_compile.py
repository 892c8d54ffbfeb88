"""Every Triton kernel compiles, without spills, for GPUs that this machine lacks.

Cases that the committed table proves, because their source is the same, are compiled as a sample.
The compiler runs in a process of its own: the other tests use the interpreter, under which nothing
is compiled.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton_resources
from triton_resources import SPILLS_ABOVE, TYPICAL

from boft_ops._runtime import backend as backends
from boft_ops._runtime import paths

ROOT = Path(__file__).resolve().parents[2]

OTHERS = ("sm_80", "sm_100", "gfx942", "rest")

pytestmark = pytest.mark.skipif(not backends.has_triton(), reason="triton is not installed")


# `make test` compiles the usual kernels for one GPU: one that fails elsewhere alone is rare.
@pytest.mark.exhaustive_if(condition=lambda arguments: arguments[0] in OTHERS)
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments",
    [
        *([target] for target in triton_resources.TARGETS if target not in TYPICAL),
        ["rest", triton_resources.FULL],
        TYPICAL,
    ],
    ids=" ".join,
)
def test_kernels_compile_without_spills(arguments, tmp_path):
    # Under the interpreter nothing is compiled. Triton 3.6 asks for it when it is imported.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, triton_resources.__file__, *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for target, rows in json.loads(run.stdout.splitlines()[-1]).items():
        check(target, arguments[0] == "rest", rows)


def check(target, rest, rows):
    """Compare the rows of one target with its limits and with the table."""
    import triton

    (backend, _, width), limits = triton_resources.TARGETS[target]
    cases = dict(triton_resources.cases(target, rest))
    version, table = triton_resources.read_table()
    if version == triton.__version__:
        assert len(rows) >= len(cases) // triton_resources.SAMPLE
        rows = {name: table[target, name] for name in cases if (target, name) in table} | rows
    assert rows.keys() == cases.keys()
    for name, used in rows.items():
        size = int(re.search(r" SIZE=(\d+)|$", name)[1] or 0)
        spills = size > SPILLS_ABOVE.get(target, 256)
        if version != triton.__version__:
            # Triton 3.6 spills some bytes on gfx1100 and sm_120, and in groups of 256 on sm_90, and
            # there that tile was timed: 0.63 of the time of the next one.
            spills = target in TYPICAL or (size == 256 and used["stack"] <= 48)
        assert used["stack"] == 0 or spills, (name, used)
        assert used["shared"] <= limits.program_shared, (name, used)
        if backend == "cuda":  # or it does not launch
            threads = cases[name].num_warps * width
            assert used["registers"] * threads <= limits.registers, (name, used)

    if version != triton.__version__:
        return  # the registers of another compiler tell nothing about a change here
    hint = "python tests/helpers/triton_resources.py --write"
    names = {name for name, _ in triton_resources.cases(target)}
    assert names == {name for t, name in table if t == target}, f"other cases: {hint}"
    for name, used in rows.items():
        before = table[target, name]
        assert used["registers"] <= 1.1 * before["registers"], (name, used, before, hint)
        assert used["shared"] <= 1.1 * before["shared"], (name, used, before, hint)
        for key in ("barriers", "mma", "wide"):
            assert used[key] == before[key], (name, used, before, hint)


def test_half_precision_rows_use_matrix_units_and_whole_pieces_of_16_bytes():
    """The committed table says so of the rotate kernels, for every target."""
    _, table = triton_resources.read_table()
    kernels = ("rotate:", "rotate_backward:", "rotate_indexed:", "segment_stage_grads:")
    rows = [(name, used) for (_, name), used in table.items() if name.startswith(kernels)]
    halves = [(name, used) for name, used in rows if " bf16" in name or " fp16" in name]
    assert len(halves) > 50
    for name, used in halves:
        assert used["mma"], name
        size, stride = (int(re.search(rf" {key}=(\d+)", name)[1]) for key in ("SIZE", "STRIDE"))
        if stride == 1 and size % 16 == 0:
            assert used["wide"], name


def test_every_kernel_is_compiled():
    compiled = {case.kernel for _, case in triton_resources.cases(triton_resources.FULL)}
    for path in paths.triton_kernels().glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert f"{path.stem}:{node.name}" in compiled
