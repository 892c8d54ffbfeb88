"""docs/benchmarks.md, made from the committed results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from contestants import NAMES
from environment import slug
from goals import MET, goals, gpu_goals
from operators import BOTH
from results import Results, Row

METHOD = """\
<!-- Written by bench/run.py from bench/results: change bench/page.py, not this file. -->

# Benchmarks

`make bench` measures, prints the tables below, and writes them here with the raw data
([bench/results](../bench/results)). `pytest bench/ --benchmark-only` is the same without the
report; `make bench ARGS=--help` lists the options (device, dtype, shapes, backend, rounds).

## What is compared

One linear layer with a bias, given as input features x output features x tokens, forward alone
and with its backward: the frozen `nn.Linear` (the floor), PEFT's adapters around it, and
`BOFTLinear` as BOFT(m, b): m factors of block size b. BOFT(10, 8), the butterfly of which every
output depends on every input, takes part at 4096 features only. All share one weight. The input
requires a gradient, as inside a network, the upstream gradient is random, and the adapters hold
small random numbers. PEFT's layers are called directly, without the model around them.

## How

- The contestants run **interleaved**: every round times each of them once, in an order that lets
  each follow each of the others equally often. A slow minute of the machine falls on all alike.
- The **overhead** is the median, over the rounds, of the time divided by the floor's time in the
  same round, minus one; brackets hold its quartiles. Contestants more than five times slower than
  the median one run in a few of the rounds only.
- "Forward" includes making the graph. Gradients are cleared outside of the timed part, garbage
  collection is off, and the device is idle before each reading of the clock. The heap is brought
  to the state of a long-running process first (on Linux a young one pays page faults instead).
- **Saved** is what the graph keeps for backward: each storage once, without parameters and
  buffers. The frozen layer keeps nothing (the gradient of its input needs the weight alone), so
  the input counts for whoever keeps it. **Peak** is the most that forward and backward hold beyond
  what was there before: all tensor memory, not the scratch of the BLAS. **Adapter** is what the
  adapter's parameters and buffers take.
- Before a layer is timed, its output and the gradient of its input are checked against the merged
  weight, and on a layer of 256 features all gradients against float64 matrices built from the
  definition (of BOFT(10, 8) with the six factors that mix all of those). A wrong answer is not
  timed.
- pytest-benchmark times one function after the other, so the interleaved durations are replayed
  through its clock; bench/interleave.py says why that is sound.

Where asked for (`--extras`) a BOFT(2, 8) in plain torch under torch.compile takes part, and
LyCORIS' BOFT, which rotates the outputs in as many factors as there can be.

PEFT's BOFT falls back to one factor wherever its CUDA extension is not built, so on a CPU always,
and with torch 2.11, whose headers it does not compile with (PEFT 0.21.0): the name of its row has
the m that was measured.

## Operators and their floors

Every operator has a **floor**: the larger of its bytes at the rate of the fastest `x.clone()` of
the rotation's x, and its flops at the rate of the fastest `torch.mm` of 2048 x 2048 matrices in the
run's dtype, both measured in the same run. "Of floor" is that floor in parts of the median time,
and which of the two it comes from; "GB/s" is the same bytes over that time. That x takes 8 MiB in
float32 and may lie in a large cache, for the copy as for the rotation.

On a GPU the operands are larger: 8192 rows of 4096 features, matrices of 4096 x 4096, and for the
Cayley transform the blocks of all linear layers of Llama-3.1-8B as BOFT(2, 8). A rotation is there
the passes over the rows, without autograd and without making the stages, and ten calls lie between
two readings of the clock, so that the device need not wait for each launch. `butterfly_groups`
gets the 224 parameters of those layers one by one, and its time has all that Python does with them
in it.

- **Rotation** of N rows of d features in groups of S = b 2^(m-1): x in and out and 2 N d S flops;
  for the backward, which gives the Gram matrices as well, x and the gradient in, the gradient of x
  out and 4 N d S flops. For S = 16 in float32 that is 4 flops for each byte forward and 5.3
  backward. A CPU that does fewer flops than that in the time of a byte has its floor in the
  arithmetic, not in the bytes, and cannot rotate as fast as it copies. Where the factors make
  several stages, S is the sum of theirs.
- **Cayley transform** of blocks of size b, in float32 in every run: parameters, blocks and
  gradients once each; b^3 multiply-adds a block forward and two products of b^3 backward. They are
  float64 inside, and that is taken to run at half the rate of float32. (In runs in another dtype,
  which do not measure that rate, the bytes alone count.)
- **Compose** and **scale**, without autograd: four factors of size 8 into stages of 64, in float32
  in every run, and the scale of outputs around their bias. "Reference" is the same in plain torch.
- **Linear**: the product itself, `F.linear` or `grad @ weight`, against the op that does the whole
  of a layer of one stage of size 16 in it: rotation, product, scale and bias, keeping what the
  backward needs; backward the gradients of x, stage, scale and bias. Where no kernel serves that
  op it is not in the table. The kernel has a matrix product of its own, which can be faster than
  the BLAS that torch calls: then the op takes less time than the product alone, a part of the floor
  above 100 % is possible, and a layer's overhead can fall below zero. That comes from the product,
  not from work left out: the op's results are checked against plain torch before it is timed.

