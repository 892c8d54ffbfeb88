"""Launches without a new look at arguments that are as they were, with a kernel that only notes."""

import importlib

import pytest
import torch

from boft_ops import _backend

if not _backend.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)
_backend._launcher("rotate:rotate")
launches = importlib.import_module("boft_ops.triton_kernels.launch")


class Compiled:
    """What ``kernel[grid](...)`` returns; launched as Triton's own is."""

    def __init__(self, notes):
        self.notes = notes

    def __getitem__(self, grid):
        return lambda *arguments: self.notes.append(("straight", grid, arguments))


class Kernel:
    arg_names = ("x_ptr", "y_ptr", "n", "SECOND", "FIRST")

    def __init__(self):
        self.notes = []

    def fn(self):
        raise AssertionError("a kernel's Python is never called")

    def __getitem__(self, grid):
        def bind(*arguments, **options):
            self.notes.append(("bound", grid, arguments, options))
            return Compiled(self.notes)

        return bind


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launches, "_launchers", {})
    monkeypatch.setattr(launches, "_is_compiled", lambda result: isinstance(result, Compiled))
    return Kernel()


def call(kernel, x, n=32, grid=3, y=None, num_warps=4, **constants):
    constants = {"FIRST": 1, "SECOND": 2} | constants
    launches.launch(kernel, grid, (x, y), (n,), constants, num_warps)
    return kernel.notes[-1]


def test_the_second_call_goes_straight_to_the_compiled_kernel(kernel):
    x = torch.zeros(64)
    kind, grid, arguments, options = call(kernel, x)
    assert (kind, grid, options["num_warps"], options["num_stages"]) == ("bound", (3,), 4, 1)
    kind, grid, arguments = call(kernel, torch.ones(64), n=48, grid=7)
    assert (kind, grid) == ("straight", (7, 1, 1))
    assert arguments[0].sum() == 64
    assert arguments[1:] == (None, 48, 2, 1)  # constants in the order of the kernel's signature


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64, dtype=torch.float64)},
        {"x": torch.zeros(65)[1:]},  # begins at no multiple of 16 bytes
        {"y": torch.zeros(64)},
        {"n": 33},
        {"n": 1},
        {"n": 1 << 31},  # needs 64 bits
        {"num_warps": 8},
        {"FIRST": 3},
    ],
    ids=["dtype", "address", "none", "multiple", "one", "wide", "warps", "constant"],
)
def test_what_triton_compiles_anew_for_is_bound_anew(kernel, other):
    x = torch.zeros(64)
    call(kernel, x)
    assert call(kernel, **{"x": x} | other)[0] == "bound"
    assert call(kernel, x)[0] == "straight"


def test_nothing_is_kept_of_what_was_not_compiled(kernel, monkeypatch):
    """The interpreter's kernels, and those that are still being compiled."""
    monkeypatch.setattr(launches, "_is_compiled", lambda result: False)
    assert [call(kernel, torch.zeros(64))[0] for _ in range(2)] == ["bound", "bound"]
