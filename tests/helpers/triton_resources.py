"""Compiles every Triton kernel for GPUs that this machine lacks, and reports its resources.

``python tests/helpers/triton_resources.py --write`` compiles every case that
tests/data/triton_resources.csv does not prove, and rewrites that table.
tests/triton/test_compile.py compares with it.
``python tests/helpers/triton_resources.py sm_90`` prints, as JSON, the cases that are compiled for
every target, compiled for this one, or for each of several that are given. With ``rest`` before it
it prints the cases for this target alone. Most cases that the table proves are left out: the
installed Triton is the table's, so the same source makes the same kernel. A sample of these is
compiled all the same.

The cases come from ``triton_cases.py``.
"""

import ast
import csv
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from triton_cases import compile_cases, is_typical

from boft_ops.triton_kernels.limits import H200, Limits

TABLE = Path(__file__).resolve().parents[1] / "data" / "triton_resources.csv"
# mma: 1 if the matrix units are used; wide: 1 if global memory is accessed 16 bytes at a time
COLUMNS = ("registers", "shared", "stack", "barriers", "mma", "wide")
SAMPLE = 32  # one in so many proven cases is compiled all the same, to check the table
MMA = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma|v_wmma"
WIDE = (
    r"(?:ld|st)\.global\S*\.v4\.b32|cp\.async\.cg\S* .*, 0x10,"
    r"|(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)"
)
KIB = 1024
# (backend, architecture, threads per warp), and the limits of one device of that architecture by
# its data sheet: A100, H200, B200, MI300X, T4, A10, L4, RTX 5090, RX 7900 XTX, RX 9070 XT.
TARGETS = {
    "sm_80": (("cuda", 80, 32), Limits(108, 163 * KIB, 164 * KIB, 65536, 2048, 32, 80)),
    "sm_90": (("cuda", 90, 32), H200),
    "sm_100": (("cuda", 100, 32), H200._replace(multiprocessors=148, capability=100)),
    "gfx942": (("hip", "gfx942", 64), Limits(304, 64 * KIB, 64 * KIB, 131072, 2048, 64, 0)),
    "sm_75": (("cuda", 75, 32), Limits(40, 64 * KIB, 64 * KIB, 65536, 1024, 32, 75)),
    "sm_86": (("cuda", 86, 32), Limits(72, 99 * KIB, 100 * KIB, 65536, 1536, 32, 86)),
    "sm_89": (("cuda", 89, 32), Limits(58, 99 * KIB, 100 * KIB, 65536, 1536, 32, 89)),
    "sm_120": (("cuda", 120, 32), Limits(170, 99 * KIB, 100 * KIB, 65536, 1536, 32, 120)),
    "gfx1100": (("hip", "gfx1100", 32), Limits(48, 64 * KIB, 64 * KIB, 131072, 2048, 32, 0)),
    "gfx1201": (("hip", "gfx1201", 32), Limits(32, 64 * KIB, 64 * KIB, 131072, 2048, 32, 0)),
}
FULL = "sm_90"  # target of the cases that are not compiled everywhere
# Targets of the typical cases alone. They have the instructions of a target that is compiled in
# full, or fewer, and differ from it in their limits: the tiles are what is to be seen of them.
TYPICAL = ("sm_75", "sm_86", "sm_89", "sm_120", "gfx1100", "gfx1201")
# Groups above this size spill 36 bytes in half precision. No other tile that was tried is better.
SPILLS_ABOVE = {"gfx1100": 128}


def cases(target, rest=None):
    """Yield (label, case) of everything that is compiled for ``target``.

    Args:
        rest: True for the cases of this target alone, False for those of every target, None for
            both.
    """
    limits = TARGETS[target][1]
    for case in compile_cases(limits):
        if target in TYPICAL:
            wanted = is_typical(case, limits)
        else:
            wanted = (case.everywhere or target == FULL) and rest in (None, not case.everywhere)
        if wanted:
            yield label(case), case


def label(case):
    constants = " ".join(f"{k}={v}" for k, v in case.constants.items() if v is not None)
    types = "/".join(dict.fromkeys(case.pointers.values()))
    return f"{case.kernel} {types} {constants} num_warps={case.num_warps}"


def kernel_of(case):
    module, name = case.kernel.split(":")
    return getattr(importlib.import_module(f"boft_ops.triton_kernels.{module}"), name)


def source_of(target, case, used):
    """Digest of all that makes a row of the table, except Triton itself, and of the row.

    Source text counts as its syntax tree, without docstrings: comments, docstrings and line numbers
    make no other kernel. The tree is written out here, as ast.dump differs between Pythons.
    """
    options = sorted(case.constants.items()), sorted(case.pointers.items())
    how = TARGETS[target][0], case.num_warps, case.num_stages
    measured = [tree_of(inspect.getsource(function)) for function in (compiled, _cubin)]
    row = [used[key] for key in COLUMNS]
    everything = code_of(kernel_of(case)), options, how, measured, MMA, WIDE, row
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:16]


