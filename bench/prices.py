"""The price of the adapters: blocks for README.md and docs/, made from the committed results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from contestants import BULK, FLOOR, LORA, SHAPES, SMALL_SHAPES, Shape
from interleave import summary
from operators import BOTH
from sections import table
from store import Machine, Quartiles, indexed, peft_models

BOFT = "boft-2-8"
OUR_SIDE = "input side"  # name of the same layer where the device is timed alone
# Contestants of the tables, in their order. Rows that no machine has measured are shown too.
ROWS = {
    BOFT: "**BOFT(2,8), boft_ops**",
    "oft-8": "**OFT b=8, boft_ops**",
    LORA: "LoRA r=16, PEFT",
    "peft-oft": "OFT b=8, PEFT",
    "peft-boft": "BOFT b=8, PEFT 0.21: m = 1",
    "peft-boft-activation": "BOFT(2,8), PEFT's PR 3540",
    "lycoris-boft": "BOFT b=8, LyCORIS",
    "peft-psoft": "PSOFT, PEFT",
    "more": "Monarch (MoRe)",
    "compiled-boft": "BOFT(2,8), torch.compile",
}
MEDIUM = Shape(2048, 2048, 1024)
ON_CPU = (SMALL_SHAPES[0], SHAPES[0], MEDIUM, Shape(4096, 4096, 512))
ON_GPU = (SHAPES[0], MEDIUM, Shape(4096, 4096, 512), BULK)
NOT_MEASURED, ABSENT = "not measured", "-"


ONLY_IF_MEASURED = ("peft-psoft", "more", "compiled-boft")


def shapes_of(machine: Machine) -> tuple[Shape, ...]:
    """List the shapes that the table of prices has for a machine."""
    return ON_CPU if machine.on_cpu else ON_GPU


def price(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the table of README.md: methods in rows; time and memory of each machine in columns."""
    measured = [machine for machine in machines if machine.steps]
    typical = [(machine, MEDIUM if machine.on_cpu else BULK) for machine in measured]
    head, under, notes = [""], [""], []
    for machine, shape in typical:
        head += [f"{machine.name}, {machine.dtype}: {_long(shape)} rows", ""]
        note = machine.memory_note()
        notes += [note] if note else []
        under += ["time", f"kept {'¹' * len(notes)}" if note else "kept"]
    rows = [under, ["frozen `nn.Linear`"]]
    for machine, shape in typical:
        rows[-1] += [f"1 ({_milliseconds(machine, shape)} ms)", _kept(machine, shape, FLOOR)]
    for name, label in ROWS.items():
        ratios = [machine.ratio(shape, name) for machine, shape in typical]
        if name in ONLY_IF_MEASURED and not any(ratios):
            continue
        cells = [label]
        for (machine, shape), ratio in zip(typical, ratios, strict=True):
            time = NOT_MEASURED if ratio is None else _short(ratio[0])
            cells += [f"**{time}**" if name == BOFT else time, _kept(machine, shape, name)]
        rows.append(cells)
    yield from table(head, rows)
    for i, note in enumerate(notes):
        yield f"{'¹' * (i + 1)} {note}"
        yield ""
    yield f"Medians of interleaved rounds. {'; '.join(machine.source() for machine in measured)}."


