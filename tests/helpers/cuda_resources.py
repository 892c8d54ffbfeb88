"""Registers, barriers, stack and spills of every CUDA kernel, from compiling it without a GPU.

``python tests/helpers/cuda_resources.py --write`` compiles every file of kernels that
tests/data/cuda_resources.csv does not prove, and rewrites that table. It proves a file for an
architecture if the installed nvcc is the table's and the sources are the same: the same kernels
would come out. tests/cuda/test_compile.py compiles what is not proven and a sample of the rest.
Warnings of the compiler and the assembler are errors.
"""

import csv
import functools
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "data" / "cuda_resources.csv"
ARCHS = ("sm_80", "sm_90", "sm_100")
COLUMNS = ("registers", "barriers", "stack", "spills")
SAMPLE = 8  # one in so many proven files is compiled all the same, to check the table
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Werror=all-warnings")


def release(nvcc: str) -> str:
    """Return the release of nvcc, such as "13.0". The table is compared only for its release."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release ([\d.]+)", version.stdout)[1]


def sources() -> list[Path]:
    """List the files of CUDA kernels."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compiled(nvcc: str, source: Path, arch: str) -> dict[str, dict[str, int]]:
    """Compile one file and return the resources of each kernel.

    Raises:
        RuntimeError: the compiler reported an error or a warning.
    """
    code = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", "-Xptxas=-v,-warn-spills"]
        command += [f"-gencode=arch=compute_{code},code={arch}", "-c", str(source)]
        run = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True)
    if run.returncode:
        lines = [line for line in (run.stdout + run.stderr).splitlines() if " info " not in line]
        raise RuntimeError("\n".join([f"{source.name} for {arch}:", *lines]))
    pattern = (
        r"Function properties for (\S+)\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers, used (\d+) barriers"
    )
    return {
        name: {
            "registers": int(registers),
            "barriers": int(barriers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
        }
        for name, stack, stores, loads, registers, barriers in re.findall(
            pattern, run.stdout + run.stderr
        )
    }


def _readable(names: list[str]) -> dict[str, str]:
    """Demangle names of kernels."""
    if not names:
        return {}
    text = subprocess.run(
        ["c++filt", "-p", *names], capture_output=True, text=True, check=True
    ).stdout
    short = [line.replace("boft::cuda::", "").replace("__nv_", "") for line in text.splitlines()]
    return dict(zip(names, short, strict=True))


@functools.cache
def text_of(source: Path) -> str:
    """Return a file of kernels with all that it includes of csrc/, without comments."""
    files, todo = {}, [source]
    while todo:
        file = todo.pop()
        if file not in files and file.exists():  # the emulation's headers are not on nvcc's path
            text = re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(), flags=re.DOTALL)
            files[file] = " ".join(text.split())
            names = re.findall(r'^ *#include "([^"]+)"', text, re.MULTILINE)
            todo += [folder / name for name in names for folder in (file.parent, ROOT / "csrc")]
    return "\n".join(files[file] for file in sorted(files))


def digest(source: Path, arch: str, kernels: dict[str, dict[str, int]]) -> str:
    """Digest of all that makes rows of the table, except nvcc itself, and of the rows."""
    rows = [(name, *(kernels[name][key] for key in COLUMNS)) for name in sorted(kernels)]
    everything = text_of(source), arch, FLAGS, inspect.getsource(compiled), rows
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:16]


def sorted_jobs(nvcc: str) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """List the (file, arch) that the table does not prove, and those that it does."""
    version, table = read_table()
    unproven, proven = [], []
    for source in sources():
        for arch in ARCHS:
            rows = {
                k: row for (a, k), row in table.items() if (a, row["file"]) == (arch, source.name)
            }
            known = version == release(nvcc) and rows
            digests = {row["source"] for row in rows.values()}
            is_proven = known and digests == {digest(source, arch, rows)}
            (proven if is_proven else unproven).append((source, arch))
    return unproven, proven


def resources(nvcc: str, jobs: list[tuple[Path, str]]) -> dict[tuple[str, str], dict]:
    """Compile these (file, arch) on all cores; returns rows of the table by (arch, kernel)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(nvcc, *job), jobs))
    names = _readable(sorted({name for kernels in results for name in kernels}))
    rows = {}
    for (source, arch), kernels in zip(jobs, results, strict=True):
        kernels = {names[name]: used for name, used in kernels.items()}
        origin = {"file": source.name, "source": digest(source, arch, kernels)}
        rows |= {(arch, name): used | origin for name, used in kernels.items()}
    return rows


def read_table() -> tuple[str, dict[tuple[str, str], dict]]:
    """Read the committed table: its nvcc release, and its rows by (arch, kernel)."""
    with TABLE.open(newline="") as file:
        version = file.readline().split()[-1]
        rows = list(csv.DictReader(file))
    return version, {
        (row["arch"], row["kernel"]): row | {key: int(row[key]) for key in COLUMNS} for row in rows
    }


def write_table(nvcc: str) -> None:
    """Compile what the table does not prove, and write it anew."""
    unproven, proven = sorted_jobs(nvcc)
    print(f"{len(unproven)} to compile, {len(proven)} proven", flush=True)
    kept = {(source.name, arch) for source, arch in proven}
    table = {key: row for key, row in read_table()[1].items() if (row["file"], key[0]) in kept}
    rows = table | resources(nvcc, unproven)
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {release(nvcc)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arch", "kernel", *COLUMNS, "file", "source"])
        for key in sorted(rows, key=lambda row: (ARCHS.index(row[0]), row[1])):
            writer.writerow([*key, *(rows[key][name] for name in (*COLUMNS, "file", "source"))])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_table(sys.argv[2] if sys.argv[2:] else "nvcc")
    else:
        jobs = [(source, arch) for source in sources() for arch in ARCHS]
        rows = resources(sys.argv[1] if sys.argv[1:] else "nvcc", jobs)
        print(json.dumps([[*key, used] for key, used in rows.items()]))
