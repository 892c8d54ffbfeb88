"""Measure what decides the open questions of the GPU kernels: `make gpu-decide`.

Every figure is a line of results.jsonl as soon as it is known, so a run that is cut leaves what it
has. The sections run by priority, each in a process of its own with its own time limit. Nothing is
installed, and no test runs before the figures are there.

python bench/gpu_decide.py --out DIR --minutes 8.5         measures
python bench/gpu_decide.py --out DIR --device cpu          makes a dry run at tiny sizes
python bench/gpu_decide.py --table DIR                     prints table and verdicts once more
python bench/gpu_decide.py --publish DIR                   puts them on the page of benchmarks
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # boft_ops need not be installed

from decide import lines as files  # noqa: E402

RESERVE = 15.0  # seconds at the end, for the table
PATIENCE = 3.0  # seconds in which processes that were interrupted may end
WARMERS = 6  # processes that compile kernels meanwhile
NO_DEVICE = 4  # exit code of a process that finds no GPU
UNUSABLE = 3  # exit code of a process whose device cannot be used any more


class Section(NamedTuple):
    """A section.

    Attributes:
        name: its name in the lines.
        where: "module:function" of its parts, in the folder decide.
        seconds: its time limit; that of the last section is what is left.
    """

    name: str
    where: str
    seconds: float


SECTIONS = (
    Section("ceilings", "ceilings:parts", 45),
    Section("host", "rivals:host_parts", 70),
    Section("kernels", "kernels:parts", 90),
    Section("steps", "steps:parts", 50),
    Section("errors", "errors:parts", 40),
    Section("layers", "rivals:layer_parts", 70),
    Section("model", "model:parts", 60),
    Section("cublas", "cublas:parts", 20),
    Section("checks", "checks:parts", 600),
)
WARM_UP = "warm-up"
LOG = "log.txt"
TABLE = "table.txt"
START = 8.0  # seconds of a section in which its process starts


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of results.jsonl, table.txt and log.txt")
    parser.add_argument("--minutes", type=float, default=8.5, help="all in all (8.5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", help="some of them, separated by commas")
    parser.add_argument("--commit", help="the commit that is measured, if git cannot tell")
    parser.add_argument("--table", type=Path, metavar="DIR", help="measure nothing: the table")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="measure nothing: the page")
    options = parser.parse_args(argv)
    names = [section.name for section in SECTIONS]
    options.sections = options.sections.split(",") if options.sections else names
    if unknown := set(options.sections) - set(names):
        parser.error(f"--sections: expected some of {', '.join(names)}, got {sorted(unknown)}")
    if not options.minutes > 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if sum(folder is not None for folder in (options.out, options.table, options.publish)) != 1:
        parser.error("expected one of --out, --table and --publish")
    return options


# --- In the process of a section ------------------------------------------------------------------


def child(
    section: Section,
    out: Path,
    device: str,
    seconds: float,
    skip: set[str],
    share: tuple[int, int] = (0, 1),
) -> None:
    """Run a section, or one share of the warm-up. Its output goes to the log."""
    log = os.open(out / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()  # so that its own child processes end with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    until = time.monotonic() + seconds
    import torch
    from decide import contest

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    setting = contest.setting(device, max(seconds - START, 1.0))
    if section.name == WARM_UP:
        from decide import kernels

        os.nice(10)
        kernels.warm_up(setting, *share)
        return
    writer = files.Writer(out / files.NAME, section.name)
    module, function = section.where.split(":")
    parts = getattr(importlib.import_module(f"decide.{module}"), function)(setting, writer)
    try:
        contest.run_parts(parts, writer, setting.device, until, skip)
    except RuntimeError:  # the reason is in a line already
        import traceback

        traceback.print_exc()
        sys.exit(UNUSABLE)
    finally:
        if device == "cuda":
            from environment import clocks

            writer.write("facts", clocks=clocks())


def _end_with_parent() -> None:
    """End this process and those that it started when the parent is no more."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


