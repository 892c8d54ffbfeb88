"""Run the benchmarks, print tables, write results, charts and the tables of pages: `make bench`.

python bench/run.py                        runs all suites, writes to bench/results/<machine>
python bench/run.py --everything           the same with all contestants, then peft_model.py and
                                           indexed.py: all that the pages show of a machine
python bench/run.py --backend reference    the suites in plain torch, without kernels
python bench/run.py --shapes 768x768x512   a quick look: prints, writes nothing
python bench/run.py --suites ops,model     runs some of the suites ops, layer and model
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import page
from contestants import EXTRAS
from environment import ROOT
from machines import folder_name
from results import Results, text_of
from rich.console import Console
from rich.markdown import Markdown
from sections import tables

# Scripts that --everything runs beside the suites; each writes a file of its own.
MORE = ("peft_model.py", "indexed.py")
SUITES = {"layer": "test_layer.py", "ops": "test_operators.py", "model": "test_model.py"}
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="auto", help="value of BOFT_OPS_BACKEND")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--shapes", help="shapes DxNxTOKENS, separated by commas; nothing is written")
    add("--rounds", type=int, help="largest number of rounds")
    add("--seconds", type=float, help="approximate time for each shape and direction")
    add("--extras", help="further contestants: compiled-boft, lycoris-boft")
    add("--model", help="model of the training step: tiny, small, quarter or 1b")
    add("--minutes", type=float, help="start no measurement of a suite after this many minutes")
    add("--suites", default=",".join(SUITES), help="the suites to run, separated by commas")
    add("--everything", action="store_true", help="all contestants and all of the pages' figures")
    add("--keep-going", action="store_true", help="leave failed suites out and go on")
    add("--out", type=Path, help="folder for JSON and CSV; nothing else is written")
    options = parser.parse_args(argv)
    options.suites = options.suites.split(",")
    if not set(options.suites) <= SUITES.keys():
        parser.error(f"--suites: expected some of {', '.join(SUITES)}, got {options.suites}")
    if options.everything and (options.shapes or options.out or options.device != "cpu"):
        parser.error("--everything: expected no --shapes, --out or --device")
    if options.everything:
        options.extras = ",".join(EXTRAS)
    return options


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def run(options: argparse.Namespace) -> str:
    """Run the suites and merge their results into one JSON text.

    Each suite runs in its own process, so that the backend is set before any import. With
    ``--keep-going`` a failed suite is left out. Otherwise, or if no suite succeeds, the program
    ends.
    """
    merged: dict | None = None
    for suite in options.suites:
        with tempfile.TemporaryDirectory() as scratch:
            json_file = Path(scratch) / "results.json"
            code = _run_suite(options, suite, json_file)
            if code and not options.keep_going:
                sys.exit(f"the benchmarks failed (pytest: {code}): no result is written")
            if not json_file.is_file() or not json_file.stat().st_size:
                print(f"{suite}: failed (pytest: {code}), left out", file=sys.stderr)
                continue
            content = json.loads(json_file.read_text())
        if merged is None:
            merged = content
        else:
            merged["benchmarks"] += content["benchmarks"]
    if merged is None:
        sys.exit("no benchmark was run: no result is written")
    return text_of(merged)


def _run_suite(options: argparse.Namespace, suite: str, json_file: Path) -> int:
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench" / SUITES[suite]), "-q"]
    command += ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={json_file}"]
    command.append(f"--rootdir={ROOT}")
    for name in ("device", "dtype", "shapes", "rounds", "seconds", "extras", "model", "minutes"):
        value = getattr(options, name)
        if value is not None:
            command.append(f"--{name}={value}")
    environment = dict(os.environ)
    environment.pop("BOFT_OPS_BACKEND", None)
    if options.backend != "auto":
        environment["BOFT_OPS_BACKEND"] = options.backend
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def show(results: Results, console: Console) -> None:
    """Print all that a run measured, in the tables of the page of benchmarks."""
    console.print(Markdown("\n".join(tables(results))))


def write(results: Results, raw: str, folder: Path) -> Path:
    """Write raw JSON and CSV; returns the path of the JSON file."""
    name = results.machine["backend"]
    if results.machine["dtype"] != "fp32":
        name += f"-{results.machine['dtype']}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(raw if raw.endswith("\n") else raw + "\n")
    results.write_csv(path.with_suffix(".csv"))
    return path


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 110
    raw = run(options)
    results = Results.load_text(raw)
    show(results, console)
    if options.shapes is not None and options.out is None:
        return
    default = page.FOLDER / folder_name(results.machine)
    path = write(results, raw, options.out or default)
    console.print(f"wrote {os.path.relpath(path)} and .csv", highlight=False)
    if options.everything:
        for script in MORE:
            subprocess.run([sys.executable, ROOT / "bench" / script], cwd=ROOT, check=True)
    if options.out is None:
        page.publish(page.FOLDER, ROOT)
        console.print("wrote the tables of README.md and docs/, and the charts", highlight=False)


if __name__ == "__main__":
    main()
