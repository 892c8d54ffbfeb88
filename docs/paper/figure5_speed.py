"""Time of Figure 5 with the package's kernels and with dense d x d matrices.

    python docs/paper/figure5_speed.py
    python docs/paper/figure5_speed.py --quick --out build/paper/figure5

Two methods of fitting are timed, each with kernels and with dense matrices, interleaved. One is a
sweep of block coordinate ascent, as in figure5.py. The other is a step of gradient descent, forward
and backward of tr(R^T A) from the parameters. The dense versions store every factor as a d x d
matrix and multiply one matrix after the other with BLAS. The arithmetic on the blocks is the same
code in both. The measurement uses one thread, as each process of figure5.py does, because two
threads sometimes made either version much slower.
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


def entry_indices(d: int, factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the row and the column of every entry of every block, (d/b, b, b) each."""
    size, chunk, stride = factor
    features = torch.arange(d).reshape(-1, size // chunk, stride, chunk).transpose(1, 2)
    groups = features.reshape(d // size, size)
    rows, columns = torch.broadcast_tensors(groups[:, :, None], groups[:, None, :])
    return rows.contiguous(), columns.contiguous()


def dense(blocks: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], d: int) -> torch.Tensor:
    """Make the dense (d, d) matrix of a factor from its blocks."""
    return blocks.new_zeros(d, d).index_put(index, blocks)


@torch.no_grad()
def dense_sweeps(target: torch.Tensor, factors: list[Factor], sweeps: int) -> float:
    """Run ``approximate`` for one target with dense factors; returns the error."""
    d = len(target)
    indices = [entry_indices(d, factor) for factor in factors]
    matrices = [torch.eye(d) for _ in factors]
    for _ in range(sweeps):
        left, right = torch.eye(d), target
        for matrix in reversed(matrices[1:]):
            left = left @ matrix
        for i, index in enumerate(indices):
            blocks = (left.mT @ right)[index]
            rotations = nearest_rotation(blocks)
            matrices[i] = dense(rotations, index, d)
            right = right @ matrices[i].mT
            if i + 1 < len(indices):
                left = left @ matrices[i + 1].mT
    return 1 - float((blocks * rotations).sum()) / d


def our_step(skew: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of tr(R^T A) with the package's kernels."""
    r = butterfly_matmul(torch.eye(len(target)), cayley(skew))
    return torch.autograd.grad((r * target).sum(), skew)[0]


def dense_step(skew: torch.Tensor, target: torch.Tensor, indices: list) -> torch.Tensor:
    """Compute the gradient of tr(R^T A) with dense matrices."""
    r = None
    for blocks, index in zip(cayley(skew), indices):
        matrix = dense(blocks, index, len(target))
        r = matrix if r is None else matrix @ r
    return torch.autograd.grad((r * target).sum(), skew)[0]


def timed(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Measure the median milliseconds of each function, with the functions interleaved."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number:  # the first round is a warm-up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: median(values) for name, values in times.items()}


def compare(d: int, m: int, b: int, rounds: int) -> list[dict]:
    """Time both methods with kernels and with dense matrices, after a check that they agree."""
    target = random_orthogonal(d, 0).float()
    factors = butterfly_factors(d, b, m)
    sweeps = 2
    ours = float(approximate(target[None], factors, max_sweeps=sweeps).errors[-1])
    theirs = dense_sweeps(target, factors, sweeps)
    if not abs(ours - theirs) < 0.02:  # the two make the same updates in different orders
        raise AssertionError(f"BOFT({m}, {b}): errors {ours:.4f} and {theirs:.4f} differ")
    skew = 0.1 * torch.randn(m, d // b, b * (b - 1) // 2)
    skew.requires_grad_()
    indices = [entry_indices(d, factor) for factor in factors]
    torch.testing.assert_close(
        our_step(skew, target), dense_step(skew, target, indices), rtol=1e-3, atol=1e-4
    )
    runs = {
        "ascent sweep": {
            "ours": lambda: approximate(target[None], factors, max_sweeps=sweeps),
            "dense": lambda: dense_sweeps(target, factors, sweeps),
        },
        "gradient step": {
            "ours": lambda: our_step(skew, target),
            "dense": lambda: dense_step(skew, target, indices),
        },
    }
    rows = []
    for what, functions in runs.items():
        times = timed(functions, rounds)
        calls = sweeps if what == "ascent sweep" else 1
        rows.append(
            {
                "what": what,
                "d": d,
                "n_factors": m,
                "block_size": b,
                **{f"{name}_ms": f"{value / calls:.2f}" for name, value in times.items()},
                "speedup": f"{times['dense'] / times['ours']:.1f}",
            }
        )
    return rows


def report(folder: Path) -> list[str]:
    """Make the page's table from the data file."""
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
