"""Broken CUDA kernels must fail the emulated tests: each of these is wrong in one place."""

import shutil
import sys
from pathlib import Path

import cuda_emulation
import pytest
from forked import run_pytest

from boft_ops._runtime import paths

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None, reason="emulated with GCC on Linux"
    ),
]
TESTS = Path(__file__).parent.parent
# file, what stands there, what is put in its place, the tests that must notice
MUTATIONS = {
    "no barrier before a column is read": (
        "cayley.cuh",
        "    sync_team<B>();\n    const double inverse",
        "    const double inverse",
        "test_cayley and 16 and dtype0 and none",
    ),
    "no barrier before results replace parameters": (
        "cayley_small.cuh",
        "  __syncwarp();  // every lane has read its parameters",
        "",
        "test_cayley and 8 and dtype0 and none",
    ),
    "no barrier before gradients replace matrices": (
        "cayley_small.cuh",
        "  __syncwarp();  // every lane has read its matrices",
        "",
        "test_cayley and 8 and dtype0",
    ),
    "no barrier between factors": (
        "compose.cuh",
        "    __syncthreads();\n    W* const swap = now;\n    now = before",
        "    W* const swap = now;\n    now = before",
        "test_compose and 4-4-0",
    ),
    "no barrier before rows are overwritten": (
        "rotate.cuh",
        "  __syncwarp();  // every lane has read the rows",
        "",
        "test_rotate and 16-16-1 and dtype0",
    ),
    "no barrier between loading and multiplying": (
        "gram.cuh",
        "    __syncthreads();\n    T* left",
        "    T* left",
        "test_rotate and 32-32-1",
    ),
    "copies are not waited for": (
        "rotate.cuh",
        "await_copies<1>();",
        "await_copies<2>();",
        "test_every_number_of_rows and 200",
    ),
    "no barrier before rows that others loaded are multiplied": (
        "halves.cuh",
        "    __syncthreads();  // and every warp has read the other buffer",
        "",
        "test_every_number_of_rows",
    ),
    "rows are multiplied before they are there": (
        "halves.cuh",
        "await_copies<0>();",
        "await_copies<1>();",
        "test_rotate and 16-16-1 and dtype2",
    ),
    "another row's right operand": (
        "halves.cuh",
        "w / 2 * (Width / 4) + w % 2",
        "w / 2 * (Width / 4) + 1 - w % 2",
        "test_rotate and 16-16-1 and dtype2",
    ),
    "a stage is overwritten while it is used": (
        "rotate_indexed.cuh",
        "        __syncthreads();  // every warp has used the last one",
        "",
        "test_rotate_indexed and mixed",
    ),
    "rows of other adapters": (
        "rotate_indexed.cuh",
        "return own[i] == adapter;",
        "return own[i] >= 0;",
        "test_rotate_indexed and mixed",
    ),
    "rows of the segment before": (
        "segments.cuh",
        "end_of(segment - 1)",
        "end_of(segment - 2)",
        "test_segment_stage_grads and dtype0",
    ),
    "wrong chunk of a strided group": (
        "rows.cuh",
        "chunk * l.segment + rest;",
        "rest;",
        "test_rotate and 8-4-2",
    ),
    "wrong half of a block": (
        "compose.cuh",
        "(half == 0 ? m.first : m.second)",
        "(half == 0 ? m.second : m.first)",
        "test_compose",
    ),
    "a partial sum left out": (
        "compose.cuh",
        "split < splits; ++split)\n        sum += grad",
        "split < 1; ++split)\n        sum += grad",
        "test_compose",
    ),
    "strided rows are rotated before they are there": (
        "strided.cuh",
        "await_copies<kStrips - 2>();",
        "await_copies<kStrips - 1>();",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "strided rows are loaded over those that are stored": (
        "strided.cuh",
        "    __syncthreads();  // the rows are there, and every thread has stored those before",
        "",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "strided rows are stored before all are rotated": (
        "strided.cuh",
        "    __syncthreads();  // every warp has rotated its group",
        "",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "another column of a strided group": (
        "strided.cuh",
        "q % 2 * 2 + g % 2",
        "q % 2 * 2 + 1 - g % 2",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "strided rows are summed before they are there": (
        "strided_gram.cuh",
        "await_copies<kStrips - 2>();",
        "await_copies<kStrips - 1>();",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "strided rows are loaded over those that are summed": (
        "strided_gram.cuh",
        "    __syncthreads();  // the rows are there, and every thread has stored those before",
        "",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "gradients of strided rows are stored before all are rotated": (
        "strided_gram.cuh",
        "      __syncthreads();  // every warp has rotated its group",
        "",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "strided rows of the next range": (
        "strided_gram.cuh",
        "at, exists);",
        "at, true);",
        "test_rotate_of_eight_neighboring_groups and 8-8-260",
    ),
    "the other rows of a pair": (
        "strided_gram.cuh",
        "const int odd = at ^ 16;",
        "const int odd = at;",
        "test_rotate_of_eight_neighboring_groups",
    ),
    "another column of a strided Gram matrix": (
        "strided_gram.cuh",
        "? sums[n][2 * j + half]",
        "? sums[j][2 * n + half]",
        "test_gram_matrices_of_neighboring_groups",
    ),
    "a range of strided rows left out": (
        "strided_gram.cuh",
        "term < terms; ++term",
        "term < 1; ++term",
        "test_rotate_of_eight_neighboring_groups and 8-8-260",
    ),
    "dropout without its mask": (
        "stage_from_skew.cuh",
        "active && drop != nullptr && drop[block]",
        "false",
        "test_stage_from_skew and some and 6",
    ),
    "no barrier before blocks replace parameters": (
        "stage_small.cuh",
        "  __syncthreads();  // every thread has read its parameters",
        "",
        "test_stage_of_small_blocks",
    ),
    "no barrier before blocks are joined": (
        "stage_small.cuh",
        "  __syncthreads();\n  const auto place",
        "  const auto place",
        "test_stage_of_small_blocks",
    ),
    "no barrier between joined factors": (
        "stage_small.cuh",
        "                  });\n    __syncthreads();",
        "                  });",
        "test_stage_of_small_blocks",
    ),
    "no barrier between the gradients of factors": (
        "stage_small.cuh",
        "    __syncthreads();\n    outer_grad = inner_grad;",
        "    outer_grad = inner_grad;",
        "test_stage_of_small_blocks",
    ),
    "no barrier before a stage's gradient is there": (
        "stage_small.cuh",
        "  sum_share<B>(s, grad, splits, outer_grad);\n  await_copies<0>();\n  __syncthreads();",
        "  sum_share<B>(s, grad, splits, outer_grad);\n  await_copies<0>();",
        "test_stage_of_small_blocks",
    ),
    "no barrier before gradients replace small blocks": (
        "stage_small.cuh",
        "  __syncthreads();  // every thread has read its matrices",
        "",
        "test_stage_of_small_blocks",
    ),
    "the other half of a small block": (
        "stage_small.cuh",
        "2 * high + half",
        "2 * high + 1 - half",
        "test_stage_of_small_blocks",
    ),
    "a partial sum of a small stage left out": (
        "stage_small.cuh",
        "split < splits; ++split)\n#pragma",
        "split < 1; ++split)\n#pragma",
        "test_stage_of_small_blocks",
    ),
    "dropout of small blocks without its mask": (
        "stage_small.cuh",
        "own.exists && drop != nullptr && drop[own.block]",
        "false",
        "test_stage_of_small_blocks",
    ),
    "vectors at addresses that they do not fit": (
        "shares.cuh",
        "vectors ? count / 4 * 4 : 0",
        "count / 4 * 4",
        "test_stage_of_operands_that_vectors_do_not_fit",
    ),
}


@pytest.fixture(scope="module")
def whole():
    """The folder of the unbroken library, whose objects the others share."""
    return cuda_emulation.build_once()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_tests_notice(name, whole, tmp_path):
    file, before, after, tests = MUTATIONS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(paths.csrc(), csrc)
    source = csrc / "cuda" / file
    text = source.read_text()
    assert before in text, f"{file}: expected {before!r}"
    source.write_text(text.replace(before, after))
    built = tmp_path / "built"
    library = cuda_emulation.build(csrc, built, reuse=whole, changed=f"/cuda/{file}")
    log = tmp_path / "log"
    arguments = ["-k", tests, "--import-mode=importlib", str(TESTS / "cuda" / "test_kernels.py")]
    status = run_pytest(arguments, TESTS.parent, log, BOFT_EMULATED_LIBRARY=str(library))
    text = log.read_text()
    # a wrong number, nothing else; or the emulation, that ended the process
    noticed = status == 1 and "AssertionError" in text
    assert noticed or status < 0, (status, text[-2000:])
