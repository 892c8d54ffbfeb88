"""Sections of docs/benchmarks.md, one for each committed run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from contestants import NAMES
from environment import slug
from goals import goals, gpu_goals
from judging import MET
from machines import machine_name
from operators import BOTH
from results import Results, Row

NOT_DECIDED = """\
### Host and device of a GPU apart

No GPU has run `make gpu-decide` yet ([tuning.md](tuning.md#questions-for-a-gpu) has its
sections and rules).
"""


def no_gpu() -> str:
    """Section that says what a GPU would have to measure."""
    goals_left = "\n".join(f"- not measured: {text}." for text in gpu_goals())
    return f"""\
### GPU

Nothing was measured on a GPU yet. On a machine with one,

    make bench ARGS="--device cuda --dtype bf16"

writes its results into bench/results and its figures here. They are to meet these goals:

{goals_left}
"""


def image(results: Results) -> str:
    """Path of the chart of a machine, relative to the folder of the page."""
    return f"images/bench_layer_{slug(machine_name(results.machine)).replace('-', '_')}.svg"


def section(results: Results) -> Iterator[str]:
    """Yield the lines of Markdown for one run."""
    machine = results.machine
    backend = machine["backend"]
    yield f"### {machine_name(machine)}, {machine['dtype']}, backend {backend}"
    yield ""
    yield provenance(results)
    yield ""
    if results.is_main and results.groups("layer"):
        yield f"![Time that adapters add to a frozen linear layer]({image(results)})"
        yield ""
    for direction in (BOTH, "forward"):
        yield from _overheads(results, direction)
    if backend == "auto":
        yield from _details(results)
        yield from _ops(results)
        yield from _models(results)
    judged = goals(results)
    relevant = gpu_goals() if machine["device"] != "cpu" and backend == "auto" else []
    unmeasured = [text for text in relevant if text not in {goal.text for goal in judged}]
    if judged or unmeasured:
        yield "#### Goals"
        yield ""
        for goal in judged:
            verdict = MET if goal.verdict == MET else f"**{goal.verdict}**"
            yield f"- {verdict}: {goal.text}. Measured: {goal.measured}."
        yield from (f"- not measured: {text}." for text in unmeasured)
        yield ""


def provenance(results: Results) -> str:
    """Name machine, software, commit and date of a run, and what computed it."""
    machine, commit = results.machine, results.commit
    where = f"{machine['cpu']}, {machine['threads']} threads"
    if machine["device"] != "cpu":
        where = f"{machine['device']}; host {where}"
    what = ", ".join(f"{k} {machine[k]}" for k in ("torch", "peft", "boft_ops", "python"))
    state = f"commit {(commit['id'] or 'unknown')[:12]}" + (" + changes" if commit["dirty"] else "")
    kernels = [op for op, served in machine["serving"].items() if served != "reference"]
    native = "Kernels serve " + ", ".join(f"`{op}`" for op in kernels) if kernels else "No kernels"
    tuned = " Measured choices were in use." if machine.get("tuned") else ""
    return f"{where}. {what}, {state}, {results.date}. {native}; the rest is plain torch.{tuned}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table whose first column is text and whose others are numbers."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _overheads(results: Results, direction: str) -> Iterator[str]:
    groups = [g for g, measured in results.groups("layer") if measured == direction]
    if not groups:
        return
    yield f"#### Overhead of {direction}"
    yield ""
    rows = []
    for name in NAMES:
        cells = [results.find(group, direction, name) for group in groups]
        label = next((cell.info["label"] for cell in cells if cell), None)
        if label:
            rows.append([label, *(_overhead(cell) if cell else "" for cell in cells)])
    yield from table(["", *groups], rows)


def _overhead(row: Row) -> str:
    median, low, high = (100 * (row.info[k] - 1) for k in ("ratio", "ratio_q1", "ratio_q3"))
    if row.name == "linear":
        return f"{1e3 * row.stats['median']:.2f} ms"
    return f"{median:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _details(results: Results) -> Iterator[str]:
    yield "#### Time and memory of forward and backward"
    yield ""
    rows = []
    for group, direction in results.groups("layer"):
        if direction != BOTH:
            continue
        for row in results.table(group, direction):
            memory = (_mib(row.info[k]) for k in ("saved_bytes", "peak_bytes", "adapter_bytes"))
            time = f"{1e3 * row.stats['median']:.2f}"
            first = f"{group} {row.info['label']}"
            rows.append([first, time, f"{row.info['ratio']:.3f}", *memory, _count(row)])
    header = ["", "ms", "x floor", "saved MiB", "peak MiB", "adapter MiB", "trainable"]
    yield from table(header, rows)
    for group, labels in results.left_out().items():
        yield f"Left out at {group}, for want of memory: {', '.join(labels)}."
    notes = {r.info["label"]: r.info["note"] for r in results.rows if r.info["note"]}
    for label, note in notes.items():
        yield f"{label}: {note}."
    yield ""


def _count(row: Row) -> str:
    return f"{row.info['trainable']:,}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f}"


def _ops(results: Results) -> Iterator[str]:
    groups = results.groups("ops")
    if not groups:
        return
    yield "#### Operators"
    yield ""
    rows = []
    for group, direction in groups:
        for row in results.table(group, direction):
            first = f"{group}, {direction}: {row.info['label']}"
            times = f"{1e3 * row.stats['median']:.3f}", f"{row.info['ratio']:.2f}"
            rows.append([first, *times, *op_cells(results, row)])
    yield from table(["", "ms", "x first", "GB/s", "of floor"], rows)
    rates = results.rates()
    if rates is not None:
        yield (
            f"The fastest copy of this run moved {rates.bytes / 1e9:.1f} GB/s, its fastest matrix "
            f"product did {rates.flops / 1e9:.0f} GFLOP/s: {rates.flops / rates.bytes:.1f} flops "
            "in the time of a byte."
        )
        yield ""


def _models(results: Results) -> Iterator[str]:
    for group, direction in results.groups("model"):
        yield f"#### {group}: {direction}"
        yield ""
        rows = [[row.info["label"], *model_cells(row)] for row in results.table(group, direction)]
        yield from table(["", *MODEL_COLUMNS], rows)


MODEL_COLUMNS = ("ms", "tokens/s", "x first", "peak MiB", "trainable")


def model_cells(row: Row) -> list[str]:
    info = row.info
    ratio = f"{info['ratio']:.3f} [{info['ratio_q1']:.3f}, {info['ratio_q3']:.3f}]"
    times = f"{1e3 * row.stats['median']:.1f}", f"{info['tokens_per_s']:,.0f}"
    return [*times, ratio, _mib(info["peak_bytes"]), _count(row)]


def op_cells(results: Results, row: Row) -> list[str]:
    """Format the rate in bytes, and the floor divided by the time, with what determines it."""
    seconds, floor = row.stats["median"], results.floor(row)
    rate = f"{row.info['bytes'] / seconds / 1e9:.1f}" if "bytes" in row.info else ""
    return [rate, f"{floor.seconds / seconds:.0%} ({floor.by})" if floor is not None else ""]
