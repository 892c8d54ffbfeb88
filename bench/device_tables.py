"""Tables of single kernels on a GPU, from the lines of gpu_decide.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from contestants import BULK, FLOOR, LORA
from decide.lines import Figure, figures
from decide.page import KERNELS, TILES, commit_of, environment_of
from interleave import summary
from sections import table
from store import DEVICE, Machine

COPY = "clone"


def kernels(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the times of Triton's kernels, in microseconds and in copies of the same rows.

    The last column has the fastest of the other tiles, if one was faster than the default.
    """
    for machine, parts in _measured(machines):
        rows = []
        for part, found in parts.items():
            if part.endswith(TILES) or "triton" not in found:
                continue
            ours, copy = found["triton"], found.get(COPY)
            ratio = f"{summary(ours.ratios(copy))[0]:.2f}" if copy is not None else ""
            rows.append([part, _us(ours), ratio, _fastest_tile(parts.get(part + TILES, {}))])
        yield f"**{_source(machine)}**:"
        yield ""
        yield from table(["", "µs", "of a copy", "fastest other tile, µs"], rows)


def _fastest_tile(found: dict[str, Figure]) -> str:
    tiles = {name: f for name, f in found.items() if name.startswith("triton ")}
    if not tiles or "triton" not in found:
        return ""
    ratios = {name: summary(f.ratios(found["triton"])) for name, f in tiles.items()}
    name = min(ratios, key=lambda name: ratios[name][0])
    _, _, high = ratios[name]
    return f"{_us(tiles[name])} ({name.removeprefix('triton ')})" if high < 1 else ""


def sides(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the times of each kernel in CUDA C++ and in Triton, and their ratio."""
    for machine, parts in _measured(machines):
        rows = []
        for part, found in parts.items():
            if not part.endswith(TILES) and {"triton", "cuda"} <= found.keys():
                ratio = summary(found["cuda"].ratios(found["triton"]))[0]
                rows.append([part, _us(found["cuda"]), _us(found["triton"]), f"{ratio:.2f}"])
        yield f"**{_source(machine)}**:"
        yield ""
        yield from table(["", "CUDA C++, µs", "Triton, µs", "C++ / Triton"], rows)


STEPS = {
    "linear": "frozen `nn.Linear`",
    "input side, no scale": "BOFT(2, 8), without a scale",
    "input side": "BOFT(2, 8)",
    "merged": "BOFT(2, 8), rotating and scaling the weight instead",
    "weight side": "BOFT(2, 8), rotating the weight instead, the scale as a pass of its own",
    LORA: "LoRA r=16",
    "boft-dense": "BOFT(10, 8), dense",
}


def steps(machines: Sequence[Machine]) -> Iterator[str]:
    """Yield the times of a training step of a large layer, and their ratios to the frozen one's."""
    for machine in machines:
        found = {
            figure.name: figure
            for figure in figures(machine.decided)
            if (figure.section, figure.part) == (DEVICE, str(BULK))
        }
        if FLOOR in found:
            rows = []
            for name, label in STEPS.items():
                if name in found:
                    ratio = summary(found[name].ratios(found[FLOOR]))[0]
                    rows.append([label, _us(found[name]), f"{ratio:.2f}"])
            yield from table([machine.name, "µs", "parts of the frozen layer"], rows)


def _measured(
    machines: Sequence[Machine],
) -> Iterator[tuple[Machine, dict[str, dict[str, Figure]]]]:
    """Yield each machine that timed kernels, with its parts: part -> contestant -> figure."""
    for machine in machines:
        parts: dict[str, dict[str, Figure]] = {}
        for figure in figures(machine.decided):
            if figure.section == KERNELS:
                parts.setdefault(figure.part, {})[figure.name] = figure
        if parts:
            yield machine, parts


def _us(figure: Figure) -> str:
    microseconds = 1e6 * figure.quartiles[0] / figure.facts.get("launches", 1)
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def _source(machine: Machine) -> str:
    facts = environment_of(machine.decided)
    versions = f"torch {facts['torch']}, Triton {facts['triton']}"
    return f"{machine.name}, {versions}, commit {commit_of(machine.decided, KERNELS)}"
