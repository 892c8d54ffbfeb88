"""What the scripts of this folder share: arguments, data files, the look of the figures.

A script measures and writes a CSV; its figure is drawn from that file alone.
"""

import argparse
import csv
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
OUTPUTS = HERE / "outputs"

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that every script has: --quick and --out."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="a tiny run of seconds, for tests")
    made.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the CSV and the figure (default: outputs/)"
    )
    return made


def output_folder(args: argparse.Namespace) -> Path:
    """Where this run writes. A quick run must say where, lest it replaces what a full one wrote."""
    if args.out is None and args.quick:
        raise SystemExit("--quick: expected --out FOLDER, so that the full run's outputs stay")
    folder = args.out or OUTPUTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_csv(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Rows with the same keys in the same order; floats in full."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Clock:
    """Wall and CPU seconds since it was made, the CPU's of all threads and finished children."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._now()

    @staticmethod
    def _now() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def wall(self) -> float:
        return time.perf_counter() - self._wall

    def cpu(self) -> float:
        return self._now() - self._cpu


def write_log(path: Path, clock: Clock, facts: Mapping[str, object] | None = None) -> None:
    """Beside the data: the command, the machine and how long it took."""
    lines = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "wall_s": f"{clock.wall():.1f}",
        "cpu_s": f"{clock.cpu():.1f}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **(facts or {}),
    }
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))


def figure(columns: int = 1, size: tuple[float, float] = (6.4, 4.4)):
    """(figure, axes) in the common look; matplotlib is imported here."""
    import matplotlib as mpl

    mpl.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "boft_ops", "font.size": 9})
    made, axes = plt.subplots(
        1, columns, figsize=(size[0] * columns, size[1]), layout="constrained"
    )
    for each in axes if columns > 1 else [axes]:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return made, axes


def save_figure(made, path: Path) -> None:
    """The same data gives the same file."""
    import matplotlib.pyplot as plt

    made.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(made)


def style(names: Sequence[object]) -> dict[object, dict[str, str]]:
    """A colour and a marker for each name, in order."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }
