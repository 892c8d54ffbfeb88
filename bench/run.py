"""`make bench`: run the benchmarks, print the tables, write results, chart and docs/benchmarks.md.

python bench/run.py                        everything, into bench/results/<device>
python bench/run.py --backend reference    the same in plain torch
python bench/run.py --shapes 768x768x512   a quick look: prints, writes nothing
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import chart
import page
from environment import ROOT, slug
from goals import MET, NOT_MET, goals
from results import Results
from rich.console import Console
from rich.markup import escape
from rich.table import Table

FOLDER = ROOT / "bench" / "results"
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="BOFT_OPS_BACKEND")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--shapes", help="DxNxTOKENS, comma-separated; prints, writes nothing")
    parser.add_argument("--rounds", type=int, help="at most so many rounds")
    parser.add_argument("--seconds", type=float, help="time for each shape and direction, about")
    parser.add_argument("--out", type=Path, help="write JSON and CSV here, and nothing else")
    return parser.parse_args(argv)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def run(options: argparse.Namespace, json_file: Path) -> None:
    """The benchmarks, in a process of their own, so that the backend is set before any import."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), "--benchmark-only", "-q"]
    command += ["--benchmark-quiet", f"--benchmark-json={json_file}", f"--rootdir={ROOT}"]
    for name in ("device", "dtype", "shapes", "rounds", "seconds"):
        value = getattr(options, name)
        if value is not None:
            command.append(f"--{name}={value}")
    environment = dict(os.environ)
    environment.pop("BOFT_OPS_BACKEND", None)
    if options.backend != "auto":
        environment["BOFT_OPS_BACKEND"] = options.backend
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"the benchmarks failed (pytest: {done.returncode}): no result is written")


def show(results: Results, console: Console) -> None:
    """A table per shape, and the goals."""
    machine = results.machine
    console.print(
        f"\n{machine['device']} ({machine['cpu']}), {machine['threads']} threads, "
        f"{machine['dtype']}, backend {machine['backend']}, torch {machine['torch']}, "
        f"peft {machine['peft']}",
        highlight=False,
    )
    for suite in ("layer", "ops"):
        for group, direction in results.groups(suite):
            console.print(_table(results, suite, group, direction))
    for group, labels in results.left_out().items():
        console.print(f"{group}: out of memory, left out: {', '.join(labels)}", highlight=False)
    colours = {MET: "green", NOT_MET: "red"}
    for goal in goals(results):
        mark = f"[{colours.get(goal.verdict, 'yellow')}]{goal.verdict}[/]"
        console.print(f"{mark}: {goal.text}\n     {escape(goal.measured)}", highlight=False)


def _table(results: Results, suite: str, group: str, direction: str) -> Table:
    table = Table(title=f"{group}, {direction}", title_justify="left")
    table.add_column("", no_wrap=True)
    columns = ["ms", "ratio"]
    layer_columns = ["overhead", "saved MiB", "peak MiB", "trainable"]
    columns += layer_columns if suite == "layer" else ["GB/s", "of floor"]
    for column in [*columns, "rounds"]:
        table.add_column(column, justify="right")
    for row in results.table(group, direction):
        info = row.info
        cells = [f"{1e3 * row.stats['median']:.3f}", f"{info['ratio']:.3f}"]
        if suite == "layer":
            cells.append(f"{info['overhead']:+.1%}")
            cells += [f"{info[k] / 2**20:.2f}" for k in ("saved_bytes", "peak_bytes")]
            cells.append(f"{info['trainable']:,}")
        else:
            cells += page.op_cells(results, row)
        style = "bold" if row.name.startswith(("boft", "cayley", "rotat")) else None
        table.add_row(info["label"], *cells, str(len(row.by_round)), style=style)
    return table


def write(results: Results, raw: str, folder: Path) -> Path:
    """Raw JSON and CSV; returns the path of the JSON file."""
    machine = results.machine
    name = (
        machine["backend"]
        if machine["dtype"] == "fp32"
        else "-".join((machine["backend"], machine["dtype"]))
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(raw if raw.endswith("\n") else raw + "\n")
    results.write_csv(path.with_suffix(".csv"))
    return path


def publish(folder: Path, docs: Path) -> None:
    """Redraw the charts and rewrite docs/benchmarks.md from all results under ``folder``."""
    found = [Results.load(path) for path in sorted(folder.glob("*/*.json"))]
    for results in found:
        if results.is_main:
            chart.draw(docs / page.image(results), results)
    page.write(docs / "benchmarks.md", found)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 110
    with tempfile.TemporaryDirectory() as scratch:
        json_file = Path(scratch) / "results.json"
        run(options, json_file)
        raw = json_file.read_text()
    results = Results.load_text(raw)
    show(results, console)
    if options.shapes is not None and options.out is None:
        return
    default = FOLDER / slug(results.machine["device"])
    path = write(results, raw, options.out or default)
    console.print(f"wrote {os.path.relpath(path)} and .csv", highlight=False)
    if options.out is None:
        publish(FOLDER, ROOT / "docs")
        console.print("wrote docs/benchmarks.md and its chart", highlight=False)


if __name__ == "__main__":
    main()
