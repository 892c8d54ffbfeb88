"""What Figure 5 costs with the package's kernels, and with dense d x d matrices.

    python docs/paper/figure5_speed.py
    python docs/paper/figure5_speed.py --quick --out build/paper/figure5

Two ways of fitting, each both ways and measured in turn: a sweep of block coordinate ascent, as in
figure5.py, and a step of gradient descent (forward and backward of tr(R^T A) from the parameters).
The dense versions hold every factor as a d x d matrix and multiply by BLAS, one matrix after
another; the arithmetic they have in common, on the blocks, is the same code. One thread, as each
process of figure5.py has: two threads made either version slower now and then, by much.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _common import HERE, OUTPUTS, Clock, output_folder, parser, read_csv, write_csv, write_log
from _page import fill, table
from figure5 import random_orthogonal

from boft_ops import butterfly_matmul, cayley
from boft_ops.analysis.approximation import Factor, approximate, butterfly_factors, nearest_rotation

DATA = "figure5_speed.csv"


def places(d: int, factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every entry of every block, (d/b, b, b) each."""
    size, chunk, stride = factor
    features = torch.arange(d).reshape(-1, size // chunk, stride, chunk).transpose(1, 2)
    groups = features.reshape(d // size, size)
    rows, columns = torch.broadcast_tensors(groups[:, :, None], groups[:, None, :])
    return rows.contiguous(), columns.contiguous()


def dense(blocks: torch.Tensor, place: tuple[torch.Tensor, torch.Tensor], d: int) -> torch.Tensor:
    return blocks.new_zeros(d, d).index_put(place, blocks)


@torch.no_grad()
def dense_sweeps(target: torch.Tensor, factors: list[Factor], sweeps: int) -> float:
    """``approximate`` for one target with dense factors; returns the error."""
    d = len(target)
    where = [places(d, factor) for factor in factors]
    matrices = [torch.eye(d) for _ in factors]
    for _ in range(sweeps):
        left, right = torch.eye(d), target
        for matrix in reversed(matrices[1:]):
            left = left @ matrix
        for i, place in enumerate(where):
            blocks = (left.mT @ right)[place]
            rotations = nearest_rotation(blocks)
            matrices[i] = dense(rotations, place, d)
            right = right @ matrices[i].mT
            if i + 1 < len(where):
                left = left @ matrices[i + 1].mT
    return 1 - float((blocks * rotations).sum()) / d


def our_step(skew: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r = butterfly_matmul(torch.eye(len(target)), cayley(skew))
    return torch.autograd.grad((r * target).sum(), skew)[0]


def dense_step(skew: torch.Tensor, target: torch.Tensor, where: list) -> torch.Tensor:
    r = None
    for blocks, place in zip(cayley(skew), where):
        matrix = dense(blocks, place, len(target))
        r = matrix if r is None else matrix @ r
    return torch.autograd.grad((r * target).sum(), skew)[0]


def timed(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: median(values) for name, values in times.items()}


def compare(d: int, m: int, b: int, rounds: int) -> list[dict]:
    target = random_orthogonal(d, 0).float()
    factors = butterfly_factors(d, b, m)
    sweeps = 2
    mine = approximate(target[None], factors, max_sweeps=sweeps).errors[-1]
    theirs = dense_sweeps(target, factors, sweeps)
    if not abs(float(mine) - theirs) < 0.02:  # other orders of the same updates
        raise AssertionError(f"BOFT({m}, {b}): errors {float(mine):.4f} and {theirs:.4f} differ")
    skew = 0.1 * torch.randn(m, d // b, b * (b - 1) // 2)
    skew.requires_grad_()
    where = [places(d, factor) for factor in factors]
    torch.testing.assert_close(
        our_step(skew, target), dense_step(skew, target, where), rtol=1e-3, atol=1e-4
    )
    runs = {
        "ascent sweep": {
            "ours": lambda: approximate(target[None], factors, max_sweeps=sweeps),
            "dense": lambda: dense_sweeps(target, factors, sweeps),
        },
        "gradient step": {
            "ours": lambda: our_step(skew, target),
            "dense": lambda: dense_step(skew, target, where),
        },
    }
    rows = []
    for what, functions in runs.items():
        found = timed(functions, rounds)
        each = sweeps if what == "ascent sweep" else 1
        rows.append(
            {
                **{"what": what, "d": d, "n_factors": m, "block_size": b},
                **{f"{name}_ms": f"{value / each:.2f}" for name, value in found.items()},
                "speedup": f"{found['dense'] / found['ours']:.1f}",
            }
        )
    return rows


def report(folder: Path) -> list[str]:
    rows = [
        [row["what"], f"BOFT({row['n_factors']}, {row['block_size']})"]
        + [row[name] for name in ("ours_ms", "dense_ms", "speedup")]
        for row in read_csv(folder / DATA)
    ]
    return table(["", "", "ours (ms)", "dense (ms)", "times faster"], rows, n_words=2)


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    folder, clock = output_folder(args), Clock()
    torch.manual_seed(0)
    d, rounds = (64, 2) if args.quick else (512, 15)
    structures = [(6, 2), (4, 4)] if args.quick else [(9, 2), (6, 4), (2, 16), (6, 16), (5, 32)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for m, b in structures for row in compare(d, m, b, rounds)]
        write_csv(folder / DATA, rows)
        write_log(folder / "figure5_speed.log", clock)
    finally:
        torch.set_num_threads(threads)
    print("\n".join(report(folder)))
    if folder == OUTPUTS:
        fill(HERE / "figure5.md", "speed", report(folder))


if __name__ == "__main__":
    main()
