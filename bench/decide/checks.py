"""Section "checks": tests of the kernels on the GPU, then the same under racecheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from environment import ROOT

from .contest import Part, Setting
from .lines import Writer

RACES = "tests/cuda/test_kernels.py"
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")


def parts(setting: Setting, writer: Writer) -> Iterator[Part]:
    """Yield each file of tests that need a GPU, the newest first, then the check for races."""
    if setting.device.type != "cuda":
        yield "tests", lambda: writer.write("failed", part="tests", name="", why="needs a GPU")
        return
    for path in newest(tests_of_a_gpu()):
        name = str(path.relative_to(ROOT))
        yield name, partial(_run, writer, name, [sys.executable, *PYTEST, "-m", "gpu", name])
    if tool := shutil.which("compute-sanitizer"):
        command = [tool, "--tool", "racecheck", "--error-exitcode", "1", sys.executable]
        yield (
            "racecheck",
            partial(_run, writer, "racecheck", [*command, *PYTEST, "-m", "gpu", RACES]),
        )


def tests_of_a_gpu() -> list[Path]:
    """List the files with tests that are marked for a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if "mark.gpu" in path.read_text()]


def newest(paths: list[Path]) -> list[Path]:
    """Sort files by their last commit, or by their time if git does not know them."""

    def changed(path: Path) -> float:
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct", "--", str(path)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            return float(run.stdout)
        except (OSError, ValueError, subprocess.CalledProcessError):
            return path.stat().st_mtime

    return sorted(paths, key=changed, reverse=True)


def _run(writer: Writer, part: str, command: list[str]) -> None:
    """Run tests; their output goes to the log of the section, and its last lines into a line."""
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    del environment["BOFT_OPS_AUTOTUNE"]  # tests set it themselves
    last: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout:  # at once, in case that this process is stopped
            print(line, end="", flush=True)
            last.append(line.strip())
    outcome = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
    seconds = round(time.monotonic() - start, 1)
    writer.write("facts", part=part, outcome=outcome, seconds=seconds, tail=[*last])
