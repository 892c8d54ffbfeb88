"""Figure 5 of the paper: approximation of random orthogonal 512 x 512 matrices by BOFT(m, b).

    python docs/paper/figure5.py              # measures everything
    python docs/paper/figure5.py --seeds 3    # measures fewer matrices
    python docs/paper/figure5.py --resume     # continues an interrupted run
    python docs/paper/figure5.py --plot       # draws the figure and checks the claims only
    python docs/paper/figure5.py --quick --out build/paper/figure5

Every matrix is approximated by BOFT(m, b), for every b and for every m up to a dense product. It is
also approximated by the same number of block-diagonal factors with shuffles between them, and by
the identity plus a matrix of low rank. The error is ||R - A||_F^2 / (2 d). For orthogonal R it
equals 1 - tr(R^T A) / d, and for R = I its mean is 1.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from _common import OUTPUTS, Clock, output_folder, parser, read_csv, write_csv, write_log
from _figure5 import AS_GOOD, BETTER, DATA, TRACES, check_claims, draw, fill_page, read_points

from boft_ops import butterfly_matmul, cayley
from boft_ops.analysis.approximation import (
    approximate,
    butterfly_factors,
    shuffle_factors,
)
from boft_ops.ops.geodesic import inverse_cayley


class Task(NamedTuple):
    """One structure that is fitted to the matrices of all seeds.

    The methods "boft-random" (random start), "boft-long" and "boft-adam" are checks of "boft".
    """

    method: str  # "boft", "shuffle", or one of the checks
    m: int
    b: int
    d: int
    seeds: tuple[int, ...]
    max_sweeps: int

    @property
    def parameters(self) -> int:
        return self.m * self.d * (self.b - 1) // 2


def random_orthogonal(d: int, seed: int) -> torch.Tensor:
    """Draw a Haar-distributed orthogonal matrix.

    It is Q of the QR decomposition of a Gaussian matrix, times the signs of R's diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def run(task: Task) -> tuple[Task, list[dict], list[dict]]:
    """Fit one structure.

    Returns:
        The task, a row with the error of each seed, and rows with the mean error after some of the
        sweeps.
    """
    begin = time.process_time()
    targets = torch.stack([random_orthogonal(task.d, seed) for seed in task.seeds])
    if task.method == "boft-adam":
        errors = adam(targets, task)
    else:
        make_factors = shuffle_factors if task.method == "shuffle" else butterfly_factors
        fit = approximate(
            targets.float(),
            make_factors(task.d, task.b, task.m),
            max_sweeps=task.max_sweeps,
            tolerance=0 if task.method == "boft-long" else 1e-3,
            start=random_start(task) if task.method == "boft-random" else None,
        )
        errors = fit.errors
        if task.method.startswith("boft"):  # from skew parameters as in a layer, in float64
            errors[-1] = errors_of(inverse_cayley(fit.blocks), targets)
    seconds = f"{time.process_time() - begin:.2f}"  # CPU time of this process with its one thread
    sweeps, half = len(errors), errors[(len(errors) - 1) // 2]
    common = {"method": task.method, "n_factors": task.m, "block_size": task.b}
    rows = [
        {
            **common,
            "parameters": task.parameters,
            "seed": seed,
            "error": f"{errors[-1, i]:.6f}",
            "error_at_half": f"{half[i]:.6f}",
            "sweeps": sweeps,
            "cpu_s_of_all_seeds": seconds,
        }
        for i, seed in enumerate(task.seeds)
    ]
    shown = sorted({round(1.2**k) for k in range(60) if 1.2**k < sweeps} | {sweeps})
    means = errors.mean(1)
    return task, rows, [{**common, "sweep": s, "error": f"{means[s - 1]:.6f}"} for s in shown]


def errors_of(skew: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the error of each target from the parameters of all targets, side by side."""
    n, d, _ = targets.shape
    eye = torch.eye(d, dtype=targets.dtype).repeat(1, n)
    r = butterfly_matmul(eye, cayley(skew)).unflatten(1, (n, d)).transpose(0, 1)
    return (r - targets).square().sum((1, 2)) / (2 * d)


def random_start(task: Task) -> torch.Tensor:
    """Draw a random rotation for every block."""
    generator = torch.Generator().manual_seed(1234)
    shape = (task.m, len(task.seeds) * task.d // task.b, task.b, task.b)
    q = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
    q[..., 0] *= torch.linalg.det(q).sign()[..., None]
    return q


def adam(targets: torch.Tensor, task: Task) -> torch.Tensor:
    """Fit the skew parameters with Adam from the identity, with a cosine schedule."""
    n, d, b = len(targets), task.d, task.b
    rows = targets.float().transpose(0, 1).reshape(d, n * d)
    skew = torch.zeros(task.m, n * d // b, b * (b - 1) // 2, requires_grad=True)
    optimizer = torch.optim.Adam([skew], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.max_sweeps)
    eye, errors = torch.eye(d).repeat(1, n), []
    for _ in range(task.max_sweeps):
        optimizer.zero_grad()
        traces = (butterfly_matmul(eye, cayley(skew)) * rows).unflatten(1, (n, d)).sum((0, 2))
        (-traces.sum()).backward()
        optimizer.step()
        schedule.step()
        errors.append(1 - traces.detach().double() / d)
    errors[-1] = errors_of(skew.detach().double(), targets)
    return torch.stack(errors)


def low_rank(d: int, seeds: tuple[int, ...], most: int) -> list[dict]:
    """Compute the errors of I plus the best matrix of rank k (Eckart and Young).

    It has 2 d k parameters, as LoRA counts them.
    """
    rows = []
    for seed in seeds:
        values = torch.linalg.svdvals(random_orthogonal(d, seed) - torch.eye(d).double()).square()
        for k in range(1, most // (2 * d) + 1):
            error = f"{values[k:].sum() / (2 * d):.6f}"
            rows.append(
                {
                    "method": "low-rank",
                    "n_factors": k,
                    "block_size": "",
                    "parameters": 2 * d * k,
                    "seed": seed,
                    "error": error,
                    "error_at_half": error,
                    "sweeps": "",
                    "cpu_s_of_all_seeds": "",
                }
            )
    return rows


def tasks(args: argparse.Namespace) -> list[Task]:
    """List all structures to fit, those of the paper's statements first."""
    d, sizes = (64, (2, 4, 8)) if args.quick else (512, (2, 4, 8, 16, 32))
    common = (d, tuple(range(args.seeds)), 100 if args.quick else 200)
    few = (d, common[1][:3], common[2])  # a few seeds suffice, because they hardly differ
    shuffled = (4,) if args.quick else (4, 16)  # for b = 2 shuffle and butterfly are equal
    claims = [*BETTER[d], *AS_GOOD[d]]
    dense = {b: (d // b).bit_length() for b in sizes}
    every = {(m, b): None for b in sizes for m in range(dense[b], 0, -1)}
    every = dict.fromkeys(claims) | every
    result = [Task("boft", *structure, *common) for structure in every]
    result += [Task("shuffle", m, b, *few) for b in shuffled for m in range(dense[b], 0, -1)]
    checked = [structure for structure in claims if structure[0] > 1]
    pair = (d, common[1][:2])
    for method, most in (("boft-random", 1), ("boft-long", 8), ("boft-adam", 5)):
        result += [Task(method, *structure, *pair, most * common[2]) for structure in checked]
    return result


def measure(args: argparse.Namespace, folder: Path) -> int:
    """Write the CSV files; returns the number of structures that are left for --resume."""
    clock, todo = Clock(), tasks(args)
    d, seeds = todo[0].d, todo[0].seeds
    rows: list[dict] = low_rank(d, seeds, max(t.parameters for t in todo))
    convergence: list[dict] = []
    if args.resume and (folder / DATA).exists():
        rows, convergence = read_csv(folder / DATA), read_csv(folder / TRACES)
        done = {(r["method"], int(r["n_factors"]), int(r["block_size"] or 0)) for r in rows}
        todo = [task for task in todo if task[:3] not in done]
    todo, left = todo[: args.most], todo[args.most :] if args.most else []
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    # Each structure uses one core, because its tensors are too small to divide.
    with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        for count, future in enumerate(as_completed([pool.submit(run, t) for t in todo]), 1):
            task, new, trace = future.result()
            rows += new
            convergence += trace
            mean = fmean(float(row["error"]) for row in new)
            print(
                f"{count}/{len(todo)} {task.method}({task.m}, {task.b}): {mean:.4f} after "
                f"{new[0]['sweeps']} sweeps, {clock.wall():.0f} s",
                file=sys.stderr,
                flush=True,
            )
            # The results so far are written after each structure, for --resume.
            write_csv(folder / DATA, sorted(rows, key=sort_key))
            write_csv(folder / TRACES, sorted(convergence, key=sort_key))
    cpu = {(r["method"], r["n_factors"], r["block_size"]): r["cpu_s_of_all_seeds"] for r in rows}
    facts = {"seeds": len(seeds), "d": d, "processes": args.jobs}
    # wall_s and cpu_s are those of this command; this sum includes the earlier ones of --resume.
    facts["cpu_s_of_all_structures"] = f"{sum(float(value or 0) for value in cpu.values()):.0f}"
    write_log(folder / "figure5.log", clock, facts)
    return len(left)


def sort_key(row: dict) -> tuple:
    return (
        row["method"],
        int(row["block_size"] or 0),
        int(row["n_factors"]),
        int(row.get("seed", row.get("sweep"))),
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--seeds", type=int, help="number of random matrices (default: 10)")
    add("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    add("--resume", action="store_true", help="measure only structures that the CSV files lack")
    add("--most", type=int, help="number of structures to measure; --resume measures the rest")
    add("--plot", action="store_true", help="measure nothing, draw the existing data")
    args = arguments.parse_args(argv)
    args.seeds = args.seeds or (2 if args.quick else 10)
    folder = output_folder(args)
    if not args.plot and (left := measure(args, folder)):
        print(f"{left} structures are left for --resume")
        return
    draw(folder)
    claims = check_claims(read_points(folder), 64 if args.quick else 512)
    print("\n".join(claims))
    if folder == OUTPUTS:
        fill_page(folder, claims)


if __name__ == "__main__":
    main()
