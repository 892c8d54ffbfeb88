"""Figures in the sentences of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/.

A figure stands between <!-- figure: NAME --> and <!-- /figure -->, within a line. FIGURES has, by
name, the function that makes its text: from committed results, from what another script wrote, or
from a constant of the code. page.py fills them in.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence

from contestants import BULK, LORA, Shape
from decide import lines
from decide.page import commit_of
from environment import ROOT
from interleave import ratios, summary
from operators import FORWARD
from prices import BOFT, MEDIUM, OUR_SIDE
from sizes import sizes_on
from store import DEVICE, Machine

from boft_ops._runtime.linalg import MAX_BATCHED
from boft_ops.ops import product_choice
from boft_ops.ops.rotated_linear import MIN_ROWS
from boft_ops.ops.stages import PASS_COST
from boft_ops.tune import measure, search

Figure = Callable[[Sequence[Machine]], str]

# --- Measured -------------------------------------------------------------------------------------

GPU, ZEN_4, ZEN_5 = "nvidia-h200", "amd-epyc-zen-4", "amd-epyc-zen-5"  # folders of bench/results
ROWS = "8192 rows of 4096"
WIDE = Shape(768, 3072, 512)
COPY = "kernels", f"rotate, groups of 16, {ROWS}", "clone"
HOST = "host", "enqueued, 4096x4096x16"
# The parts of a BOFT(2, 8) layer, forward and backward, beside the product.
PARTS = (
    f"rotate, groups of 16, {ROWS}",
    f"rotate_backward, groups of 16, {ROWS}",
    "scale, (2,8) of 4096 features, 8192 rows",
    "scale_backward, (2,8) of 4096 features, 8192 rows",
    "stage_from_skew, (2,8) of 4096 features",
    "stage_from_skew_backward, (2,8) of 4096 features",
)


def _machine(machines: Sequence[Machine], folder: str) -> Machine:
    for machine in machines:
        if machine.folder.name == folder:
            return machine
    raise ValueError(f"bench/results: expected a folder {folder}, got none")


def _decided(machines: Sequence[Machine], section: str, part: str, name: str) -> lines.Figure:
    """Find a figure of gpu_decide.py on the H200."""
    for figure in lines.figures(_machine(machines, GPU).decided):
        if (figure.section, figure.part, figure.name) == (section, part, name):
            return figure
    raise ValueError(f"{GPU}: expected a measurement of {section}, {part}, {name}, got none")


def _microseconds(section: str, part: str, name: str, digits: int = 0) -> Figure:
    def text(machines: Sequence[Machine]) -> str:
        middle, _, _ = _decided(machines, section, part, name).quartiles
        return f"{1e6 * middle:.{digits}f}"

    return text


def _rate(quantity: str, unit: float, key: tuple[str, str, str], digits: int = 0) -> Figure:
    """Bytes or flops a second, in multiples of ``unit``."""

    def text(machines: Sequence[Machine]) -> str:
        figure = _decided(machines, *key)
        work = _decided(machines, "ceilings", f"rates, {ROWS}", figure.name).facts[quantity]
        return f"{work / figure.quartiles[0] / unit:.{digits}f}"

    return text


def _native_costs(machines: Sequence[Machine]) -> str:
    """Microseconds that a layer by C++ kernels takes beyond one by Triton's, kernel by kernel."""

    def seconds(name: str) -> float:
        figures = (_decided(machines, "kernels", part, name) for part in PARTS)
        return sum(figure.quartiles[0] for figure in figures)

    return f"{1e6 * (seconds('cuda') - seconds('triton')):.0f}"


def _step_of_lora(machines: Sequence[Machine]) -> str:
    """Range of BOFT(2, 8)'s time in parts of LoRA's, by the clock, over all shapes of the H200."""
    machine = _machine(machines, GPU)
    found = [machine.ratio(Shape.parse(text), BOFT, LORA) for text in machine.steps]
    return _range([ratio[0] for ratio in found if ratio is not None], 2)


def _model_of_lora(machines: Sequence[Machine]) -> str:
    (ratio,) = _machine(machines, GPU).models(BOFT, LORA).values()
    return f"{ratio[0]:.2f}"


