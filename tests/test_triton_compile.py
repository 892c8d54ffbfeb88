"""Every Triton kernel, compiled for GPUs that are not there: it compiles, nothing is spilled.

In a process of its own: under the interpreter, which the other tests use, nothing is compiled.
"""

import ast
import json
import os
import subprocess
import sys

import pytest
import triton_resources

from boft_ops import _backend, _paths

pytestmark = pytest.mark.skipif(not _backend.has_triton(), reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", triton_resources.TARGETS)
def test_kernels_compile_without_spills(target, tmp_path):
    import triton

    (backend, _, _), shared_limit = triton_resources.TARGETS[target]
    run = subprocess.run(
        [sys.executable, triton_resources.__file__, target],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout.splitlines()[-1])
    assert set(rows) == {name for name, _ in triton_resources.cases(target)}
    for name, used in rows.items():
        assert used["stack"] == 0, (name, used)
        assert used["shared"] <= shared_limit, (name, used)
        if backend == "cuda":  # or it does not launch
            assert used["registers"] * used["threads"] <= 65536, (name, used)

    version, table = triton_resources.read_table()
    if version != triton.__version__:
        return  # another compiler: its registers tell nothing about a change here
    hint = "python tests/triton_resources.py --write"
    assert set(rows) == {name for t, name in table if t == target}, f"other cases: {hint}"
    for name, used in rows.items():
        before = table[target, name]
        assert used["registers"] <= 1.1 * before["registers"], (name, used, before, hint)
        assert used["shared"] <= 1.1 * before["shared"], (name, used, before, hint)
        assert used["barriers"] == before["barriers"], (name, used, before, hint)


def test_every_kernel_is_compiled():
    compiled = {case.kernel for _, case in triton_resources.cases(triton_resources.FULL)}
    for path in _paths.triton_kernels().glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert f"{path.stem}:{node.name}" in compiled