## Models

A model of the Llama architecture with random weights, all linear layers of its blocks adapted; one
training step: forward, loss, backward, AdamW on what is trained. The contestants share the frozen
weights, and their steps are interleaved as above. **Peak** is what a step holds beyond weights,
adapters and optimizer state. "Together" in a row was a hook that made the rotations of a model in
one launch; it was measured to cost host time and was removed. On a CPU the model is a small one,
whose figures say little about large ones.

## Goals

A goal compares times of the same round. Brackets hold the quartiles of that comparison over the
rounds. If both are within the bound, the goal is met; if both are beyond, not met; otherwise the
run cannot tell, and the verdict is **not separable**, whatever the median says. A goal for several
shapes is met if every one of them meets it, and not met as soon as one does not. A goal is
judged only where a run measured all that it needs. Times of single kernels on an H200, from
replayed CUDA graphs, each with its floor, are in [Kernels](kernels.md), whatever is judged here.
"""


def write(path: Path, results: Sequence[Results]) -> None:
    """The page for the results given, in their order."""
    parts = [METHOD]
    devices = list(dict.fromkeys(r.machine["device"] for r in results))
    if devices == ["cpu"]:
        parts.append("Not measured on a GPU: all figures below are of a CPU.\n")
    for result in results:
        parts.append("\n".join(_section(result)))
    if set(devices) <= {"cpu"}:
        parts.append(_no_gpu())
    path.write_text("\n".join(parts))


def _no_gpu() -> str:
    goals_left = "\n".join(f"- not measured: {text}." for text in gpu_goals())
    return f"""\
## GPU

Nothing was measured on a GPU yet. On a machine with one,

    make gpu-report

tunes, measures, writes its results into bench/results and its figures here
([tuning.md](tuning.md)). They are to meet these goals:

{goals_left}
"""


def image(results: Results) -> str:
    """Path of the chart of a device, from the folder of the page."""
    return f"images/bench_layer_{slug(results.machine['device']).replace('-', '_')}.png"


def _section(results: Results) -> Iterator[str]:
    machine = results.machine
    backend = machine["backend"]
    yield f"## {machine['device'].upper()}, {machine['dtype']}, backend {backend}"
    yield ""
    yield _provenance(results)
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
    found = goals(results)
    asked = gpu_goals() if machine["device"] != "cpu" and backend == "auto" else []
    left = [text for text in asked if text not in {goal.text for goal in found}]
    if found or left:
        yield "### Goals"
        yield ""
        for goal in found:
            verdict = MET if goal.verdict == MET else f"**{goal.verdict}**"
            yield f"- {verdict}: {goal.text}. Measured: {goal.measured}."
        yield from (f"- not measured: {text}." for text in left)
        yield ""


def _provenance(results: Results) -> str:
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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _overheads(results: Results, direction: str) -> Iterator[str]:
    groups = [g for g, of in results.groups("layer") if of == direction]
    if not groups:
        return
    yield f"### Overhead of {direction}"
    yield ""
    rows = []
    for name in NAMES:
        cells = [results.find(group, direction, name) for group in groups]
        label = next((cell.info["label"] for cell in cells if cell), None)
        if label:
            rows.append([label, *(_overhead(cell) if cell else "" for cell in cells)])
    yield from _table(["", *groups], rows)


def _overhead(row: Row) -> str:
    median, low, high = (100 * (row.info[k] - 1) for k in ("ratio", "ratio_q1", "ratio_q3"))
    if row.name == "linear":
        return f"{1e3 * row.stats['median']:.2f} ms"
    return f"{median:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _details(results: Results) -> Iterator[str]:
    yield "### Time and memory of forward and backward"
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
    yield from _table(header, rows)
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
    yield "### Operators"
    yield ""
    rows = []
    for group, direction in groups:
        for row in results.table(group, direction):
            first = f"{group}, {direction}: {row.info['label']}"
            times = f"{1e3 * row.stats['median']:.3f}", f"{row.info['ratio']:.2f}"
            rows.append([first, *times, *op_cells(results, row)])
    yield from _table(["", "ms", "x first", "GB/s", "of floor"], rows)
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
        yield f"### {group}: {direction}"
        yield ""
        rows = [[row.info["label"], *model_cells(row)] for row in results.table(group, direction)]
        yield from _table(["", *MODEL_COLUMNS], rows)


MODEL_COLUMNS = ("ms", "tokens/s", "x first", "peak MiB", "trainable")


def model_cells(row: Row) -> list[str]:
    info = row.info
    ratio = f"{info['ratio']:.3f} [{info['ratio_q1']:.3f}, {info['ratio_q3']:.3f}]"
    times = f"{1e3 * row.stats['median']:.1f}", f"{info['tokens_per_s']:,.0f}"
    return [*times, ratio, _mib(info["peak_bytes"]), _count(row)]


def op_cells(results: Results, row: Row) -> list[str]:
    """Bytes per second, and the floor in parts of the time, with what the floor comes from."""
    seconds, floor = row.stats["median"], results.floor(row)
    rate = f"{row.info['bytes'] / seconds / 1e9:.1f}" if "bytes" in row.info else ""
    return [rate, f"{floor.seconds / seconds:.0%} ({floor.by})" if floor is not None else ""]