@functools.cache
def code_of(kernel):
    """Syntax trees of a Triton kernel and of the functions it calls, and its global constants."""
    from triton.runtime.jit import JITFunction

    code = [tree_of(kernel.src), kernel.noinline]
    nodes = [node for node in ast.walk(kernel.parse()) if isinstance(node, ast.Name)]
    own = {*kernel.arg_names, *(node.id for node in nodes if isinstance(node.ctx, ast.Store))}
    names = {node.id for node in nodes} - own
    for name in sorted(names & kernel.fn.__globals__.keys()):
        value = kernel.fn.__globals__[name]
        if isinstance(value, JITFunction):
            code.append((name, code_of(value)))
        elif not inspect.ismodule(value):
            code.append((name, repr(value)))
    return code


def tree_of(source):
    """Syntax tree of one function as tuples, without docstring and positions."""
    (function,) = ast.parse(source).body
    if ast.get_docstring(function, clean=False) is not None:
        del function.body[0]
    return _tuples(function)


def _tuples(node):
    if isinstance(node, ast.AST):
        fields = ((name, _tuples(value)) for name, value in ast.iter_fields(node))
        return type(node).__name__, *(field for field in fields if field[1] not in (None, []))
    return [_tuples(item) for item in node] if isinstance(node, list) else node


def compiled(target, case):
    """Resources of one compiled kernel, by the names in ``COLUMNS``; memory in bytes.

    Barriers are counted because no test of numbers finds a missing one: the interpreter runs a
    program as one thread.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(case)
    types = {
        arg: "constexpr" if arg in case.constants else "*" + case.pointers.get(arg, "")
        for arg in kernel.arg_names
    }
    types = {arg: "i32" if type_ == "*" else type_ for arg, type_ in types.items()}
    # torch's tensors begin at multiples of 16 bytes, and so do their parts here (strides). d and n
    # are taken to be multiples of 16 features.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if types[arg] != "constexpr" and (arg.endswith(("_ptr", "_stride")) or arg in ("d", "n"))
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=case.constants, attrs=aligned)
    backend, arch, width = TARGETS[target][0]
    out = triton.compile(
        source,
        target=GPUTarget(backend, arch, width),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    barriers = re.findall(r"^ *(?:ttg|gpu)\.barrier", out.asm["ttgir"], re.MULTILINE)
    used = {"shared": out.metadata.shared, "barriers": len(barriers)}
    text = out.asm["ptx" if backend == "cuda" else "amdgcn"]
    used["mma"] = int(re.search(MMA, text) is not None)
    used["wide"] = int(re.search(WIDE, text) is not None)
    if backend == "cuda":
        used.update(_cubin(out.asm["cubin"]))
    else:
        used["registers"] = int(re.search(r"; (?:Num)?Vgprs: (\d+)", text).group(1))
        used["stack"] = int(re.search(r"; ScratchSize: (\d+)", text).group(1))
    return used


def _cubin(cubin):
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [dump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": used["REG"], "stack": used["STACK"] + used["LOCAL"]}


def _row(job):
    target, name, case = job
    try:
        return name, compiled(target, case)
    except Exception as error:
        raise RuntimeError(f"{target}: {name}: {error}") from error


def resources(jobs):
    """Resources by label of these (target, label, case), compiled on all cores."""
    warnings.simplefilter("ignore")  # Triton warns of its own defaults
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return dict(pool.imap_unordered(_row, jobs, chunksize=4))


def sorted_cases(target, rest=None):
    """Jobs of the cases that the table does not prove, and of those that it does."""
    import triton

    version, table = read_table()
    unproven, proven = [], []
    for name, case in cases(target, rest):
        row = table.get((target, name))
        known = version == triton.__version__ and row is not None
        is_proven = known and row["source"] == source_of(target, case, row)
        (proven if is_proven else unproven).append((target, name, case))
    return unproven, proven


def read_table():
    """Triton version of the committed table, and its rows by (target, label)."""
    with TABLE.open(newline="") as file:
        version = file.readline().split()[-1]
        rows = list(csv.DictReader(file))
    return version, {
        (row["target"], row["case"]): {
            **{key: int(row[key]) for key in COLUMNS},
            "source": row["source"],
        }
        for row in rows
    }


def write_table():
    """Compile what the table does not prove, for all targets, and write it anew."""
    import triton

    _, table = read_table()
    rows = {}
    for target in TARGETS:
        unproven, proven = sorted_cases(target)
        print(f"{target}: {len(unproven)} to compile, {len(proven)} proven", flush=True)
        found = {name: table[target, name] for _, name, _ in proven} | resources(unproven)
        rows[target] = dict(sorted(found.items()))
    with TABLE.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["target", "case", *COLUMNS, "source"])
        for target in TARGETS:
            named = dict(cases(target))
            for name, used in rows[target].items():
                source = source_of(target, named[name], used)
                writer.writerow([target, name, *(used[key] for key in COLUMNS), source])


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # under the interpreter nothing is compiled
    if sys.argv[1:] == ["--write"]:
        write_table()
    else:
        rest = sys.argv[1] == "rest"
        found = {}
        for target in sys.argv[1 + rest :]:
            jobs, proven = sorted_cases(target, rest)
            found[target] = resources([*jobs, *proven[SAMPLE - 1 :: SAMPLE]])
        print(json.dumps(found))
