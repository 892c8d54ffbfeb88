"""Section "cublas" of bench/gpu_decide.py, with a library that computes on a CPU."""

import ctypes
import re

import pytest
import torch
from bench_modules import decide_contest, decide_cublas, decide_lines

CPU = decide_contest.setting("cpu", 1.0)


def tensor_at(address, *shape):
    """float32 numbers at an address."""
    count = torch.Size(shape).numel()
    memory = (ctypes.c_float * count).from_address(address.value)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


class CublasLt:
    """cublasLt on a CPU, of the functions and numbers that the section uses, in float32.

    Args:
        alphas: False to have no algorithm with a vector of alphas.
        fault: added to every product.
    """

    def __init__(self, alphas=True, fault=0.0):
        self.alphas, self.fault, self.objects = alphas, fault, []

    def _new(self, out, value):
        self.objects.append(value)
        out._obj.value = len(self.objects)
        return 0

    def cublasLtCreate(self, out):
        return self._new(out, {})

    def cublasLtMatmulPreferenceCreate(self, out):
        return self._new(out, {})

    def cublasLtMatmulDescCreate(self, out, compute, scale):
        assert (compute, scale) == (68, 0)
        return self._new(out, {})

    def cublasLtMatrixLayoutCreate(self, out, type_, rows, columns, distance):
        assert type_ == 0
        return self._new(out, (rows.value, columns.value, distance.value))

    def _of(self, handle):
        return self.objects[handle.value - 1]

    def cublasLtMatmulDescSetAttribute(self, desc, attribute, value, size):
        assert size.value == ctypes.sizeof(value._obj)
        self._of(desc)[attribute] = value._obj.value
        return 0

    cublasLtMatmulPreferenceSetAttribute = staticmethod(lambda *arguments: 0)

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments):
        _, desc, *_, found, count = arguments
        if self._of(desc).get(2) == 3 and not self.alphas:
            return 15
        found._obj.algorithm[0], count._obj.value = 7, 1
        return 0

    def cublasLtMatmul(self, *arguments):
        _, desc, alpha, a, of_a, b, of_b, beta, c, of_c, y, of_y, found, *_ = arguments
        assert (found._obj.algorithm[0], of_c, c.value) == (7, of_y, y.value)
        d, n, _ = self._of(of_a)
        _, rows, _ = self._of(of_b)
        assert self._of(of_y) == (n, rows, n)  # column-major
        attributes = self._of(desc)
        assert attributes[3] == 1  # W^T
        vector = attributes.get(2) == 3
        assert (beta.value is None) == vector
        factor = tensor_at(alpha, n if vector else 1)
        result = tensor_at(b, rows, d) @ tensor_at(a, n, d).mT * factor + self.fault
        if attributes.get(7) == 4:
            result += tensor_at(ctypes.c_void_p(attributes[8]), n)
        tensor_at(y, rows, n).copy_(result)
        return 0


def measured(tmp_path, library):
    path = tmp_path / decide_lines.NAME
    writer = decide_lines.Writer(path, "cublas")
    decide_contest.run_parts(
        decide_cublas.parts(CPU, writer, library), writer, CPU.device, float("inf"), set()
    )
    lines = decide_lines.read(path)
    return lines, {figure.name for figure in decide_lines.figures(lines)}


def test_products_are_right_and_timed(tmp_path):
    lines, names = measured(tmp_path, CublasLt())
    assert names == {"plain", "alpha vector", "plain, bias", "alpha vector, bias", "torch"}
    facts = {line["name"]: line["algorithms"] for line in lines if line["kind"] == "facts"}
    assert facts == dict.fromkeys(names - {"torch"}, 1)
    assert not [line for line in lines if line["kind"] == "failed"]


@pytest.mark.parametrize(
    ("library", "left", "why"),
    [
        (
            CublasLt(alphas=False),
            {"plain", "plain, bias"},
            r"has no algorithm for it \(status 15\)",
        ),
        (CublasLt(fault=0.1), set(), "has a relative error of"),
    ],
)
def test_products_that_fail_are_left_out(tmp_path, library, left, why):
    lines, names = measured(tmp_path, library)
    assert names == left | {"torch"}
    failed = [line["why"] for line in lines if line["kind"] == "failed"]
    assert len(failed) == 4 - len(left)
    assert all(re.search(why, reason) for reason in failed)


def test_a_torch_without_the_library_is_told_so(tmp_path):
    lines, names = measured(tmp_path, None)
    assert names == set()
    assert lines[-1]["why"] == "RuntimeError: no libcublasLt.so is loaded"


def test_the_library_is_found_among_those_loaded(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f0 r-xp 0 8:1 1 /lib/libc.so.6\n7f1 r-xp 0 8:1 2 /no/libcublasLt.so.13\n7f2 rw 0\n"
    )
    with pytest.raises(OSError, match=r"/no/libcublasLt\.so\.13"):
        decide_cublas.loaded_library(maps)