# --- In the parent --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Run the sections; returns 0 if at least one figure was measured, else 1."""
    started = time.monotonic()
    deadline = started + 60 * options.minutes - min(RESERVE, 6 * options.minutes)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / files.NAME
    if path.exists():
        sys.exit(f"--out: expected a folder without {files.NAME}, got {out}")
    _prepare(options.commit)
    context = _context(options.device)
    warmers = [*_warmers(context, out, options, deadline)]
    try:
        for section in SECTIONS:
            if section.name in options.sections:
                left = deadline - time.monotonic()
                _run_section(context, section, out, options.device, min(section.seconds, left))
            if section.name == "kernels":
                _stop(warmers)
    except KeyboardInterrupt:
        print("interrupted: the table has what was measured until then")
    finally:
        _stop(warmers)
    text = _table(path)
    (out / TABLE).write_text(text + "\n")
    print(text, flush=True)
    print(f"{time.monotonic() - started:.0f} s; all lines are in {path}", flush=True)
    return int(not any(line["kind"] == "figure" for line in files.read(path)))


def _prepare(commit: str | None) -> None:
    """Set the environment of the sections."""
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / "bench"), inherited))
    )
    os.environ["BOFT_OPS_BENCH_NO_PEFT_EXTENSION"] = "1"  # its build takes a minute, or fails
    os.environ["BOFT_OPS_AUTOTUNE"] = "0"  # the built-in defaults are what is judged
    os.environ.pop("BOFT_OPS_BACKEND", None)
    if commit:
        os.environ["BOFT_OPS_BENCH_COMMIT"] = commit


def _context(device: str) -> multiprocessing.context.BaseContext:
    """Choose how processes start. CUDA does not survive a fork; the dry run need not be slow."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["models", "peft", "transformers"])
    return context


def _warmers(
    context, out: Path, options: argparse.Namespace, deadline: float
) -> Iterator[multiprocessing.Process]:
    """Start processes that compile the kernels of later sections."""
    device = options.device
    if device != "cuda" or not {"kernels", "errors"} & {*options.sections}:
        return
    shares = min(WARMERS, max(1, (os.cpu_count() or 1) - 2))
    section, seconds = Section(WARM_UP, "", 0), deadline - time.monotonic()
    for share in range(shares):
        call = section, out, device, seconds, set(), (share, shares)
        process = context.Process(target=child, args=call, daemon=True)
        process.start()
        yield process


def _run_section(context, section: Section, out: Path, device: str, seconds: float) -> None:
    """Run a section until its time is over; without its bad part, if that spoiled a process."""
    writer, path = files.Writer(out / files.NAME, section.name), out / files.NAME
    start, begun = time.monotonic(), set()
    while True:
        left = start + seconds - time.monotonic()
        if left < 1:
            outcome = "stopped" if begun else "no time left"
            break
        call = section, out, device, left, begun
        process = context.Process(target=child, args=call, daemon=True)
        process.start()
        try:
            process.join(left)
        except KeyboardInterrupt:
            _stop([process])
            raise
        if process.exitcode is None:
            _stop([process])
            outcome = "stopped"
            break
        if process.exitcode == NO_DEVICE:
            sys.exit("--device: expected a CUDA device, found none (--device=cpu: a dry run)")
        if process.exitcode == 0:
            outcome = "done"
            break
        before = begun
        begun = {
            line["part"]
            for line in (files.read(path) if path.exists() else [])
            if (line["kind"], line["section"]) == ("begun", section.name)
        }
        if begun == before:
            outcome = f"failed ({process.exitcode})"
            break
    spent = round(time.monotonic() - start, 1)
    writer.write("section", outcome=outcome, seconds=spent)
    print(f"{section.name}: {outcome}, {spent} s of {max(seconds, 0):.0f}", flush=True)
    if outcome.startswith("failed"):
        log = out / LOG
        tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
        print(*(f"    {line}" for line in tail), sep="\n", flush=True)


def _stop(processes: Sequence[multiprocessing.Process]) -> None:
    """Interrupt processes, then kill them and the processes that they started."""
    for kill in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            if process.is_alive():
                try:
                    os.killpg(process.pid, kill)
                except ProcessLookupError:  # it has not called setsid yet
                    process.kill()
        end = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))


def _table(path: Path) -> str:
    from decide import table

    return table.text(files.read(path))


def publish(folder: Path) -> None:
    """Copy the lines of a run to the committed results, and render the page of benchmarks."""
    import page
    from decide.page import FILE, environment_of
    from machines import folder_name

    path = folder / files.NAME
    target = page.FOLDER / folder_name(environment_of(files.read(path))) / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
    page.publish(page.FOLDER, ROOT)
    print(f"wrote {target.relative_to(ROOT)} and the tables of README.md and docs/")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.table:
        print(_table(options.table / files.NAME))
    elif options.publish:
        publish(options.publish)
    else:
        return run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
