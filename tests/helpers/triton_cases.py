"""Lists every Triton kernel with every config it can be launched with, for offline compilation.

``compile_cases(limits)`` yields one ``Case`` a compilation, of what a device with these limits can
be asked for by default. ``triton_resources.py`` compiles them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from boft_ops.triton_kernels import config_scale, rotate, rotate_backward, rotate_indexed
from boft_ops.triton_kernels.config import MAX_BLOCK_SIZE, Config, config_for
from boft_ops.triton_kernels.config_rotate import BAND, DTYPE_CLASSES, Tile, constants_of
from boft_ops.triton_kernels.limits import Limits

MAX_COMPOSED_SIZE = 256  # largest stage that compose makes
MAX_ROTATION_SIZE = 64  # largest group that stage_from_skew keeps in one program
TABLES = {
    "rotate": rotate.TILES,
    "rotate_indexed": rotate_indexed.TILES,
    "rotate_backward": rotate_backward.BACKWARD_TILES,
    "rotate_stage_grad": rotate_backward.STAGE_GRAD_TILES,
    "segment_stage_grads": rotate_backward.STAGE_GRAD_TILES,
}
TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


class Case(NamedTuple):
    """One kernel with one config, as offline compilation needs it.

    Attributes:
        kernel: ``"module:kernel"`` under triton/.
        constants: values of its constexpr arguments. An absent tensor is one too: its pointer is
            None.
        pointers: element type of each remaining pointer, in Triton's names ("fp32"). All other
            arguments are i32.
        num_warps: warps per program.
        num_stages: stages of software pipelining.
        everywhere: True to compile for every target, False for ``triton_resources.FULL`` alone.
            False saves time where a case differs from a compiled one only in its masks or in the
            dtype of its loads and stores.
    """

    kernel: str
    constants: dict[str, Any]
    pointers: dict[str, str]
    num_warps: int
    num_stages: int
    everywhere: bool = True


def compile_cases(limits: Limits) -> Iterator[Case]:
    """Cases of all kernels on a device."""
    yield from stage_cases()
    yield from rotate_cases(limits)
    yield from scale_cases()


def is_typical(case: Case, limits: Limits) -> bool:
    """True for what a BOFT(2, 8) layer asks of the small kernels, and for rows of every structure.

    The rows are in half precision, or float32 if the device leaves that to torch.
    """
    constants = case.constants
    if "INTERPRETED" in constants:  # a kernel of rows
        return case.everywhere and ("bf16" in case.pointers.values()) == limits.multiplies_halves
    sizes = constants["b"], constants.get("m", 2), constants.get("s", 8)
    return case.everywhere and sizes == (8, 2, 8)


# Kernels that make the stages: op that chooses the config, dtypes of the parameters, and element
# types of the pointers. PARAMETER is the dtype of the parameters; COMPUTE is float32, or float64 if
# the parameters are float64.
PARAMETER, COMPUTE = "parameter", "compute"
STAGE_KERNELS = {
    "cayley:cayley_kernel": (
        "cayley",
        ("fp32", "fp64", "bf16", "fp16"),
        {"skew_ptr": PARAMETER, "drop_mask_ptr": "i1", "blocks_ptr": PARAMETER},
    ),
    "cayley:cayley_backward_kernel": (
        "cayley_backward",
        ("fp32", "fp64", "bf16", "fp16"),
        {"blocks_ptr": PARAMETER, "drop_mask_ptr": "i1"}
        | dict.fromkeys(("grad_ptr", "skew_grad_ptr"), PARAMETER),
    ),
    "compose:compose_kernel": (
        "compose",
        ("fp32", "fp64"),
        dict.fromkeys(("factor_ptr", "inner_ptr", "outer_ptr"), PARAMETER),
    ),
    "compose:compose_backward_kernel": (
        "compose",
        ("fp32", "fp64"),
        dict.fromkeys(
            ("factor_ptr", "inner_ptr", "grad_ptr", "factor_grad_ptr", "inner_grad_ptr"), PARAMETER
        ),
    ),
    "stage_from_skew:stage_from_skew_kernel": (
        "stage_from_skew",
        ("fp32", "fp64", "bf16"),
        {"skew_ptr": PARAMETER, "drop_mask_ptr": "i1"}
        | dict.fromkeys(("blocks_ptr", "scratch_ptr", "stage_ptr"), COMPUTE),
    ),
    "stage_from_skew:stage_from_skew_backward_kernel": (
        "stage_from_skew_backward",
        ("fp32", "fp64"),
        {"drop_mask_ptr": "i1"}
        | dict.fromkeys(("blocks_ptr", "grad_ptr", "scratch_ptr", "skew_grad_ptr"), PARAMETER),
    ),
}


def stage_cases() -> Iterator[Case]:
    """Cases of the kernels that make the stages, one or more for each reachable config.

    Blocks whose size is a power of two have no dropout mask and come in every dtype. Padded blocks
    are float32 and have a mask, if the kernel takes one.
    """
    for kernel, (op, dtypes, pointers) in STAGE_KERNELS.items():
        for structure, config_ in reachable_configs(op):
            exact = structure["b"] == config_.B
            constants = {k: v for k, v in structure.items() if k != "many"} | config_._asdict()
            num_warps = constants.pop("num_warps")
            if exact and "drop_mask_ptr" in pointers:
                constants["drop_mask_ptr"] = None
            for dtype in dtypes if exact else dtypes[:1]:
                names = {PARAMETER: dtype, COMPUTE: "fp64" if dtype == "fp64" else "fp32"}
                types = {
                    pointer: names.get(type_, type_)
                    for pointer, type_ in pointers.items()
                    if pointer not in constants
                }
                # One stage: these kernels have no loop to pipeline.
                yield Case(kernel, constants, types, num_warps, 1, exact and dtype == "fp32")


def structures(op: str) -> Iterator[dict[str, int]]:
    """Every structure that ``op`` takes, as arguments of ``config.config_for``."""
    block_sizes = range(1, MAX_BLOCK_SIZE + 1)
    if op in ("cayley", "cayley_backward"):
        yield from ({"b": b} for b in block_sizes)
    elif op == "compose":
        for b in block_sizes[1::2]:
            s = b
            while 2 * s <= MAX_COMPOSED_SIZE:
                yield {"b": b, "s": s}
                s *= 2
    else:
        for b in block_sizes:
            yield {"m": 1, "b": b}
            m = 2
            while b % 2 == 0 and b << (m - 1) <= MAX_ROTATION_SIZE:
                yield {"m": m, "b": b}
                yield {"m": m, "b": b, "many": True}
                m += 1


def reachable_configs(op: str) -> Iterator[tuple[dict[str, int], Config]]:
    """Every config that ``config.config_for(op)`` can return, with a structure that leads to it.

    A config comes once for each m, because the code of stage_from_skew depends on m too. It comes
    for the smallest padded b and for the power of two itself, which needs no masks.
    """
    seen = set()
    for structure in structures(op):
        chosen = config_for(op, **structure)
        key = chosen, structure.get("m"), structure["b"] == chosen.B
        if key not in seen:
            seen.add(key)
            yield structure, chosen


def rotate_cases(limits: Limits) -> Iterator[Case]:
    """Cases of the rotate kernels, one for each reachable tile and structure."""
    for op in TABLES:
        for tile, structure in reachable_tiles(op, limits):
            if tile is not None:
                yield rotate_case(op, tile, structure)
                if op == "rotate" and structure["dtype"] == "bfloat16" and structure["stride"] == 1:
                    yield factor_case(rotate_case(op, tile, structure))


def reachable_tiles(op: str, limits: Limits) -> Iterator[tuple[Tile | None, dict[str, Any]]]:
    """Every tile that the table of an op can return for a device, with structures it is for."""
    for dtype, dtype_class in DTYPE_CLASSES.items():
        sizes = {entry.size for entry in getattr(TABLES[op], dtype_class)} | {BAND, 2 * BAND}
        for size in sorted(sizes):
            odd = 3 if size == BAND else size - 1
            for layout in ((size, size, 1), (size, 4, 8), (size, 2, 8), (odd, odd, 1)):
                structure = dict(zip(("size", "chunk", "stride"), layout, strict=True))
                tile = TABLES[op].default(structure, dtype, limits)
                yield tile, structure | {"dtype": dtype}


def factor_case(case: Case) -> Case:
    """Case of rotate with a factor for each row, as a merged weight has it."""
    constants = {k: v for k, v in case.constants.items() if k != "factor_ptr"}
    constants["TRANSPOSE"] = True
    pointers = case.pointers | {"factor_ptr": "fp32"}
    return case._replace(constants=constants, pointers=pointers, everywhere=False)


def rotate_case(op: str, tile: Tile, structure: dict[str, Any]) -> Case:
    """Case of one tile. Strided structures are transposed, others are not.

    The usual structures in bfloat16 and float32 are compiled for every target. float16 differs from
    bfloat16 in the names of its instructions alone.
    """
    dtype = structure["dtype"]
    row_type = TRITON_NAMES[dtype]
    sum_type = "fp64" if dtype == "float64" else "fp32"
    constants = {name.upper(): structure[name] for name in ("size", "chunk", "stride")}
    constants["TRANSPOSE"] = structure["stride"] > 1
    constants |= {"INTERPRETED": False} | constants_of(tile)
    if op in ("rotate", "rotate_indexed"):
        pointers = {"x_ptr": row_type, "stage_ptr": sum_type, "y_ptr": row_type}
        if op == "rotate_indexed":
            pointers["index_ptr"] = "i32"
        else:
            constants["factor_ptr"] = None
    elif op == "segment_stage_grads":
        del constants["TRANSPOSE"]
        pointers = {"x_ptr": row_type, "grad_ptr": row_type, "partials_ptr": sum_type}
        pointers["ends_ptr"] = "i32"
    else:
        constants["X_GRAD"] = op == "rotate_backward"
        pointers = {"x_ptr": row_type, "grad_ptr": row_type, "partials_ptr": sum_type}
        if op == "rotate_backward":
            pointers |= {"stage_ptr": sum_type, "x_grad_ptr": row_type}
        else:
            constants |= {"stage_ptr": None, "x_grad_ptr": None}
    kernel = {
        "rotate": "rotate:rotate_kernel",
        "rotate_indexed": "rotate_indexed:rotate_indexed_kernel",
        "segment_stage_grads": "segment_stage_grads:segment_stage_grads_kernel",
    }.get(op, "rotate_backward:rotate_backward_kernel")
    usual = structure["size"] & (structure["size"] - 1) == 0 and structure["chunk"] != 2
    everywhere = usual and dtype in ("bfloat16", "float32")
    return Case(kernel, constants, pointers, tile.num_warps, tile.num_stages, everywhere)


def scale_cases() -> Iterator[Case]:
    """Cases of the scale kernels, one for each dtype of the rows."""
    for row_type in ("bf16", "fp16", "fp32", "fp64"):
        compute_type = "fp64" if row_type == "fp64" else "fp32"
        kernels = {
            "scale": dict.fromkeys(("x_ptr", "y_ptr", "center_ptr", "bias_ptr"), row_type)
            | {"scale_ptr": compute_type},
            "scale_backward": dict.fromkeys(
                ("grad_ptr", "x_ptr", "center_ptr", "x_grad_ptr"), row_type
            )
            | dict.fromkeys(("scale_ptr", "sums_ptr"), compute_type),
        }
        for op, pointers in kernels.items():
            tiles = config_scale.FORWARD if op == "scale" else config_scale.BACKWARD
            tile = tiles.config
            constants = {"INTERPRETED": False, "ROWS": tile.ROWS, "COLUMNS": tile.COLUMNS}
            launch = tile.num_warps, tile.num_stages
            everywhere = row_type in ("bf16", "fp32")
            yield Case(f"scale:{op}_kernel", constants, pointers, *launch, everywhere)
