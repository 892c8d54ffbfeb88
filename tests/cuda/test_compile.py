"""Every CUDA kernel, compiled for GPUs that are not there: no warning, nothing is spilled."""

import cuda_resources
import pytest

from boft_ops._runtime import build

nvcc = build.find_nvcc()


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.skipif(nvcc is None, reason="no nvcc on PATH or in CUDA_HOME")
def test_kernels_compile_without_warnings_and_spills():
    rows = cuda_resources.resources(nvcc)
    assert {arch for arch, _ in rows} == set(cuda_resources.ARCHS)
    for name, used in rows.items():
        assert used["stack"] == 0, (name, used)
        assert used["spills"] == 0, (name, used)
    version, table = cuda_resources.read_table()
    if version != cuda_resources.release(nvcc):
        return  # another compiler: its registers tell nothing about a change here
    hint = "python tests/helpers/cuda_resources.py --write"
    assert rows.keys() == table.keys(), hint
    for name, used in rows.items():
        before = table[name]
        assert used["registers"] <= 1.1 * before["registers"], (name, used, before, hint)
        assert used["barriers"] == before["barriers"], (name, used, before, hint)


def test_the_table_has_every_kernel_for_every_architecture():
    """No kernel spills, and none has more registers than a launch allows."""
    _, table = cuda_resources.read_table()
    kernels = {arch: {k for a, k in table if a == arch} for arch in cuda_resources.ARCHS}
    assert len(set(map(frozenset, kernels.values()))) == 1
    for source in cuda_resources.sources():
        header = source.with_suffix(".cuh").read_text()
        for line in header.splitlines():
            name = line.strip().partition("(")[0]
            if name.endswith("_kernel") and " " not in name:
                assert any(k.startswith(f"{name}<") or f" {name}<" in k for k in kernels["sm_90"])
    assert all(used["stack"] == used["spills"] == 0 for used in table.values())
    assert max(used["registers"] for used in table.values()) <= 255