def shapes(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the table of several shapes: methods in rows, machines in columns."""
    measured = [machine for machine in machines if machine.steps]
    yield "Forward and backward of one linear layer, in multiples of the frozen `nn.Linear`."
    for kind, listed in (("CPU", ON_CPU), ("GPU", ON_GPU)):
        if any(shapes_of(machine) is listed for machine in measured):
            yield f"On a {kind}: {', '.join(map(_long, listed))} rows, in this order."
    yield ""
    rows = [["frozen layer, ms"]]
    for machine in measured:
        times = (_milliseconds(machine, shape) for shape in shapes_of(machine))
        rows[0].append(" / ".join(times))
    for name, label in ROWS.items():
        rows.append([label, *(_ratios(machine, name) for machine in measured)])
    yield from table(["", *(machine.name for machine in measured)], rows)


def wins(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield a list of what BOFT(2, 8) takes of LoRA's time: layers, the device alone, models."""
    for machine in machines:
        if not machine.steps:
            continue
        yield f"- {_comparison(machine)}"
        device = {
            shape: ratio for shape, ratio in machine.device_alone(OUR_SIDE, LORA).items() if ratio
        }
        if device:
            listed = ", ".join(f"{shape} ({ratio[0]:.2f})" for shape, ratio in device.items())
            yield f"- {machine.name}, the device alone (a replayed CUDA graph): {listed}."
        for model, ratio in machine.models(BOFT, LORA).items():
            yield f"- {machine.name}, a training step of {model}: {_bracketed(ratio)}."


def headline(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield one sentence: the range of BOFT(2, 8)'s part of LoRA's time on each machine."""
    ranges = []
    for machine in machines:
        shapes = map(Shape.parse, machine.steps)
        found = [ratio[0] for shape in shapes if (ratio := machine.ratio(shape, BOFT, LORA))]
        if found:
            ranges.append(f"{min(found):.2f} to {max(found):.2f} on an {machine.name}")
    if ranges:
        *others, last = ranges
        yield (
            "Forward and backward of a BOFT(2, 8) layer take this many times as long as those of "
            f"LoRA r=16: {', '.join(others)}{' and ' if others else ''}{last}. "
            "The ranges are over all measured shapes ([figures](#speed-and-memory))."
        )


def _long(shape: Shape) -> str:
    return f"{shape.d} → {shape.n} with {shape.tokens}"


def _milliseconds(machine: Machine, shape: Shape) -> str:
    times = machine.steps.get(str(shape), {}).get(FLOOR)
    return f"{1e3 * summary([*times.values()])[0]:.3g}" if times else ABSENT


def _ratios(machine: Machine, name: str) -> str:
    found = [machine.ratio(shape, name) for shape in shapes_of(machine)]
    if not any(found):
        return NOT_MEASURED
    return " / ".join(ABSENT if ratio is None else _short(ratio[0]) for ratio in found)


def _short(ratio: float) -> str:
    """Format a ratio by three digits, and by two decimals at most."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _kept(machine: Machine, shape: Shape, name: str) -> str:
    found = machine.memory(shape, name)
    return "" if found is None else f"{found[0] / 2**20:.1f} MiB"


def _comparison(machine: Machine) -> str:
    """Sort the shapes of a machine by the verdict on BOFT(2, 8) against LoRA.

    It is faster or slower if both quartiles of the ratio say so.
    """
    verdicts: dict[str, list[str]] = {"faster": [], "slower": [], "not separable": []}
    for text in machine.steps:
        ratio = machine.ratio(Shape.parse(text), BOFT, LORA)
        if ratio is not None:
            middle, low, high = ratio
            verdict = "faster" if high < 1 else "slower" if low > 1 else "not separable"
            verdicts[verdict].append(f"{text} ({middle:.2f})")
    parts = [f"{verdict} at {', '.join(shapes)}" for verdict, shapes in verdicts.items() if shapes]
    return f"{machine.name}: {'; '.join(parts) or NOT_MEASURED}."


def pure_install(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the time of BOFT(2, 8) with the kernels and in plain torch, over the frozen layer."""
    for machine in machines:
        runs = {
            run.machine["backend"]: run for run in machine.runs if run.machine["dtype"] == "fp32"
        }
        if not {"auto", "reference"} <= runs.keys():
            continue
        rows = []
        for group, direction in runs["reference"].groups("layer"):
            pair = [runs[name].find(group, direction, BOFT) for name in ("auto", "reference")]
            if direction == BOTH and None not in pair:
                times = (_short(row.info["ratio"]) for row in pair)
                rows.append([f"{_long(Shape.parse(group))} rows", *times])
        yield from table([machine.name, "with kernels", "pure"], rows)


# --- docs/upstream.md -----------------------------------------------------------------------------

PEFT_ROWS = {
    LORA: "LoRA r=16, PEFT",
    "peft-oft": "OFT b=8 (default), PEFT",
    "peft-oft-exact": "OFT b=8 (exact), PEFT",
    "peft-oft-32": "OFT b=32 (default), PEFT",
    "oft-8": "OFT b=8, this package",
    "oft-32": "OFT b=32, this package",
    "peft-boft": "BOFT b=8, PEFT, m = 1 without its extension",
    "peft-boft-activation": "BOFT(2,8), activations rotated as in pull request 3540",
    BOFT: "BOFT(2,8), this package",
}


def upstream(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield, for each machine, a table of PEFT's methods with and without the kernels."""
    for machine in machines:
        if not machine.steps:
            continue
        shapes = [Shape.parse(text) for text in machine.steps]
        yield f"**{machine.source()}.**"
        yield "Forward and backward of one layer, in multiples of the frozen one [quartiles]:"
        yield ""
        rows = []
        for name, label in PEFT_ROWS.items():
            found = [machine.ratio(shape, name) for shape in shapes]
            cells = [ABSENT if ratio is None else _bracketed(ratio) for ratio in found]
            rows.append([label, *(cells if any(found) else [NOT_MEASURED] * len(shapes))])
        yield from table(["", *map(str, shapes)], rows)


def _bracketed(ratio: Quartiles) -> str:
    middle, low, high = map(_short, ratio)
    return f"{middle} [{low}, {high}]"


# --- docs/interop.md ------------------------------------------------------------------------------

MODEL_ROWS = {
    "lora-r16": "LoRA r=16, PEFT",
    "peft-boft": "BOFT(b=8, m=1), PEFT",
    "accelerated-boft": "the same, accelerated",
}


def peft_model(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the times of bench/peft_model.py: a PEFT model, stock and accelerated."""
    for machine, result in peft_models(machines):
        rows = []
        for name, label in MODEL_ROWS.items():
            seconds = result["seconds"][name]
            middle, low, high = (f"{value:.2f}" for value in summary(seconds))
            time = f"{middle} s [{low}, {high}], {len(seconds)} steps"
            rows.append([label, time, f"{result['trainable'][name]:,}"])
        yield f"**{machine.name}**, commit {(result['commit_info']['id'] or 'unknown')[:9]}:"
        yield ""
        yield from table(["", "time of a step", "trained"], rows)
        parts = {name: _bracketed_3(quartiles) for name, quartiles in result["parts_of"].items()}
        yield (
            f"Step by step, the accelerated model takes {parts['peft-boft']} of stock PEFT's time "
            f"and {parts['lora-r16']} of LoRA's."
        )
        yield ""


def _bracketed_3(quartiles: Sequence[float]) -> str:
    middle, low, high = (f"{value:.3f}" for value in quartiles)
    return f"{middle} [{low}, {high}]"


def by_rows(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the times of bench/indexed.py: rows rotated each by its own adapter."""
    for machine, lines in indexed(machines):
        cases: dict[tuple[str, ...], dict[str, str]] = {}
        for line in lines:
            key = line["adapters"], line["rows"], line["run"]
            times = f"{line['ratio']} [{line['q1']}, {line['q3']}]"
            cases.setdefault(key, {})[line["contestant"]] = times
        rows = [
            [adapters, f"{n}, {run}", found["rotate_indexed"], found["loop with masks"]]
            for (adapters, n, run), found in cases.items()
            if "rotate_indexed" in found
        ]
        yield f"**{machine.name}**:"
        yield ""
        head = ("adapters", "rows, of each request", "`rotate_indexed`", "a loop with masks")
        yield from table(head, rows)