def _compiled(machines: Sequence[Machine]) -> str:
    """Range of the compiled plain BOFT(2, 8)'s time in parts of ours, over all shapes."""
    machine = _machine(machines, ZEN_5)
    found = [machine.ratio(Shape.parse(text), "compiled-boft", BOFT) for text in machine.steps]
    return _range([ratio[0] for ratio in found if ratio is not None], 1)


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _copies(folder: str) -> Figure:
    """Time of rotating rows in groups of 16 on a CPU, in copies of these rows."""

    def text(machines: Sequence[Machine]) -> str:
        run, group = _machine(machines, folder).main, sizes_on("cpu").rotation
        times = {row.name: row.by_round for row in run.table(group, FORWARD)}
        return f"{summary(ratios(times, 'rotate-1-16', 'clone'))[0]:.1f}"

    return text


def _kept(shape: Shape) -> Figure:
    """Memory that BOFT(2, 8) keeps for the backward pass, in parts of LoRA's."""

    def text(machines: Sequence[Machine]) -> str:
        (ours, _), (lora, _) = (_machine(machines, ZEN_5).memory(shape, n) for n in (BOFT, LORA))
        return f"{ours / lora:.1f}"

    return text


def _variants(machines: Sequence[Machine]) -> str:
    lines_ = (_machine(machines, GPU).folder / "kernels.csv").read_text().splitlines()
    return str(sum(not line.startswith("#") for line in lines_) - 1)  # without the head


def _passed(machines: Sequence[Machine]) -> str:
    """Number of the tests of CUDA C++ kernels that the H200 passed."""
    for line in _machine(machines, GPU).decided:
        if (line["kind"], line.get("part")) == ("facts", "tests/cuda/test_kernels.py"):
            return re.search(r"(\d+) passed", line["tail"][-1])[1]
    raise ValueError(f"{GPU}: expected the outcome of tests/cuda/test_kernels.py, got none")


def _checked(machines: Sequence[Machine]) -> str:
    """Number of the kernels and tiles whose errors were measured."""
    decided = _machine(machines, GPU).decided
    return str(sum(figure.section == "errors" for figure in lines.figures(decided)))


# --- Written by other scripts ---------------------------------------------------------------------

PAPER = "docs/paper/outputs"
CHOOSING = "docs/choosing.md"
LLAMA = r"^\| Llama-3\.1-8B .*\| BOFT\(2, 8\) \| 16 \| "  # a row, up to its trained numbers
ONE_RATE, MERGING = "docs/examples/one_rate.md", "docs/examples/merging.md"


def quoted(file: str, pattern: str) -> Figure:
    """Quote the group of a pattern that a file of the repository has in one place."""

    def text(machines: Sequence[Machine]) -> str:
        found = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
        if len(found) != 1:
            raise ValueError(f"{file}: expected {pattern!r} once, got it {len(found)} times")
        return found[0]

    return text


def _over_averaged(how: str, sign: str) -> Figure:
    """Points of accuracy by which a merge is ahead of averaged weights, or behind."""
    over = "over averaged changes of the weights"
    return quoted(MERGING, rf'how="{how}"\) {over}: {re.escape(sign)}([\d.]+ ± [\d.]+)')


def _largest(file: str, column: str, form: Callable[[float], str], **only: str) -> Figure:
    """Format the largest number of a column, over the rows that have the given values."""

    def text(machines: Sequence[Machine]) -> str:
        with (ROOT / file).open(newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if only.items() <= row.items()]
        return form(max(float(row[column]) for row in rows))

    return text


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _registers(kernel: str) -> Figure:
    """Registers of a thread of a CUDA C++ kernel on an H200."""
    return quoted("tests/data/cuda_resources.csv", rf"^sm_90,{re.escape(kernel)},(\d+),")


# --- Constants of the code ------------------------------------------------------------------------


def _constant(value: object) -> Figure:
    return lambda machines: str(value)


