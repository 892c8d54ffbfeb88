"""Arguments, data files and figure style that the scripts of this folder share.

A script writes its measurements to a CSV file, and draws its figure only from that file.
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

# Okabe and Ito's palette, whose colors remain distinct with every common form of color blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that every script has: --quick and --out."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--quick", action="store_true", help="run a tiny problem in seconds, for tests"
    )
    result.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the CSV file and the figure (default: outputs/)",
    )
    return result


def output_folder(args: argparse.Namespace) -> Path:
    """Return the folder that a run writes to, and make it.

    A quick run must name a folder, so that it does not replace the outputs of a full run.
    """
    if args.out is None and args.quick:
        raise SystemExit("--quick: expected --out FOLDER, so that the full run's outputs stay")
    folder = args.out or OUTPUTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_csv(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows, which have the same keys in the same order. Floats are not rounded."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file as strings."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Clock:
    """A clock that counts wall and CPU seconds since its creation.

    CPU seconds are those of all threads and of finished child processes.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._now()

    @staticmethod
    def _now() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def wall(self) -> float:
        """Return the wall seconds."""
        return time.perf_counter() - self._wall

    def cpu(self) -> float:
        """Return the CPU seconds."""
        return self._now() - self._cpu


def write_log(path: Path, clock: Clock, facts: Mapping[str, object] | None = None) -> None:
    """Write the command, the machine, the time taken and further facts."""
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


def figure(panels: int = 1, height: float = 4.4):
    """Make a figure and its axes, one below the other, in the common style.

    It is as wide as the column of the site, so that its text is shown in its size. ``height`` is
    that of a panel, in inches. matplotlib is imported here.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # draws to a file, without a window
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "boft_ops", "font.size": 11})
    fig, axes = plt.subplots(panels, 1, figsize=(7.1, height * panels), layout="constrained")
    for each in axes if panels > 1 else [axes]:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save_figure(fig, path: Path) -> None:
    """Save a figure without a date, so that equal data gives equal files."""
    import matplotlib.pyplot as plt

    fig.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)


def style(names: Sequence[object]) -> dict[object, dict[str, str]]:
    """Choose a color and a marker for each name, in order."""
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }
