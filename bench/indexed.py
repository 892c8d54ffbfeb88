"""Time of rotating each row by its own adapter, and of the gradients of all adapters.

They are compared with a loop over the adapters and with one adapter for all rows. The contestants
run interleaved in one process, and a ratio is the median over the rounds.

python bench/indexed.py            prints, and writes bench/results/<machine>/indexed.csv
python bench/indexed.py --dry-run  prints only
"""

from __future__ import annotations

import argparse
import csv

import torch
from environment import ROOT, commit, describe
from interleave import Contestant, measure, ratios, summary, synchronizer
from machines import folder_name

from boft_ops import cayley
from boft_ops.ops.rotate import rotate_rows, rotate_stage_grad
from boft_ops.ops.rotate_indexed import compose_all, rotate_indexed_rows
from boft_ops.ops.segment_stage_grads import segment_stage_grads, splits_of, total
from boft_ops.ops.stages import plan

D, M, B = 2048, 2, 8
# (adapters, rows, rows of one request), for prefill and for decoding one token at a time.
CASES = [(8, 1024, 128), (8, 64, 1), (64, 1024, 16), (64, 64, 1)]
NAMES = ("one adapter", "rotate_indexed", "loop with masks", "x.clone()")
# (adapters or experts, rows), sorted
GRADIENT_CASES = [(8, 2048), (32, 2048), (128, 2048)]
GRADIENT_NAMES = (
    "gradient of one adapter",
    "segment_stage_grads",
    "gradients of slices",
    "gradients with masks",
)


def contest(adapters: int, rows: int, run: int, device: torch.device) -> list[Contestant]:
    """Build the contestants for one batch, after a check that the loop and the kernel agree."""
    torch.manual_seed(0)
    skew = 0.1 * torch.randn(adapters, M, D // B, B * (B - 1) // 2)
    (stage,) = plan(M, B, device.type)
    (stages,) = compose_all(cayley(skew.to(device)), (stage,), torch.float32)
    x = torch.randn(rows, D, device=device)
    index = (torch.arange(rows, device=device) // run % adapters).int()
    layout = stage.chunk, stage.stride, False

    def loop() -> torch.Tensor:
        y = torch.empty_like(x)
        for adapter in range(adapters):
            own = (index == adapter).nonzero()[:, 0]  # numbers of the adapter's rows
            y.index_copy_(0, own, rotate_rows(x.index_select(0, own), stages[adapter], *layout))
        return y

    ours = rotate_indexed_rows(x, stages, index, *layout)
    torch.testing.assert_close(ours, loop(), rtol=1e-5, atol=1e-5)
    one = stages[0].contiguous()
    return [
        Contestant(NAMES[0], lambda: rotate_rows(x, one, *layout)),
        Contestant(NAMES[1], lambda: rotate_indexed_rows(x, stages, index, *layout)),
        Contestant(NAMES[2], loop),
        Contestant(NAMES[3], lambda: x.clone()),
    ]


def gradient_contest(adapters: int, rows: int, device: torch.device) -> list[Contestant]:
    """Build the contestants for the gradients of segments of one size, after such a check."""
    torch.manual_seed(0)
    (stage,) = plan(M, B, device.type)
    x, grad = torch.randn(2, rows, D, device=device)
    ends = [rows * (i + 1) // adapters for i in range(adapters)]
    slices = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    number = torch.searchsorted(offsets, torch.arange(rows, device=device), right=True)
    layout = stage.size, stage.chunk, stage.stride
    splits, parts = stage.splits(x), splits_of(stage, x, adapters)

    def of_slices() -> torch.Tensor:
        grams = [rotate_stage_grad(x[own], grad[own], *layout, splits).sum(0) for own in slices]
        return torch.stack(grams)

    def with_masks() -> torch.Tensor:
        grams = []
        for adapter in range(adapters):
            own = torch.where((number == adapter)[:, None], x, 0)
            grams.append(rotate_stage_grad(own, grad, *layout, splits).sum(0))
        return torch.stack(grams)

    def ours() -> torch.Tensor:
        return total(segment_stage_grads(x, grad, offsets, *layout, parts))

    for other in (of_slices, with_masks):
        torch.testing.assert_close(ours(), other(), rtol=1e-4, atol=1e-4)
    return [
        Contestant(GRADIENT_NAMES[0], lambda: rotate_stage_grad(x, grad, *layout, splits).sum(0)),
        Contestant(GRADIENT_NAMES[1], ours),
        Contestant(GRADIENT_NAMES[2], of_slices),
        Contestant(GRADIENT_NAMES[3], with_masks),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--seconds", type=float, default=4.0, help="approximate time for each case")
    options = parser.parse_args()
    device = torch.device(options.device)
    table = []
    with torch.no_grad():
        contests = [(case, lambda c=case: contest(*c, device), NAMES) for case in CASES]
        for n, rows in GRADIENT_CASES:
            make = lambda n=n, rows=rows: gradient_contest(n, rows, device)  # noqa: E731
            contests.append(((n, rows, rows // n), make, GRADIENT_NAMES))
        for case, make, names in contests:
            durations = measure(
                make(),
                rounds=200,
                seconds=options.seconds,
                synchronize=synchronizer(device),
                calls=1,
            )
            for name in names:
                ratio, low, high = summary(ratios(durations, name, names[0]))
                middle = 1e6 * sorted(durations[name].values())[len(durations[name]) // 2]
                ratios_text = [f"{value:.2f}" for value in (ratio, low, high)]
                table.append([*case, name, f"{middle:.0f}", *ratios_text])
                print(*table[-1], sep="\t")
    if options.dry_run:
        return
    facts, state = describe(device), commit()
    folder = ROOT / "bench" / "results" / folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "indexed.csv").open("w", newline="") as file:
        keys = ("cpu", "device", "threads", "torch", "triton")
        dirty = " and changes" if state["dirty"] else ""
        file.write(f"# {', '.join(f'{k}: {facts[k]}' for k in keys)}, {state['id']}{dirty}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["adapters", "rows", "run", "contestant", "us", "ratio", "q1", "q3"])
        writer.writerows(table)


if __name__ == "__main__":
    main()
