"""Page docs/benchmarks.md, made from the committed results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from contestants import NAMES
from decide.page import section
from environment import slug
from goals import goals, gpu_goals
from judging import MET
from operators import BOTH
from results import Results, Row

METHOD = """\
<!-- Written by bench/run.py from bench/results: change bench/page.py, not this file. -->

# Benchmarks

`make bench` runs the benchmarks, prints the tables below and writes them to this page. It also
writes the raw data ([bench/results](../bench/results)). `pytest bench/ --benchmark-only` measures
without the report. `make bench ARGS=--help` lists the options, such as device, dtype, shapes,
backend and rounds.

## What is compared

The benchmark of layers times one linear layer with a bias. Its shape is given as input features x
output features x tokens. It is timed in forward alone, and in forward with backward. The
contestants are the frozen `nn.Linear` (the floor), PEFT's adapters around it, and `BOFTLinear` as
BOFT(m, b), with m factors of block size b. BOFT(10, 8) is the butterfly in which every output
depends on every input; it is measured only at 4096 features.

The rivals are those of a user who may choose any method: PEFT's LoRA, its OFT (version 2, with the
series that is its default and exact), its BOFT, and its PSOFT, which rotates within the largest
singular vectors of the weight; BOFT(2, 8) with rotated activations in plain torch, as pull request
3540 of PEFT describes it; and a Monarch layer (MoRe), which adds a product of two block-diagonal
matrices. PSOFT and Monarch get the rank with about as many parameters as BOFT(2, 8). A row that
is described here and missing below has not been measured yet.

All contestants share one weight. The input requires a gradient, as it does inside a network. The
upstream gradient is random, and the adapters hold small random numbers. PEFT's layers are called
directly, without a model around them.

## How it is measured

- The contestants run **interleaved**. Every round times each of them once, in an order in which
  each follows each of the others equally often. A slow minute of the machine therefore falls on
  all of them alike.
- The **overhead** of a contestant is its time divided by the floor's time in the same round, minus
  one. The tables show the median over the rounds, with the quartiles in brackets. Contestants more
  than five times slower than the median one run in only a few of the rounds.
- "Forward" includes making the graph. Gradients are cleared outside of the timed part, garbage
  collection is off, and the device is idle before each reading of the clock. Before the
  measurement the heap is brought to the state of a long-running process, because a new process on
  Linux pays for page faults.
- **Saved** is the memory that the graph keeps for backward. Each storage counts once; parameters
  and buffers do not count. The frozen layer keeps nothing, because the gradient of its input needs
  only the weight, so an adapter that keeps the input pays for it. **Peak** is the largest amount
  of tensor memory that forward and backward hold beyond the memory in use before. It does not
  contain the scratch memory of the BLAS. **Adapter** is the memory of the adapter's parameters and
  buffers.
- Before a layer is timed, its output and the gradient of its input are compared with those of the
  merged weight. On a layer of 256 features all gradients are compared with float64 matrices built
  from the definition. (BOFT(10, 8) is checked there with six factors, which mix all 256 features.)
  Rivals are checked there too: against the weight that PEFT's or LyCORIS' own code merges, or
  against the definition if they are written here (bench/definitions.py). A layer with wrong results
  is not timed.
- pytest-benchmark times one function after the other, so the interleaved durations are replayed
  through its clock. bench/interleave.py explains why that is exact.

On a GPU the results of a training step also have two times apart from each other, of the frozen
layer, LoRA and this package's layers. One is that of the host alone, while the device is held
busy; the other is that of the device alone, by a replayed CUDA graph (`host_ms` and `device_ms` in
the CSV file). No committed result has them yet.

With `--extras compiled-boft,lycoris-boft` two more contestants take part: a BOFT(2, 8) in plain
torch under torch.compile, and LyCORIS' BOFT, which rotates the outputs with as many factors as
possible.

PEFT's BOFT falls back to one factor if its CUDA extension is not built. That is always so on a
CPU, and with torch 2.11, because the extension of PEFT 0.21.0 does not compile with its headers.
The name of its row contains the m that was measured.

## Operators and their floors

Every operator has a **floor**, the larger of two times. One is the time for its bytes at the rate
of the fastest `x.clone()` of the rotation's x. The other is the time for its flops at the rate of
the fastest `torch.mm` of 2048 x 2048 matrices in the run's dtype. Both rates are measured in the
same run. The column "of floor" gives the floor divided by the median time, and names the quantity
that determines the floor. The column "GB/s" gives the same bytes divided by the median time. That
x takes 8 MiB in float32, so both the copy and the rotation may find it in a large cache.

On a GPU the operands are larger: 8192 rows of 4096 features, and matrices of 4096 x 4096. The
Cayley transform gets the blocks of all linear layers of Llama-3.1-8B as BOFT(2, 8). A rotation is
timed there as its passes over the rows, without autograd and without the time to make the stages.
Ten calls lie between two readings of the clock, so that the device need not wait for each launch.
`butterfly_groups` gets the 224 parameters of those layers one by one, and its time includes
everything that Python does with them.

