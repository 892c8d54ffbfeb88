#!/usr/bin/env python3
"""Effect of finetuning on the spectrum and the angles of the weights of a real model.

The demo's MiniLM is finetuned in five ways: with LoRA, with OFT and BOFT without a trained scale,
with BOFT by the truncated series in place of the Cayley transform, and with BOFT and its scale. For
every adapted weight the script measures the change of its singular values, spectral norm,
hyperspherical energy and pairwise angles. arXiv 2311.06243, section 5.

    python docs/paper/spectrum.py                     # trains five models, once
    python docs/paper/spectrum.py --quick --out X     # takes seconds, on a tiny random model
"""

import copy
from pathlib import Path

import _common
import _finetuned
import _page
import numpy as np
import torch
from _finetuned import Recipe, boft
from torch import nn

import boft_ops
from boft_ops.analysis.spectrum import Drift, drift

LORA, EXACT, SERIES, SCALED = "LoRA r=8", "BOFT(2,8)", "BOFT(2,8), neumann5", "BOFT(2,8) and scale"
OFT, ROUNDING = "OFT b=8", "rounding to float32"
# The learning rates are those that the demo found for each method.
RECIPES = {
    LORA: Recipe("lora", 3e-3),
    SCALED: boft(2, 8, 3e-3),
    SERIES: boft(2, 8, 3e-3, scale=False, method="neumann5"),
    OFT: boft(1, 8, 1e-2, scale=False),
    EXACT: boft(2, 8, 3e-3, scale=False),
}
TITLES = {
    "singular_values": "largest change of a singular value\n(of the spectral norm)",
    "spectral_norm": "change of the spectral norm\n(of itself)",
    "energy": "change of the hyperspherical energy\n(of itself)",
    "angle": "largest change of the angle\nbetween two neurons (radians)",
}


def main() -> None:
    args = _common.parser(__doc__).parse_args()
    out, clock = _common.output_folder(args), _common.Clock()
    rows = measure(_finetuned.load_task(args.quick))
    _common.write_csv(out / "spectrum.csv", rows)
    rows = _common.read_csv(out / "spectrum.csv")
    check(rows)
    if args.out is None:  # the page shows the committed outputs
        _page.fill(_common.HERE / "spectrum.md", "drift", table(rows))
    draw(rows, out / "spectrum.svg", "a tiny random BERT" if args.quick else "MiniLM-L6")
    trained = {row["method"]: float(row["training_s"]) for row in rows}
    _common.write_log(out / "spectrum.log", clock, {"training_s": f"{sum(trained.values()):.0f}"})


def measure(task: _finetuned.Task) -> list[dict]:
    """Measure one row for each method and adapted weight."""
    base = {f"encoder.{name}": weight for name, weight in linear_weights(task.top).items()}
    rows = []
    for method, recipe in RECIPES.items():
        tuned = _finetuned.finetuned(task, recipe)
        after = linear_weights(plain(tuned.model))
        for name, weight in base.items():
            rows.append({"method": method, "layer": name, **drift(weight, after[name])._asdict()})
            rows[-1] |= {"test_accuracy": tuned.test_accuracy, "training_s": tuned.seconds}
    for name, weight in base.items():
        rows.append({"method": ROUNDING, "layer": name, **rounding(weight)._asdict()})
        rows[-1] |= {"test_accuracy": float("nan"), "training_s": 0.0}
    return rows


def linear_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of all linear layers by name."""
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def plain(model: nn.Module) -> nn.Module:
    """Copy a model and fold its adapters into plain linear layers."""
    model = copy.deepcopy(model)
    return model.merge_and_unload() if hasattr(model, "peft_config") else boft_ops.merge(model)


def rounding(weight: torch.Tensor) -> Drift:
    """Measure the drift that float32 rounding can cause, by moving each number by one ulp."""
    generator = torch.Generator().manual_seed(0)
    up = torch.rand(weight.shape, generator=generator) < 0.5
    direction = torch.where(up, torch.inf, -torch.inf)
    return drift(weight, torch.nextafter(weight.detach(), direction))


def worst(rows: list[dict], key: str) -> dict[str, float]:
    """Return the largest change of any weight, by method."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return {m: max(float(row[key]) for row in rows if row["method"] == m) for m in methods}


def table(rows: list[dict]) -> list[str]:
    """Make the page's table of the largest changes of each method."""
    columns = {key: worst(rows, key) for key in ("distance", *TITLES)}
    accuracy = {row["method"]: 100 * float(row["test_accuracy"]) for row in rows}
    lines = []
    for method, value in accuracy.items():
        test = "" if method == ROUNDING else f"{value:.1f}"
        lines.append([method, test, *(f"{column[method]:.1e}" for column in columns.values())])
    head = ["method", "test %", "distance", "singular values", "spectral norm", "energy", "angle"]
    return _page.table(head, lines)


def check(rows: list[dict]) -> None:
    """Check the claim that orthogonal finetuning keeps the properties that LoRA changes.

    Raises:
        AssertionError: the data contradicts it.
    """
    for key in TITLES:
        largest = worst(rows, key)
        for method in (OFT, EXACT):
            if largest[method] > 1e-5 or largest[LORA] < 100 * largest[method]:
                raise AssertionError(
                    f"{key}: expected {method} to keep it to 1e-5 and LoRA to move it a hundred "
                    f"times as much, got {largest[method]:.1e} and {largest[LORA]:.1e}"
                )


def draw(rows: list[dict], path: Path, model: str) -> None:
    """Draw a panel for each property, a row of points for each method, a point for each weight."""
    style = _common.style(dict.fromkeys(row["method"] for row in rows))
    fig, panels = _common.figure(len(TITLES), 2.4)
    shifts = np.random.default_rng(0).uniform(-0.2, 0.2, len(rows))
    for panel, (key, title) in zip(panels, TITLES.items(), strict=True):
        for i, (method, look) in enumerate(style.items()):
            chosen = [(float(r[key]), s) for r, s in zip(rows, shifts) if r["method"] == method]
            values, offsets = np.array(chosen).T
            # A logarithmic axis cannot show a change of exactly zero.
            panel.plot(np.maximum(values, 1e-17), i + offsets, **look, ls="", ms=3.5, alpha=0.7)
        panel.set(xscale="log", xlabel=title, ylim=(len(style) - 0.5, -0.5))
        panel.set_yticks(range(len(style)), style)
    count = len(rows) // len(style)
    fig.suptitle(f"{count} finetuned weights of {model}: what changed. A point is a weight.")
    _common.save_figure(fig, path)


if __name__ == "__main__":
    main()
