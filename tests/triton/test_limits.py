"""Tiles, grids and splits follow the limits of the device, which the tests fake."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from boft_ops._runtime import backend, gpu, tuned
from boft_ops.ops import rotate as ops
from boft_ops.ops import stages

if not backend.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_resources
import waves
from triton.runtime.errors import OutOfResources
from triton_cases import TABLES

from boft_ops.triton_kernels import config_rotate, launch, limits, rotate, rotate_backward
from boft_ops.triton_kernels import rotate_indexed as indexed

KIB = 1024
DEVICES = {name: found[1] for name, found in triton_resources.TARGETS.items()}


# --- What a device is asked -----------------------------------------------------------------------


@pytest.fixture
def properties(monkeypatch):
    """Properties that torch.cuda reports, as a NVIDIA L4's."""
    found = SimpleNamespace(
        multi_processor_count=58,
        shared_memory_per_block=48 * KIB,
        shared_memory_per_block_optin=99 * KIB,
        shared_memory_per_multiprocessor=100 * KIB,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1536,
        warp_size=32,
        major=8,
        minor=9,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", None)
    limits.limits_of.cache_clear()
    yield found
    limits.limits_of.cache_clear()


def test_the_limits_of_a_device_are_what_torch_reports(properties):
    assert limits.limits_of(0) == DEVICES["sm_89"]
    assert limits.limits_of(-1) == limits.H200  # the interpreter


def test_the_limits_of_amds_devices(properties, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties.shared_memory_per_block = 64 * KIB
    for name in ("shared_memory_per_block_optin", "shared_memory_per_multiprocessor"):
        delattr(properties, name)
    found = limits.limits_of(0)
    assert (found.program_shared, found.shared) == (64 * KIB, 64 * KIB)
    assert found.is_amd
    assert found.multiplies_halves


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [(4, 80, 33, 6), (8, 78, 57, 3), (8, 90, 81, 2), (8, 137, 112, 1), (32, 255, 500, 1)],
)
def test_programs_that_fit(warps, registers, shared, programs):
    """The first four are rotate's on an H200, by registers or by shared memory."""
    assert limits.H200.programs(warps, registers, shared * KIB) == programs


# --- Tiles ----------------------------------------------------------------------------------------


def structures():
    for size in (1, 8, 16, 31, 32, 64, 127, 128, 200, 255, 256):
        for chunk, stride in ((size, 1), (1, 2), (4, 8)):
            if size % chunk == 0:
                yield {"size": size, "chunk": chunk, "stride": stride}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", TABLES)
def test_every_device_has_a_tile_for_what_another_has(op, device):
    for dtype in config_rotate.DTYPE_CLASSES:
        for structure in structures():
            if "16" in dtype and not DEVICES[device].multiplies_halves:
                continue  # torch has it
            tile = TABLES[op].default(structure, dtype, DEVICES[device])
            other = TABLES[op].default(structure, dtype, limits.H200)
            assert (tile is None) == (other is None)


def test_the_declared_resources_are_those_of_the_compiler():
    """Shared memory at most, up to compute capability 9; registers on an H200, within a tenth."""
    _, table = triton_resources.read_table()
    seen = set()
    for op, tiles in TABLES.items():
        for target, (architecture, device) in triton_resources.TARGETS.items():
            if architecture[0] != "cuda" or not device.multiplies_halves:
                continue
            cases = dict(triton_resources.cases(target))
            for entry in {*tiles.half, *tiles.strided}:
                for name, case in cases.items():
                    constants, tile = case.constants, config_rotate.constants_of(entry.tile)
                    is_op = case.kernel.partition(":")[2] == f"{op}_kernel" or (
                        "X_GRAD" in constants
                        and constants["X_GRAD"] == (op == "rotate_backward")
                        and op in ("rotate_backward", "rotate_stage_grad")
                    )
                    halves = {"bf16", "fp16"} & set(case.pointers.values())
                    if not (is_op and halves and constants.items() >= tile.items()):
                        continue
                    used = table[target, name]
                    options = case.num_warps, case.num_stages
                    if options != (entry.tile.num_warps, entry.tile.num_stages):
                        continue
                    seen.add((op, entry))
                    if target != "sm_100":  # takes some KiB more, of 227
                        assert used["shared"] <= entry.shared * KIB, (name, entry, used)
                    plain = constants["STRIDE"] == 1 or entry in tiles.strided
                    if target == "sm_90" and op == "rotate" and plain and entry.registers != 128:
                        assert used["registers"] <= 1.1 * entry.registers, (name, entry, used)
    halves = {(op, e) for op, tiles in TABLES.items() for e in (*tiles.half, *tiles.strided)}
    assert {e for e in halves if e[1].capability or e[1].shared > 48} <= seen


def test_other_kernels_need_no_more_than_every_device_has():
    """They have one tile for all devices. The sums of segments take the tiles of a rotation's."""
    _, table = triton_resources.read_table()
    tiled = "rotate", "segment_stage_grads"
    others = [used for (_, name), used in table.items() if not name.startswith(tiled)]
    assert len(others) > 500
    assert max(used["shared"] for used in others) <= 48 * KIB


# --- A tile that does not fit ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("device", ["sm_90", "sm_86", "gfx1100"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", TABLES)
def test_smaller_tiles_are_legal_and_come_to_an_end(op, dtype, device, size):
    structure = {"size": size, "chunk": size, "stride": 1}
    tile = TABLES[op].default(structure, dtype, DEVICES[device])
    sizes = []
    while tile is not None:
        sizes.append(tile.rows * (tile.columns + tile.inner) * tile.num_stages)
        assert len(sizes) == 1 or TABLES[op].is_legal(tile, structure, dtype)
        tile = TABLES[op].smaller(tile, structure, dtype)
    assert sizes == sorted(set(sizes), reverse=True)
    assert op == "rotate_backward" or len(sizes) > 1


class TooLarge:
    """A kernel that has no room in shared memory for a tile of more than 16 rows."""

    def __init__(self, kernel):
        self.kernel, self.fn, self.asked = kernel, kernel.fn, []

    def __getitem__(self, grid):
        def run(*arguments, ROWS, **options):
            self.asked.append(ROWS)
            if ROWS > 16:
                raise OutOfResources(114688, 101376, "shared memory")
            return self.kernel[grid](*arguments, ROWS=ROWS, **options)

        return run


@pytest.fixture
def too_large(monkeypatch):
    kernels = {}
    for module, name in (
        (rotate, "rotate_kernel"),
        (rotate_backward, "rotate_backward_kernel"),
        (indexed, "rotate_indexed_kernel"),
    ):
        kernels[name] = TooLarge(getattr(module, name))
        monkeypatch.setattr(module, name, kernels[name])
    builders = (
        (rotate, "_rotate_launch"),
        (rotate_backward, "_backward_launch"),
        (rotate_backward, "_stage_grad_launch"),
        (indexed, "_indexed_launch"),
    )
    for module, name in builders:
        getattr(module, name).cache_clear()
    monkeypatch.setattr(launch, "_too_large", set())
    yield kernels
    for module, name in builders:
        getattr(module, name).cache_clear()


def test_a_tile_that_does_not_fit_is_replaced_with_one_warning(too_large):
    x, stage = torch.randn(70, 32).bfloat16(), torch.eye(16).expand(2, 16, 16) + 0.1
    with pytest.warns(RuntimeWarning) as warned:
        y = rotate.rotate(x, stage, 16, 1, False)
    (message,) = [str(warning.message) for warning in warned]
    assert "rotate_kernel {" in message
    before, _, after = message.partition(" does not fit this GPU ")
    assert "'ROWS': 64" in before
    assert "'ROWS': 16" in after.partition("Taken instead: ")[2]
    torch.testing.assert_close(y, ops.rotate_reference(x, stage, 16, 1, False), rtol=1e-2, atol=0.1)
    asked = list(too_large["rotate_kernel"].asked)
    assert asked == sorted(asked, reverse=True)
    assert asked[-1] == 16
    rotate.rotate(x, stage, 16, 1, False)  # no second warning, which would be an error
    assert too_large["rotate_kernel"].asked == [*asked, 16]


@pytest.mark.filterwarnings("ignore:.*does not fit this GPU")
def test_gradients_and_indexed_rotations_go_on_in_smaller_tiles(too_large):
    x, grad, stage = torch.randn(70, 64), torch.randn(70, 64), torch.randn(2, 32, 32)
    x_grad, partials = rotate_backward.rotate_backward(grad, x, stage, 32, 1, False, 2)
    expected = ops.rotate_backward.reference(grad, x, stage, 32, 1, False, 2)
    torch.testing.assert_close(x_grad, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(partials.sum(0), expected[1].sum(0), rtol=1e-4, atol=1e-3)
    alone = rotate_backward.rotate_stage_grad(x, grad, 32, 32, 1, 2)
    torch.testing.assert_close(alone.sum(0), expected[1].sum(0), rtol=1e-4, atol=1e-3)
    index = torch.zeros(70, dtype=torch.int32)
    y = indexed.rotate_indexed(x, stage[None], index, 32, 1, False)
    torch.testing.assert_close(y, ops.rotate_reference(x, stage, 32, 1, False))


def test_a_measured_tile_that_does_not_fit_is_an_error(too_large):
    """The tuner must not time another tile in its place."""
    x, stage = torch.randn(70, 32), torch.randn(2, 16, 16)
    with pytest.raises(OutOfResources):
        rotate.rotate(x, stage, 16, 1, False, tile=(("rows", 32),))
    assert too_large["rotate_kernel"].asked == [32]


def test_a_kernel_that_fits_in_no_tile_raises(too_large, monkeypatch):
    monkeypatch.setattr(TABLES["rotate"].__class__, "smaller", lambda *_: None)
    with pytest.raises(OutOfResources):
        rotate.rotate(torch.randn(70, 32), torch.randn(2, 16, 16), 16, 1, False)


# --- What a device leaves to torch ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["sm_75", "sm_80"])
def test_half_precision_before_capability_8_is_torchs(monkeypatch, device, dtype):
    monkeypatch.setenv("BOFT_OPS_AUTOTUNE", "0")
    monkeypatch.setattr(limits, "limits_of", lambda number: DEVICES[device])
    tuned.forget()
    gpu._cached_has_matrix_units.cache_clear()
    served = device == "sm_80" or dtype == torch.float32
    with FakeTensorMode():
        x, stage = (torch.empty(s, device="cuda") for s in ((8, 32), (2, 16, 16)))
        args = x.to(dtype), stage, 16, 1, False
        assert ops.rotate_rows.choose(args).backend == ("triton" if served else "reference")
        with backend.force("triton"):
            if served:
                assert ops.rotate_rows.choose(args).backend == "triton"
            else:
                with pytest.raises(RuntimeError, match=f"{dtype} from compute capability 8.0 on"):
                    ops.rotate_rows(*args)
    gpu._cached_has_matrix_units.cache_clear()
    tuned.forget()


# --- Waves ----------------------------------------------------------------------------------------


def test_the_table_of_waves():
    """Figures of the launches as they are; where there are several waves, they are nearly full.

    One wave need not be full: on an H200 two or three programs of a multiprocessor took less time
    than as many as fit.
    """
    hint = "python tests/helpers/waves.py --write"
    found = [tuple(map(str, row)) for row in waves.launches()]
    lines = waves.TABLE.read_text().splitlines()
    assert [",".join(row) for row in (waves.COLUMNS, *found)] == lines, hint
    for gpu_name, rows, features, kernel, size, _, programs, n_waves, fill in found:
        # A T4 runs float32, whose registers there are fewer than on the H200 of the table of tiles.
        least = 0.4 if gpu_name == "T4" else 0.8
        case = gpu_name, rows, features, kernel, size, programs, n_waves
        assert float(fill) >= (least if float(n_waves) > 1 else 0.3), case
    best = {row[3:5]: row for row in found if row[:3] == ("H200", "8192", "4096")}
    assert all(float(row[7]) <= 1 for row in best.values())


def test_a_launch_on_another_device_has_another_grid(monkeypatch):
    grids = set()
    for device in ("sm_90", "sm_80", "sm_89"):
        monkeypatch.setattr(rotate, "limits_of", lambda number, device=device: DEVICES[device])
        build = rotate._rotate_launch.__wrapped__
        grids.add(build(0, torch.bfloat16, 8192, 4096, 16, 16, 1, False, ())._grid)
    assert len(grids) == 3


def test_splits_are_those_of_the_device_alone(monkeypatch):
    """So that the sums of a device have the same bits in every run."""
    stage = stages.plan(2, 8, "cuda")[0]
    found = []
    for device in ("sm_90", "sm_80", "sm_89", "sm_90"):
        monkeypatch.setattr(gpu, "limits_of", lambda number, device=device: DEVICES[device])
        stages._cached_splits.cache_clear()
        rows = [torch.empty(n, 4096, device="meta") for n in (1, 8192, 100000)]
        (splits,) = {stage.splits(x) for x in rows}
        found.append(splits)
    stages._cached_splits.cache_clear()
    assert found[0] == found[3]
    assert len(set(found)) == 3


def test_many_rotations_take_several_groups_a_program():
    from boft_ops.triton_kernels.config import config_for

    one, many = (config_for("stage_from_skew", m=2, b=8, many=many) for many in (False, True))
    assert (one.G, one.C, many.G, many.C) == (1, 2, 4, 8)
    assert config_for("stage_from_skew_backward", m=2, b=8, many=True)[:3] == (8, 4, 4)
    assert config_for("stage_from_skew", m=1, b=16, many=True) == config_for(
        "stage_from_skew", m=1, b=16, many=False
    )