FIGURES: dict[str, Figure] = {
    "h200-copy-us": _microseconds(*COPY, digits=1),
    "h200-copy-rate": _rate("bytes", 1e12, COPY, digits=1),
    "h200-product-rate": _rate("flops", 1e12, ("ceilings", f"rates, {ROWS}", "mm")),
    "h200-step-us": _microseconds(DEVICE, str(BULK), OUR_SIDE),
    "h200-native-costs-us": _native_costs,
    "h200-cayley-backward-us": _microseconds(
        "kernels", "cayley_backward, (2,8) of 1245184 features", "cuda"
    ),
    "h200-host-native-us": _microseconds(*HOST, BOFT),
    "h200-host-triton-us": _microseconds(*HOST, f"{BOFT} triton"),
    "h200-host-lora-us": _microseconds(*HOST, LORA),
    "h200-of-lora": _step_of_lora,
    "h200-model-of-lora": _model_of_lora,
    "h200-tests": _passed,
    "h200-tests-commit": lambda machines: commit_of(_machine(machines, GPU).decided, "checks"),
    "h200-checked": _checked,
    "h200-variants": _variants,
    "zen-5-compiled": _compiled,
    "kept-square": _kept(MEDIUM),
    "kept-wide": _kept(WIDE),
    "zen-4-copies": _copies(ZEN_4),
    "zen-5-copies": _copies(ZEN_5),
    "llama-boft-numbers": quoted(CHOOSING, rf"{LLAMA}([\d,]+) "),
    "llama-boft-file": quoted(CHOOSING, rf"{LLAMA}[\d,]+ \| (\d+ MB) "),
    "llama-lora-numbers": quoted(
        CHOOSING, r"^\| Llama-3\.1-8B (?:.*\n){3}.* LoRA, r = 16 \|  \| ([\d,]+) "
    ),
    "one-rate-lost": quoted(ONE_RATE, r"^- param_groups\(.* at most ([\d.]+ ± [\d.]+) points"),
    "plain-rate-lost": quoted(ONE_RATE, r"^- the plain .* at most ([\d.]+ ± [\d.]+) points"),
    "karcher-ahead": _over_averaged("karcher", "+"),
    "orthomerge-behind": _over_averaged("orthomerge", "-"),
    "karcher-over-skews": quoted(
        MERGING, r'how="karcher"\) over averaged skews and scales: \+([\d.]+) ±'
    ),
    "interpolation-error": _largest(
        f"{PAPER}/interpolation.csv",
        "standard_error",
        lambda share: f"{100 * share:.1f}",
        way="t Q",
        t="1.0",
    ),
    "straight-line-lost": _largest(
        f"{PAPER}/interpolation.csv", "singular_values", _percent, way="straight line"
    ),
    "lora-singular-values": _largest(
        f"{PAPER}/spectrum.csv", "singular_values", _percent, method="LoRA r=8"
    ),
    "lora-angles": _largest(f"{PAPER}/spectrum.csv", "angle", "{:.1f}".format, method="LoRA r=8"),
    "stage-registers": _registers("stage_small_kernel<8>"),
    "stage-backward-registers": _registers("stage_small_backward_kernel<8>"),
    "test-seconds": quoted("pyproject.toml", r"^timeout = (\d+)"),
    "fused-rows": _constant(MIN_ROWS),
    "batched-lu-rows": _constant(MAX_BATCHED),
    "pass-cost-cpu": _constant(PASS_COST["cpu"]),
    "pass-cost-gpu": _constant(PASS_COST["cuda"]),
    "product-choice-seconds": _constant(product_choice.MOST_SECONDS),
    "tuner-rounds": _constant(search.ROUNDS),
    "tuner-gain": _constant(_percent(1 - measure.FASTER)),
}

MARK = re.compile(r"<!-- figure: ([\w-]+) -->(.*?)<!-- /figure -->")
# Markdown takes a line that begins with a comment for HTML, and shows the rest as it is written.
AT_LINE_START = re.compile(r"^[ >*\-\d.]*<!-- /?figure", re.MULTILINE)


def fill(text: str, machines: Sequence[Machine]) -> str:
    """Replace the figures in the sentences of a page.

    Raises:
        ValueError: a figure has an unknown name or no end, or is the first word of a line.
    """

    def new(match: re.Match) -> str:
        name = match[1]
        if name not in FIGURES:
            raise ValueError(f"figure: expected one of {', '.join(FIGURES)}, got {name!r}")
        return f"<!-- figure: {name} -->{FIGURES[name](machines)}<!-- /figure -->"

    marks = len(MARK.findall(text))
    if {text.count("<!-- figure: "), text.count("<!-- /figure -->")} != {marks}:
        raise ValueError("figure: expected <!-- /figure --> after each <!-- figure: NAME -->")
    if found := AT_LINE_START.search(text):
        raise ValueError(f"figure: expected a word before it in its line, got {found[0]!r}")
    return MARK.sub(new, text)
