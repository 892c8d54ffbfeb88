"""Every CUDA kernel, compiled for GPUs that are not there: no warning, nothing is spilled.

Files that the committed table proves, because their sources are the same, are compiled as a sample.
"""

import cuda_resources
import pytest

from boft_ops._runtime import build

nvcc = build.find_nvcc()


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.skipif(nvcc is None, reason="no nvcc on PATH or in CUDA_HOME")
def test_kernels_compile_without_warnings_and_spills():
    unproven, proven = cuda_resources.sorted_jobs(nvcc)
    jobs = [*unproven, *proven[:: cuda_resources.SAMPLE]]
    rows = cuda_resources.resources(nvcc, jobs)
    for name, used in rows.items():
        assert used["stack"] == 0, (name, used)
        assert used["spills"] == 0, (name, used)
    version, table = cuda_resources.read_table()
    if version != cuda_resources.release(nvcc):
        assert {arch for arch, _ in rows} == set(cuda_resources.ARCHS)
        return  # another compiler: its registers tell nothing about a change here
    hint = "python tests/helpers/cuda_resources.py --write"
    done = {(source.name, arch) for source, arch in jobs}
    proven_rows = {key for key, row in table.items() if (row["file"], key[0]) not in done}
    assert rows.keys() | proven_rows == table.keys(), hint
    for name, used in rows.items():
        before = table[name]
        assert used["registers"] <= 1.1 * before["registers"], (name, used, before, hint)
        assert used["barriers"] == before["barriers"], (name, used, before, hint)


def test_the_page_has_the_registers_of_rows_that_lie_apart():
    _, table = cuda_resources.read_table()
    page = (cuda_resources.ROOT / "docs" / "cuda.md").read_text()
    kernels = {
        "rotate": "rotate_strided_kernel<bfloat16>",
        "rotate_backward": "gram_strided_kernel<bfloat16, true>",
        "rotate_stage_grad": "gram_strided_kernel<bfloat16, false>",
    }
    for name, kernel in kernels.items():
        found = [table[arch, kernel]["registers"] for arch in cuda_resources.ARCHS]
        assert f"| {name} | {' | '.join(map(str, found))} |" in page


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
