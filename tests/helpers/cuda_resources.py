"""Registers, barriers, stack and spills of every CUDA kernel, from compiling it without a GPU.

``python tests/helpers/cuda_resources.py --write`` rewrites tests/data/cuda_resources.csv, which
tests/cuda/test_compile.py compares with a new compilation. Warnings of the compiler and the
assembler are errors.
"""

import csv
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
    text = subprocess.run(
        ["c++filt", "-p", *names], capture_output=True, text=True, check=True
    ).stdout
    short = [line.replace("boft::cuda::", "").replace("__nv_", "") for line in text.splitlines()]
    return dict(zip(names, short, strict=True))


def resources(nvcc: str) -> dict[tuple[str, str], dict[str, int]]:
    """Compile all files for all architectures; returns resources by (arch, kernel)."""
    jobs = [(source, arch) for source in sources() for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(nvcc, *job), jobs))
    names = _readable(sorted({name for kernels in results for name in kernels}))
    return {
        (arch, names[name]): used
        for (_, arch), kernels in zip(jobs, results, strict=True)
        for name, used in kernels.items()
    }


def read_table() -> tuple[str, dict[tuple[str, str], dict[str, int]]]:
    """Read the committed table: its nvcc release, and the resources by (arch, kernel)."""
    with TABLE.open(newline="") as file:
        version = file.readline().split()[-1]
        rows = list(csv.DictReader(file))
    return version, {
        (row["arch"], row["kernel"]): {key: int(row[key]) for key in COLUMNS} for row in rows
    }


def write_table(nvcc: str) -> None:
    """Rewrite the committed table."""
    rows = resources(nvcc)
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {release(nvcc)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arch", "kernel", *COLUMNS])
        for arch, kernel in sorted(rows, key=lambda row: (ARCHS.index(row[0]), row[1])):
            writer.writerow([arch, kernel, *(rows[arch, kernel][key] for key in COLUMNS)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_table(sys.argv[2] if sys.argv[2:] else "nvcc")
    else:
        rows = resources(sys.argv[1] if sys.argv[1:] else "nvcc")
        print(json.dumps([[*key, used] for key, used in rows.items()]))
