"""Launches with little host time, of a kernel that only notes its calls."""

import importlib

import pytest
import torch

from boft_ops._runtime import backend

if not backend.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)
launches = importlib.import_module("boft_ops.triton_kernels.launch")


class Compiled:
    """Result of ``kernel[grid](...)``, launched as Triton's own compiled kernel is."""

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
    monkeypatch.setattr(launches, "_compiled", {})
    monkeypatch.setattr(launches, "_is_compiled", lambda kernel: isinstance(kernel, Compiled))
    return Kernel()


def call(kernel, x, n=32, grid=3, y=None, num_warps=4, **constants):
    constants = {"FIRST": 1, "SECOND": 2} | constants
    launches.Launch(kernel, grid, (n,), constants, num_warps)(x, y)
    return kernel.notes[-1]


def test_the_second_call_goes_straight_to_the_compiled_kernel(kernel):
    x = torch.zeros(64)
    launch = launches.Launch(kernel, 3, (32,), {"FIRST": 1, "SECOND": 2}, 4)
    launch(x, None)
    ((kind, grid, arguments, options),) = kernel.notes
    assert (kind, grid, options["num_warps"], options["num_stages"]) == ("bound", (3, 1, 1), 4, 1)
    for i in range(2):
        launch(torch.ones(64), None)
        kind, grid, arguments = kernel.notes[-1]
        assert (len(kernel.notes), kind, grid) == (i + 2, "straight", (3, 1, 1))
        assert arguments[0].sum() == 64
        assert arguments[1:] == (None, 32, 2, 1)  # constants in the order of the signature


def test_another_size_goes_straight_to_it_too(kernel):
    call(kernel, torch.zeros(64))
    kind, grid, arguments = call(kernel, torch.zeros(48), n=48, grid=7)
    assert (kind, grid, arguments[1:]) == ("straight", (7, 1, 1), (None, 48, 2, 1))


def test_no_programs_are_not_launched(kernel):
    launches.Launch(kernel, 0, (0,), {"FIRST": 1, "SECOND": 2}, 4)(torch.zeros(0), None)
    assert kernel.notes == []


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64, dtype=torch.float64)},
        {"x": torch.zeros(65)[1:]},  # begins at no multiple of 16 bytes
        {"y": torch.zeros(64)},
        {"x": torch.empty(1 << 31, dtype=torch.int8)[:64].view(torch.float32)},  # AMD's: 64 bits
        {"n": 33},
        {"n": 1},
        {"n": 1 << 31},  # needs 64 bits
        {"num_warps": 8},
        {"FIRST": 3},
    ],
    ids=["dtype", "address", "none", "large", "multiple", "one", "wide", "warps", "constant"],
)
def test_what_triton_compiles_anew_for_is_bound_anew(kernel, other):
    x = torch.zeros(64)
    call(kernel, x)
    assert call(kernel, **{"x": x} | other)[0] == "bound"
    assert call(kernel, x)[0] == "straight"


def test_nothing_is_kept_of_what_was_not_compiled(kernel, monkeypatch):
    """Such are the interpreter's kernels, and those that are being compiled ahead."""
    monkeypatch.setattr(launches, "_is_compiled", lambda kernel: False)
    assert [call(kernel, torch.zeros(64))[0] for _ in range(2)] == ["bound", "bound"]


class OnCuda:
    """Stand-in for a tensor on a GPU, with all that a launch asks of one."""

    dtype = torch.float32

    def __init__(self, device):
        self.device = device

    def get_device(self):
        return self.device

    def data_ptr(self):
        return 1 << 12

    def untyped_storage(self):
        return torch.zeros(4).untyped_storage()


def test_a_launch_is_on_the_device_and_stream_of_its_tensors(kernel, monkeypatch):
    current = [0]

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, current[0] = current[0], self.device

        def __exit__(self, *_):
            current[0] = self.before

    class There(Compiled):
        def __getitem__(self, grid):
            return lambda *_, stream=None: self.notes.append((grid, current[0], stream))

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    raw = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, raw, lambda device: 100 + device, raising=False)
    monkeypatch.setattr(
        Kernel, "__getitem__", lambda self, grid: lambda *_, **__: There(self.notes)
    )
    launch = launches.Launch(kernel, 3, (32,), {"FIRST": 1, "SECOND": 2}, 4)
    for device in (0, 1):
        launch(OnCuda(device), None)  # compiled
        for _ in range(2):
            launch(OnCuda(device), None)
            assert kernel.notes[-1] == ((3, 1, 1), device, 100 + device)
    assert len(kernel.notes) == 4
    assert current == [0]
