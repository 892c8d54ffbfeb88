"""Sections of docs/benchmarks.md, one for each committed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from contestants import NAMES
from environment import slug
from goals import goals, gpu_goals
from judging import MET
from machines import machine_name
from operators import BOTH
from results import Results, Row

# Contestants whose rank or number of factors depends on the shape.
OF_ANY_SIZE = {
    "peft-psoft": "PEFT PSOFT",
    "more": "Monarch (MoRe)",
    "lycoris-boft": "LyCORIS BOFT",
}
REMOVED = "boft-together"  # a contestant of old results that the package does not have any more
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
    if backend == "reference":
        yield "[Install](install.md#a-pure-install) compares its times with those of the kernels."
        yield ""
    else:
        for direction in (BOTH, "forward"):
            yield from _overheads(results, direction)
        yield from _notes(results)
    if backend == "auto":
        yield from _memory(results)
        yield from _ops(results)
        yield from _models(results)
    yield from _goals(results)


def tables(results: Results) -> Iterator[str]:
    """Yield the lines of Markdown for all that a run measured, of any backend, and its goals."""
    yield provenance(results)
    yield ""
    for direction in (BOTH, "forward"):
        yield from _overheads(results, direction)
    for part in (_notes, _memory, _ops, _models, _goals):
        yield from part(results)


def memory(results: Results) -> Iterator[str]:
    """Yield memory and trained numbers of a run whose times gpu_decide.py has measured again."""
    machine = results.machine
    yield f"### {machine_name(machine)}, {machine['dtype']}: memory"
    yield ""
    yield f"{provenance(results)} The times of this run are older than those above."
    yield ""
    yield from _memory(results)


def provenance(results: Results) -> str:
    """Name machine, software, commit and date of a run."""
    machine, commit = results.machine, results.commit
    where = f"{machine['cpu']}, {machine['threads']} threads"
    if machine["device"] != "cpu":
        where = f"{machine['device']}; host {where}"
    what = ", ".join(f"{k} {machine[k]}" for k in ("torch", "peft", "boft_ops", "python"))
    state = f"commit {(commit['id'] or 'unknown')[:12]}" + (" + changes" if commit["dirty"] else "")
    served = any(backend != "reference" for backend in machine["serving"].values())
    plain = "" if served else " No kernels: plain torch."
    tuned = " Measured choices were in use." if machine.get("tuned") else ""
    return f"{where}. {what}, {state}, {results.date}.{plain}{tuned}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table whose first column is text and whose others are numbers."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _overheads(results: Results, direction: str) -> Iterator[str]:
    if any(measured == direction for _, measured in results.groups("layer")):
        yield f"#### Overhead of {direction}"
        yield ""
        yield from _by_shape(results, direction, _overhead)


def _overhead(row: Row) -> str:
    median, low, high = (100 * (row.info[k] - 1) for k in ("ratio", "ratio_q1", "ratio_q3"))
    if row.name == "linear":
        return f"{1e3 * row.stats['median']:.2f} ms"
    return f"{median:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _notes(results: Results) -> Iterator[str]:
    for group, labels in results.left_out().items():
        yield f"- Left out at {group}, because there was too little memory: {', '.join(labels)}."
    notes = {_label(row): row.info["note"] for row in results.rows if row.info["note"]}
    yield from (f"- {label}: {note}." for label, note in notes.items())
    yield ""


def _label(row: Row) -> str:
    return OF_ANY_SIZE.get(row.name, row.info["label"])


def _memory(results: Results) -> Iterator[str]:
    yield "#### Memory of forward and backward, MiB: saved / peak"
    yield ""
    yield from _by_shape(
        results,
        BOTH,
        lambda row: " / ".join(_mib(row.info[k]) for k in ("saved_bytes", "peak_bytes")),
    )
    yield "#### Trained numbers"
    yield ""
    yield from _by_shape(results, BOTH, _count)


def _by_shape(results: Results, direction: str, cell: Callable[[Row], str]) -> Iterator[str]:
    """Yield a table of layers: contestants in rows, shapes in columns."""
    groups = [g for g, measured in results.groups("layer") if measured == direction]
    rows = []
    for name in NAMES:
        found = [results.find(group, direction, name) for group in groups]
        label = next((_label(row) for row in found if row), None)
        if label:
            rows.append([label, *(cell(row) if row else "" for row in found)])
    yield from table(["", *groups], rows)


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
        found = [row for row in results.table(group, direction) if row.name != REMOVED]
        yield from table(["", *MODEL_COLUMNS], [[r.info["label"], *model_cells(r)] for r in found])


def _goals(results: Results) -> Iterator[str]:
    machine, judged = results.machine, goals(results)
    relevant = gpu_goals() if machine["device"] != "cpu" and machine["backend"] == "auto" else []
    unmeasured = [text for text in relevant if text not in {goal.text for goal in judged}]
    if judged or unmeasured:
        yield "#### Goals"
        yield ""
        for goal in judged:
            verdict = MET if goal.verdict == MET else f"**{goal.verdict}**"
            yield f"- {verdict}: {goal.text}. Measured: {goal.measured}."
        yield from (f"- not measured: {text}." for text in unmeasured)
        yield ""


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
