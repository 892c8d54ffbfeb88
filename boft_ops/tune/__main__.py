"""Measure which backends, tiles and plans are fastest on this machine, and keep them.

--shapes takes names (llama-2-7b, llama-3-8b, deberta-v3-base, dinov2-large, sd-1.5) and DxNxROWS.
--explain prints the bytes and flops of each plan of a layer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .._runtime import backend as backends
from .._runtime import checks, command, paths, tuned, tuned_file
from .._runtime.device import name_of
from . import explain
from .measure import Timer
from .search import tune
from .workloads import MODELS, problems, shapes_of

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    add = parser.add_argument
    add("--ops", nargs="+", choices=sorted(tuned.tunables), metavar="OP",
        help="tune only these: %(choices)s (default: all)")  # fmt: skip
    add("--shapes", default="deberta-v3-base",
        help=f"models ({', '.join(MODELS)}) or shapes such as 4096x11008x2048 (inputs x outputs x "
        "rows), comma-separated (default: %(default)s)")  # fmt: skip
    add("--butterfly", type=_butterflies, default="2x8,4x8",
        help="n_factors x block_size, comma-separated (default: 2x8,4x8)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to tune (default: cpu)")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--rows", type=_positive,
        help="rows for the shapes of models (default: 512 on a CPU, 8192 on a GPU)")  # fmt: skip
    add("--seconds", type=_positive, help="time budget: start no measurement after so many seconds")
    add("--out", type=Path, help="write the table to this file instead of the cache")
    add("--explain", nargs=3, type=_positive, metavar=("d", "n", "N"),
        help="measure nothing: print bytes and flops of each plan for d inputs, n outputs and "
        "N rows")  # fmt: skip


def _complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Replace names by what they mean; exit with what is wrong, before any work."""
    gpu = options.device == "cuda"
    options.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    options.rows = options.rows or (8192 if gpu else 512)
    try:
        if options.explain:
            for m, b in options.butterfly:
                checks.butterfly_shape(options.explain[0], b, m)
        else:
            options.shapes = shapes_of(options.shapes, options.rows)
            _check_work(options)
            options.out = options.out or tuned_file.file_of(options.device)
            _check_out(options.out)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))


def _butterflies(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(map(_positive, part.split("x"))) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected e.g. 2x8,4x8, got {text!r}")
    return pairs


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _check_work(options: argparse.Namespace) -> None:
    """Raise ValueError where nothing of what was asked for can be measured."""
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if (forced := backends.forced()) is not None:
        raise ValueError(f"BOFT_OPS_BACKEND: expected none, as all are to be tried, got {forced!r}")
    if not any(checks.is_valid(s.d, b, m) for s in options.shapes for m, b in options.butterfly):
        raise ValueError(f"--butterfly: none of {options.butterfly} fits any of --shapes")


def _check_out(path: Path) -> None:
    """Raise ValueError unless the file can be written: measuring takes long."""
    folder = paths.nearest(path.parent)
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    if path.is_dir() or not writable:
        raise ValueError(f"--out: expected a file in a folder to write to, got {str(path)!r}")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure or explain as the arguments of ``parser`` say; return the exit status."""
    _complete(options, parser)
    if options.explain:
        d, n, rows = options.explain
        for m, b in options.butterfly:
            explain.show(rows, d, n, m, b, options.dtype, options.device)
        return 0
    return _tune_all(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return command.main("tune", __doc__, add_arguments, run, argv)


def _tune_all(options: argparse.Namespace) -> int:
    start, device, path = time.perf_counter(), options.device, options.out
    every = problems(options.shapes, options.butterfly, options.dtype, device, options.ops)
    try:
        rows = tuned_file.read(path, device, tuned.check_row)
    except ValueError as error:
        print(f"{path} is measured anew: {error}")
        rows = []
    known = {tuned_file.key_of(row) for row in rows}
    todo = [p for p in every if tuned_file.key_of(p.row(p.default)) not in known]
    print(f"{name_of(device)}: {len(todo)} of {len(every)} to measure, into {path}", flush=True)
    timer, done = Timer(device), 0
    for problem in todo:
        if options.seconds and time.perf_counter() - start > options.seconds:
            break
        try:
            row = tune(problem, timer)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on from {path}", file=sys.stderr)
            return 130
        tuned_file.update(path, device, [row], tuned.check_row)
        done += 1
        print(f"[{done}/{len(todo)}] {_line(problem, row)}", flush=True)
    tuned.forget()
    left = f", {len(todo) - done} left for the next time" if done < len(todo) else ""
    print(f"{done} measured in {time.perf_counter() - start:.0f} s{left}: {path}")
    return 0


def _line(problem: object, row: dict) -> str:
    chosen = " ".join([row["backend"], *(f"{k}={v}" for k, v in row["config"].items())])
    gain = row["default_us"] / row["us"]
    tail = f" ({len(row['failed'])} of {row['tried']} failed)" if row["failed"] else ""
    return f"{problem}: {row['us']:.1f} us, {gain:.2f}x the default: {chosen}{tail}"


if __name__ == "__main__":
    sys.exit(main())
