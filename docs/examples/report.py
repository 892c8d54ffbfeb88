"""Output of the demo: progress bars, the table, the comparison of methods, and the results file."""

import itertools
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import boft_ops

# A difference of so many standard errors supports a claim. Every pair of the four methods is
# compared, six pairs in all. With the usual two standard errors, chance alone would make a pair
# look different in one of four such tables; with three it does so in one of 60.
CARRIES = 3.0


@dataclass
class Run:
    """One method trained with one seed."""

    name: str
    title: str
    seed: int
    adapter: int  # trainable parameters
    head: int
    peak: int  # peak memory of one training step in bytes
    step_ms: float = math.nan
    correct: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # per test sentence
    merged_correct: torch.Tensor | None = None
    merged_differ: int = 0  # number of test predictions that merging changed
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, validation accuracy)


class Lines:
    """Progress for a log instead of a terminal: a line for each stage, and one in each minute.

    It has those methods of rich's Progress that the demo calls.
    """

    PAUSE = 60.0  # seconds between two lines of one stage

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self._started = clock()
        self._tasks: list[dict] = []

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add_task(self, description: str, total: int | None = None, note: str = "") -> int:
        """Begin a stage, and print its name."""
        task = {"name": description, "total": total, "note": note, "done": 0}
        self._tasks.append(task | {"printed": self._clock()})
        self._print(f"{description} ...")
        return len(self._tasks) - 1

    def advance(self, task: int, n: int) -> None:
        """Add to what a stage has done."""
        self.update(task, completed=self._tasks[task]["done"] + n)

    def update(
        self,
        task: int,
        completed: int | None = None,
        total: int | None = None,
        note: str | None = None,
    ) -> None:
        """Set what a stage has done; prints it at the end, or if a minute has passed."""
        state = self._tasks[task]
        state["done"] = state["done"] if completed is None else completed
        state["total"] = state["total"] if total is None else total
        state["note"] = state["note"] if note is None else note
        if state["done"] == state["total"] or self._clock() - state["printed"] >= self.PAUSE:
            state["printed"] = self._clock()
            note = f", {state['note']}" if state["note"] else ""
            self._print(f"{state['name']}: {state['done']} of {state['total']}{note}")

    def _print(self, line: str) -> None:
        seconds = self._clock() - self._started
        text = f"{seconds:4.0f} s  {line}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.console.file.flush()  # a pipe would keep the lines until its buffer is full


def progress(console: Console) -> Progress | Lines:
    """Make progress bars, or lines if the output is not a terminal."""
    if not console.is_terminal:
        return Lines(console)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


# --- Numbers --------------------------------------------------------------------------------------


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by method."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def per_sentence(runs: list[Run]) -> torch.Tensor:
    """Compute, for each test sentence, the share of seeds with a correct answer."""
    return torch.stack([run.correct.double() for run in runs]).mean(0)


def standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean of `values`, from the random choice of test sentences."""
    return (values.std() / len(values) ** 0.5).item()


def spread(runs: list[Run]) -> float:
    """Standard deviation of the test accuracy over the seeds."""
    return statistics.stdev(run.correct.double().mean().item() for run in runs)


def compare(one: list[Run], other: list[Run]) -> tuple[float, float]:
    """Compute the difference of the accuracies, `one` minus `other`, and its standard error.

    Both answered the same sentences. The error is therefore that of the per-sentence differences,
    in which sentences that are hard for both cancel. With more than one seed the spread of the
    seeds is added.
    """
    difference = per_sentence(one) - per_sentence(other)
    error = standard_error(difference)
    if len(one) > 1 and len(other) > 1:
        seeds = spread(one) ** 2 / len(one) + spread(other) ** 2 / len(other)
        error = math.sqrt(error**2 + seeds)
    return difference.mean().item(), error


# --- Text -----------------------------------------------------------------------------------------

HEADER = [
    "method",
    "adapter",
    "head",
    "test %",
    "± test",
    "± seed",
    "merged",
    "ms/step",
    "MB/step",
]


def table_rows(runs: list[Run]) -> list[list[str]]:
    """Format a row of the table for each method."""
    rows = []
    for group in by_method(runs).values():
        first, values = group[0], per_sentence(group)
        row = [first.title, f"{first.adapter:,}", f"{first.head:,}"]
        row += [f"{100 * values.mean():.1f}", f"{100 * standard_error(values):.1f}"]
        row.append(f"{100 * spread(group):.1f}" if len(group) > 1 else "-")
        merged = [run.merged_correct for run in group if run.merged_correct is not None]
        row.append(f"{100 * torch.stack(merged).double().mean():.1f}" if merged else "-")
        row.append(f"{first.step_ms:.0f}")
        rows.append([*row, f"{first.peak / 1e6:.0f}"])
    return rows


def sentences(runs: list[Run]) -> list[str]:
    """State the differences that the numbers support, and those that they do not support."""
    groups = by_method(runs)
    clear, unclear, lines = [], [], []
    for one, other in itertools.combinations(groups.values(), 2):
        difference, error = compare(other, one)
        ahead, behind = (other, one) if difference >= 0 else (one, other)
        text = f"{ahead[0].title} over {behind[0].title} "
        text += f"{100 * abs(difference):+.1f} ± {100 * error:.1f}"
        (clear if abs(difference) > CARRIES * error else unclear).append(text)
    if len(groups) > 1:
        measure = f"more than {CARRIES:.0f} standard errors, on the same test sentences"
        lines.append(f"Clear differences ({measure}): " + ("; ".join(clear) or "none") + ".")
        lines.append("Not distinguishable: " + ("; ".join(unclear) or "none") + ".")
    if all(len(group) == 1 for group in groups.values()):
        lines.append(
            "The errors are those of the choice of test sentences. With one seed, the spread of "
            "training runs is unknown; --seeds 3 shows it."
        )
    merged = {
        group[0].title: [str(run.merged_differ) for run in group]
        for group in groups.values()
        if group[0].merged_correct is not None
    }
    if merged:
        counts = "; ".join(f"{title} {', '.join(count)}" for title, count in merged.items())
        lines.append(
            f"Test predictions, of {len(runs[0].correct)}, that merging changed: {counts}."
        )
    return lines


def print_table(console: Console, runs: list[Run]) -> None:
    """Print the table and the statements on the differences."""
    table = Table(
        title="Sentiment of movie-review snippets, test split", box=SIMPLE_HEAD, pad_edge=False
    )
    table.padding = (0, 1, 0, 0)  # so that the table fits a terminal of 80 columns
    for column in HEADER:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in table_rows(runs):
        table.add_row(*row)
    console.print(table)
    for line in sentences(runs):
        console.print(line, highlight=False)


def print_search(console: Console, rows: list[tuple[str, float, float]], current: dict) -> None:
    """Print the accuracies of --search, marking the best rates and those in use."""
    table = Table(title="Validation accuracy % by learning rate")
    for column in ("method", "learning rate", "validation", ""):
        table.add_column(column, justify="left" if column == "method" else "right")
    for title, rate, score in rows:
        best = max(s for t, _, s in rows if t == title)
        notes = ["best"] * (score == best) + ["in use"] * (current[title] == rate)
        table.add_row(title, f"{rate:g}", f"{100 * score:.1f}", ", ".join(notes))
    console.print(table)


def machine() -> str:
    """Describe the processor, its cores and the threads in use."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    processor = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found:  # a virtual machine may hide the rest of the name
        processor += f" (family {found['cpu family']}, model {found['model']})"
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def provenance(command: str) -> list[str]:
    """List the command, the machine and the versions that made the results."""
    names = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    versions += f", boft_ops {boft_ops.__version__}"
    return [
        f"- Command: `{command}`",
        f"- Machine: {machine()}",
        f"- Versions: Python {platform.python_version()}, {versions}",
    ]


def write_markdown(path: Path, runs: list[Run], command: str, seconds: float) -> None:
    """Write the results as a Markdown page."""
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    rows = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *table_rows(runs)]
    text = ["# Results of docs/examples/finetune_minilm.py", "", *provenance(command)]
    text += [f"- Seeds: {seeds}; the whole run took {seconds / 60:.1f} minutes", ""]
    text += ["| " + " | ".join(row) + " |" for row in rows]
    text += ["", *(f"- {line}" for line in sentences(runs)), ""]
    path.write_text("\n".join(text), encoding="utf-8")