- **Rotation** of N rows of d features in groups of S = b 2^(m-1). Forward reads and writes x and
  takes 2 N d S flops. Backward also computes the Gram matrices; it reads x and the gradient,
  writes the gradient of x, and takes 4 N d S flops. For S = 16 in float32 that is 4 flops for each
  byte forward and 5.3 backward. On a CPU that computes fewer flops in the time of a byte, the
  arithmetic determines the floor, and a rotation cannot be as fast as a copy. If the factors form
  several stages, S is the sum over the stages.
- **Cayley transform** of blocks of size b, in float32 in every run. Parameters, blocks and
  gradients each move once. A block takes b^3 multiply-adds forward, and two products of b^3
  multiply-adds backward. The computation runs in float64, which is assumed to have half the rate
  of float32. Runs in another dtype do not measure the rate of float32, so there only the bytes
  count.
- **Compose** and **scale**, without autograd. Compose makes stages of size 64 from four factors of
  size 8, in float32 in every run. Scale multiplies outputs by a scale around their bias.
  "Reference" is the same operation in plain torch.
- **Linear** compares a plain product, `F.linear` or `grad @ weight`, with the op that computes a
  whole layer of one stage of size 16. The op's forward does rotation, product, scale and bias, and
  keeps what the backward needs. Its backward computes the gradients of x, stage, scale and bias.
  If no kernel serves that op, it is not in the table. The kernel has its own matrix product, which
  can be faster than the BLAS that torch calls. The op can then take less time than the plain
  product, a value above 100 % of the floor is possible, and the overhead of a layer can fall below
  zero. The reason is the faster product, not omitted work: the results of the op are compared with
  plain torch before it is timed.

## Models

The model has the Llama architecture and random weights, and all linear layers of its blocks are
adapted. A training step is forward, loss, backward, and AdamW on the trained parameters. The
contestants share the frozen weights, and their steps are interleaved as above. **Peak** is the
memory that a step holds beyond weights, adapters and optimizer state. "Together" in the name of a
row was a hook that made all rotations of a model in one launch. Measurements showed that it cost
host time, and it was removed. On a CPU the model is small, and its figures say little about large
models.

## Goals

A goal compares times of the same round. Brackets hold the quartiles of that comparison over the
rounds. The goal is met if both quartiles are within the bound, and not met if both are beyond it.
Otherwise the run cannot tell, and the verdict is **not separable**, whatever the median is. A goal
for several shapes is met if every shape meets it, and not met if one shape does not. A goal is
judged only if the run measured everything that it needs. [Kernels](kernels.md) has times of single
kernels on an H200, measured with replayed CUDA graphs, each with its floor. They do not enter the
verdicts here.
"""


def write(path: Path, results: Sequence[Results], decided: Sequence[Sequence[dict]] = ()) -> None:
    """Write the page of the given results, in their order, then of runs of gpu_decide.py.

    Args:
        path: the page.
        results: runs of the benchmarks.
        decided: the lines of runs of gpu_decide.py.
    """
    parts = [METHOD]
    devices = list(dict.fromkeys(r.machine["device"] for r in results))
    if devices == ["cpu"]:
        parts.append("Not measured on a GPU: all figures below are of a CPU.\n")
    for result in results:
        parts.append("\n".join(_section(result)))
    parts += ["\n".join(section(lines)) for lines in decided]
    if set(devices) <= {"cpu"}:
        parts.append(_no_gpu())
    if not decided:
        parts.append(NOT_DECIDED)
    path.write_text("\n".join(parts))


NOT_DECIDED = """\
## Host and device of a GPU apart

No GPU has run `make gpu-decide` yet ([tuning.md](tuning.md#what-a-gpu-is-to-decide) has its
sections and rules).
"""


def _no_gpu() -> str:
    goals_left = "\n".join(f"- not measured: {text}." for text in gpu_goals())
    return f"""\
## GPU

Nothing was measured on a GPU yet. On a machine with one,

    make bench ARGS="--device cuda --dtype bf16"

writes its results into bench/results and its figures here. They are to meet these goals:

{goals_left}
"""


def image(results: Results) -> str:
    """Path of the chart of a device, relative to the folder of the page."""
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
    judged = goals(results)
    relevant = gpu_goals() if machine["device"] != "cpu" and backend == "auto" else []
    unmeasured = [text for text in relevant if text not in {goal.text for goal in judged}]
    if judged or unmeasured:
        yield "### Goals"
        yield ""
        for goal in judged:
            verdict = MET if goal.verdict == MET else f"**{goal.verdict}**"
            yield f"- {verdict}: {goal.text}. Measured: {goal.measured}."
        yield from (f"- not measured: {text}." for text in unmeasured)
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
    groups = [g for g, measured in results.groups("layer") if measured == direction]
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
    """Format the rate in bytes, and the floor divided by the time, with what determines it."""
    seconds, floor = row.stats["median"], results.floor(row)
    rate = f"{row.info['bytes'] / seconds / 1e9:.1f}" if "bytes" in row.info else ""
    return [rate, f"{floor.seconds / seconds:.0%} ({floor.by})" if floor is not None else ""]
