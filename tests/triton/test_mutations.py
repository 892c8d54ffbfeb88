"""Broken kernels must fail the tests: each of these takes one line away and runs a few of them."""

import shutil

import pytest
from forked import run_pytest

from boft_ops._runtime import backend, paths

ROOT = paths.HERE.parent
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed"),
    pytest.mark.skipif(not (ROOT / "triton").is_dir(), reason="not a checkout"),
]

# file, what stands there, what is put in its place, the tests that must notice
MUTATIONS = {
    "wrong chunk of a strided group": (
        "triton/groups.py",
        "(chunk * STRIDE + group % STRIDE) * CHUNK",
        "(chunk * STRIDE) * CHUNK",
        "triton/test_rotate.py::test_every_number_of_rows",
    ),
    "rows beyond the last": (
        "triton/rotate.py",
        "there = rows_axis(row < last - start, BANDS)",
        "there = rows_axis(row < last - start + 1, BANDS)",
        "triton/test_rotate.py::test_every_number_of_rows",
    ),
    "dropout without its mask": (
        "triton/stage_from_skew.py",
        "None if drop_mask_ptr is None else drop_mask_ptr + block",
        "None",
        "triton/test_small.py::test_stage_from_skew_splits_masks_dtypes",
    ),
    "wrong half of a block": (
        "triton/compose.py",
        "row = (e // r * s + e % r) * 2 * s",
        "row = (e % r) * 2 * s",
        "triton/test_small.py::test_compose_strides_splits_dtypes",
    ),
    "a partial sum left out": (
        "triton/compose.py",
        "range(splits)",
        "range(1)",
        "triton/test_small.py::test_compose_strides_splits_dtypes",
    ),
}


def run_in_copy(folder, *tests):
    """Return the exit status of these tests and what they print."""
    paths = [f"tests/{name}" for name in tests]
    status = run_pytest(paths, folder, folder / "log", TRITON_INTERPRET="1")
    return status, (folder / "log").read_text()


@pytest.fixture
def checkout(tmp_path):
    for folder in ("boft_ops", "triton", "tests", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_a_copy_passes(checkout):
    """Without it, the broken copies could fail for another reason."""
    tests = {mutation[-1] for mutation in MUTATIONS.values()}
    status, text = run_in_copy(checkout, *tests)
    assert status == 0, text[-2000:]


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_tests_notice(name, checkout):
    file, before, after, tests = MUTATIONS[name]
    source = checkout / file
    text = source.read_text()
    assert before in text, f"{file}: expected {before!r}"
    source.write_text(text.replace(before, after))
    status, text = run_in_copy(checkout, tests)
    # a wrong number, nothing else; or an access beyond a tensor that ended the process
    noticed = status == 1 and "AssertionError" in text
    assert noticed or status < 0, (status, text[-2000:])
