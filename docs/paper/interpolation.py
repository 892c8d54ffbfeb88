#!/usr/bin/env python3
"""Paths from a finetuned model back to the pretrained one, without training (figure 10).

The demo's MiniLM is finetuned as BOFT(5,8) without a scale, so that every path ends at the
pretrained weights. Four paths are compared. The butterfly factors become the identity one by one,
starting with the largest stride. Every Q is multiplied by t. Every block becomes R^t, the geodesic.
The straight line between the weights leaves the set of rotations. At each stop the script measures
test accuracy, distance to the pretrained weights, and the change of the spectrum. arXiv 2311.06243,
section 6.3.

    python docs/paper/interpolation.py                     # trains one model, once
    python docs/paper/interpolation.py --quick --out X     # takes seconds, on a tiny random model
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import _common
import _finetuned
import _page
import torch
from _finetuned import boft, minilm
from torch import nn

import boft_ops
from boft_ops.ops.geodesic import geodesic

RECIPE = boft(5, 8, 3e-3, scale=False)
STOPS = (0.8, 0.6, 0.4, 0.2)  # values of t between the ends, which all paths share
FACTORS, SCALED, GEODESIC, LINE = "factors to I", "t Q", "geodesic R^t", "straight line"


def main() -> None:
    args = _common.parser(__doc__).parse_args()
    out, clock = _common.output_folder(args), _common.Clock()
    task = _finetuned.load_task(args.quick)
    rows = measure(task)
    _common.write_csv(out / "interpolation.csv", rows)
    rows = _common.read_csv(out / "interpolation.csv")
    check(rows)
    if args.out is None:  # the page shows the committed outputs
        _page.fill(_common.HERE / "interpolation.md", "ways", table(rows))
    draw(rows, out / "interpolation.svg", "a tiny random BERT" if args.quick else "MiniLM-L6")
    seconds = _finetuned.finetuned(task, RECIPE).seconds if not args.quick else 0
    facts = {"training_s": f"{seconds:.0f}", "test_sentences": len(task.test)}
    _common.write_log(out / "interpolation.log", clock, facts)


def measure(task: _finetuned.Task) -> list[dict]:
    """Measure one row for each stop of each path."""
    tuned = _finetuned.finetuned(task, RECIPE).model
    pretrained = weights(task.top, prefix="encoder.")
    rows, ends = [], {}
    for way in (FACTORS, SCALED, GEODESIC, LINE):
        for t, model in stops(way, tuned, pretrained):
            # The ends are the same on every path: the finetuned model and the pretrained layers.
            if t not in ends:
                row = {"t": t, **evaluate(model, pretrained, task.test)}
                if t in (0, 1):
                    ends[t] = row
            else:
                row = ends[t]
            rows.append({"way": way, **row})
    return rows


def stops(way: str, tuned: nn.Module, pretrained: dict) -> Iterator[tuple[float, nn.Module]]:
    """Yield (t, model of plain layers) from t = 1, finetuned, to t = 0, pretrained."""
    if way == FACTORS:
        m = RECIPE.options["n_factors"]
        for n in range(m + 1):
            model = copy.deepcopy(tuned)
            for layer in boft_layers(model):
                layer.interpolate(n)
            yield 1 - n / m, boft_ops.merge(model)
        return
    for t in (1.0, *STOPS, 0.0):
        model = copy.deepcopy(tuned)
        if way != LINE:
            for layer in boft_layers(model):
                end = layer.skew.detach()
                layer.skew.data = t * end if way == SCALED else geodesic(end, t)
        model = boft_ops.merge(model)
        if way == LINE:
            for name, weight in weights(model).items():
                if name in pretrained:
                    weight.lerp_(pretrained[name], 1 - t)
        yield t, model


def boft_layers(model: nn.Module) -> list[boft_ops.BOFTLinear]:
    """List the BOFT layers of a model."""
    return [module for module in model.modules() if isinstance(module, boft_ops.BOFTLinear)]


def weights(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the weights of all linear layers by name."""
    return {
        prefix + name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def evaluate(model: nn.Module, pretrained: dict[str, torch.Tensor], test: minilm.Cached) -> dict:
    """Measure one model. Distance and spectrum are taken over all adapted weights together."""
    current = weights(model)
    size = sum(w.square().sum() for w in pretrained.values())
    moved = sum((current[name] - w).square().sum() for name, w in pretrained.items())
    lost = max(
        (torch.linalg.svdvals(current[name].double()) - torch.linalg.svdvals(w.double()))
        .abs()
        .max()
        / torch.linalg.matrix_norm(w.double(), 2)
        for name, w in pretrained.items()
    )
    correct = (minilm.predict(model, test) == test.labels).double()
    return {
        "accuracy": correct.mean().item(),
        "standard_error": (correct.std() / len(correct) ** 0.5).item(),
        "distance": (moved / size).sqrt().item(),
        "singular_values": lost.item(),
    }


def check(rows: list[dict]) -> None:
    """Check that every path approaches and reaches its end, and that rotations keep the spectrum.

    Raises:
        AssertionError: the data contradicts this.
    """
    for way in (FACTORS, SCALED, GEODESIC, LINE):
        stops = [row for row in rows if row["way"] == way]
        distances = [float(row["distance"]) for row in stops]
        if distances != sorted(distances, reverse=True) or distances[-1] > 1e-6:
            raise AssertionError(f"{way}: expected to end at the pretrained weights, {distances}")
        lost = max(float(row["singular_values"]) for row in stops)
        if way != LINE and lost > 1e-5:
            raise AssertionError(f"{way}: expected the singular values to stay, {lost:.1e} lost")


def table(rows: list[dict]) -> list[str]:
    """Make the page's table of all stops."""
    columns = {"t": ".1f", "accuracy": ".1%", "distance": ".4f", "singular_values": ".1e"}
    lines = [
        [row["way"], *(format(float(row[key]), form) for key, form in columns.items())]
        for row in rows
    ]
    return _page.table(["way", "t", "accuracy", "distance", "singular values"], lines)


def draw(rows: list[dict], path: Path, model: str) -> None:
    """Draw accuracy, distance and change of the spectrum against the rest of the path."""
    style = _common.style(dict.fromkeys(row["way"] for row in rows))
    fig, (top, middle, bottom) = _common.figure(3, 3.2)
    for way, look in style.items():
        stops = [row for row in rows if row["way"] == way]

        def column(name: str, stops: list[dict] = stops, unit: float = 1) -> list[float]:
            return [unit * float(row[name]) for row in stops]

        top.plot(column("t"), column("accuracy", unit=100), **look, label=way, ms=5)
        middle.plot(column("t"), column("distance"), **look, ms=5)
        lost = [max(value, 1e-9) for value in column("singular_values")]
        bottom.plot(column("t"), lost, **look, ms=5)
    first = rows[0]
    top.errorbar(
        *([1.0], [100 * float(first["accuracy"])], [100 * float(first["standard_error"])]),
        color="black",
        capsize=4,
    )
    top.set(ylabel="test accuracy (%), bar: ± 1 standard error")
    middle.set(ylabel="distance to the pretrained weights / their norm", ylim=(0, None))
    bottom.set(ylabel="change of a singular value / the largest", yscale="log")
    for axes in (top, middle, bottom):
        axes.set(xlabel="t: 1 finetuned, 0 pretrained", xlim=(1.03, -0.03))
    top.legend(frameon=False)
    m, b = RECIPE.options["n_factors"], RECIPE.options["block_size"]
    fig.suptitle(f"From BOFT({m},{b}) of {model} back to the pretrained weights, no retraining")
    _common.save_figure(fig, path)


if __name__ == "__main__":
    main()
