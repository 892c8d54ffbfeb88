"""The emulation itself: what it computes, and which mistakes it and the sanitizers notice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest

from boft_ops._runtime import paths

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None, reason="emulated with GCC on Linux"
    ),
]
HERE = Path(__file__).parent
RIGHT = ("neighbours", "copy", "product", "transposed")
NOTICED = {  # the result of each
    "deadlock": "wait for each other",
    "copy unaligned": "cp.async: unaligned",
    "too much shared memory": "more shared memory than a block can have",
}
SANITIZED = {
    "beyond shared memory": "heap-buffer-overflow",
    "beyond an array": "heap-buffer-overflow",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("emulation") / "cases"
    flags = [*cuda_emulation.FLAGS, "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    folders = [f"-I{paths.csrc()}", f"-I{HERE}", "-DBOFT_EMULATED", "-std=c++17"]
    source = HERE / "emulation_cases.cpp"
    subprocess.run(["g++", *flags, *folders, str(source), "-o", str(out)], check=True)
    return out


def run(program, case, order="forward"):
    environment = {**os.environ, "BOFT_EMULATION_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run([program, case], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("order", ["forward", "reverse", "scattered"])
@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right(program, case, order):
    done = run(program, case, order)
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("case", ["no barrier", "copy not awaited"])
def test_wrong_numbers_in_some_order(program, case):
    done = [run(program, case, order) for order in ("forward", "reverse", "scattered")]
    assert any(one.stdout == "wrong\n" for one in done)


@pytest.mark.parametrize("case", [*NOTICED, *SANITIZED])
def test_what_ends_the_process(program, case):
    done = run(program, case)
    assert done.returncode != 0
    assert {**NOTICED, **SANITIZED}[case] in done.stderr


def test_an_unknown_order_is_an_error(program):
    assert "expected forward, reverse or scattered" in run(program, "copy", "backwards").stderr
