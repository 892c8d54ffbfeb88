#!/usr/bin/env python3
"""Orthogonality of a trained rotation over 10,000 optimizer steps.

A layer BOFT(4,8) of 128 features learns a random rotation with Adam at a constant rate. A butterfly
can only approximate that rotation, so gradients never vanish. The script compares the exact Cayley
transform with the truncated series "neumann5". Each has parameters in float32, as the layers keep
them, and in bfloat16.

    python docs/paper/stability.py                     # takes a minute of one core
    python docs/paper/stability.py --quick --out X     # takes seconds
"""

import time
from pathlib import Path

import _common
import _page
import torch

from boft_ops import BOFTLinear, butterfly_matmul, cayley
from boft_ops.analysis.spectrum import orthogonality_error

FEATURES, STEPS, BATCH, RATE = 128, 10_000, 64, 1e-2
CASES = {
    "exact, fp32": ("exact", torch.float32),
    "exact, bf16": ("exact", torch.bfloat16),
    "neumann5, fp32": ("neumann5", torch.float32),
    "neumann5, bf16": ("neumann5", torch.bfloat16),
}


def main() -> None:
    args = _common.parser(__doc__).parse_args()
    out, clock = _common.output_folder(args), _common.Clock()
    steps = 200 if args.quick else STEPS
    rows = [row for name in CASES for row in train(name, steps)]
    _common.write_csv(out / "stability.csv", rows)
    rows = _common.read_csv(out / "stability.csv")
    check(rows)
    if args.out is None:  # the page shows the committed outputs
        _page.fill(_common.HERE / "stability.md", "last", table(rows))
    draw(rows, out / "stability.svg", steps)
    _common.write_log(out / "stability.log", clock)


def train(case: str, steps: int) -> list[dict]:
    """Train one case, and measure a row at the steps 1, 2, 4, ... and the last."""
    method, dtype = CASES[case]
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(FEATURES, FEATURES)).Q
    weight = torch.nn.Linear(FEATURES, FEATURES, bias=False).requires_grad_(False)
    layer = BOFTLinear.from_linear(
        weight, block_size=8, n_factors=4, scale=False, method=method
    ).to(dtype)
    optimizer = torch.optim.Adam([layer.skew], lr=RATE)
    product = (target @ weight.weight.T).to(dtype)
    measured = {2**k for k in range(steps.bit_length())} | {steps}
    rows, started = [], time.perf_counter()
    for step in range(1, steps + 1):
        x = torch.randn(BATCH, FEATURES, dtype=dtype)
        loss = (layer(x) - x @ product).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in measured:
            rows.append({"case": case, "step": step, "loss": loss.item(), **errors_of(layer)})
    rows[-1]["seconds"] = time.perf_counter() - started
    return [{"seconds": "", **row} for row in rows]


@torch.no_grad()
def errors_of(layer: BOFTLinear) -> dict:
    """Measure the orthogonality of R, from the layer's own blocks and from blocks in float64."""
    blocks = cayley(layer.skew, method=layer.method)
    eye = torch.eye(FEATURES, dtype=torch.float64)
    blocks64 = cayley(layer.skew.double(), method=layer.method)
    return {
        "largest_q": layer.skew.abs().max().item(),
        "blocks_error": orthogonality_error(blocks),
        "product_error": orthogonality_error(butterfly_matmul(eye, blocks.double())),
        # R is not rounded here, so this error is the method's own.
        "method_error": orthogonality_error(butterfly_matmul(eye, blocks64)),
    }


def check(rows: list[dict]) -> None:
    """Check that the Cayley transform is orthogonal up to rounding at every measured step.

    Raises:
        AssertionError: the data contradicts this.
    """
    limits = {"exact, fp32": 1e-6, "exact, bf16": 2e-2}
    for row in rows:
        limit = limits.get(row["case"])
        if limit is None:
            continue
        if float(row["product_error"]) > limit or float(row["method_error"]) > 1e-13:
            raise AssertionError(f"expected errors below {limit} and 1e-13, got {row}")


def table(rows: list[dict]) -> list[str]:
    """Make the page's table of the last step of each case."""
    lines = []
    for row in rows:
        if row["seconds"]:
            errors = [f"{float(row[f'{k}_error']):.1e}" for k in ("blocks", "product", "method")]
            numbers = [f"{float(row['largest_q']):.2f}", f"{float(row['loss']):.3f}"]
            lines.append([row["case"], *errors, *numbers])
    head = ["case", "blocks", "whole rotation", "before rounding", "largest entry of Q", "loss"]
    return _page.table(head, lines)


def draw(rows: list[dict], path: Path, steps: int) -> None:
    """Draw the error of the whole rotation against the step, with the method's own error dotted."""
    style = _common.style(CASES)
    fig, (top, bottom) = _common.figure(2, 3.6)
    for case, look in style.items():
        chosen = [row for row in rows if row["case"] == case]
        at_steps = [int(row["step"]) for row in chosen]
        top.plot(at_steps, [float(r["product_error"]) for r in chosen], **look, ms=4)
        method_errors = [max(float(row["method_error"]), 1e-17) for row in chosen]
        top.plot(at_steps, method_errors, color=look["color"], ls=":")
        bottom.plot(at_steps, [float(row["largest_q"]) for row in chosen], **look, label=case, ms=4)
    top.set(xscale="log", yscale="log", xlabel="optimizer step")
    top.set_ylabel("orthogonality error |R'R - I| / sqrt(d)\ndotted: before any rounding")
    bottom.set(xscale="log", xlabel="optimizer step", ylabel="largest entry of Q")
    bottom.legend(frameon=False)
    fig.suptitle(f"BOFT(4,8) of {FEATURES} features over {steps:,} steps of Adam")
    _common.save_figure(fig, path)


if __name__ == "__main__":
    main()
