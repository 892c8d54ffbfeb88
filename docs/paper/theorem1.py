"""Theorem 1 of the paper: rotations as products of butterflies and transposed butterflies.

    python docs/paper/theorem1.py
    python docs/paper/theorem1.py --plot    # draws the figure and checks the claims only
    python docs/paper/theorem1.py --quick --out build/paper/theorem1

The first part is exact. It computes parameters of R_G for rotations of d features, by the theorem's
proof with l = d - 1 levels. The second part uses optimization to find the number of levels that
suffices for a random rotation.
"""

import argparse
from pathlib import Path

import torch
from _common import (
    HERE,
    OUTPUTS,
    Clock,
    figure,
    output_folder,
    parser,
    read_csv,
    save_figure,
    style,
    write_csv,
    write_log,
)
from _page import fill, table

from boft_ops import cayley, kaleidoscope_matmul
from boft_ops.analysis.representation import dense_factors, kaleidoscope_parameters
from boft_ops.analysis.transmission import analyze, kaleidoscope_pattern

EXACT, FITTED = "theorem1_exact.csv", "theorem1_fitted.csv"
REPRESENTED = 1e-6  # limit for the largest entry of R_G - A


def random_rotation(d: int, seed: int) -> torch.Tensor:
    """Draw a random rotation, (d, d) in float64."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    q[:, 0] *= torch.linalg.det(q).sign()
    return q


def awkward_rotations(d: int) -> list[torch.Tensor]:
    """Make the identity, -I, a half turn and a cycle.

    All eigenvalues of -I are -1, an eigenvalue that no Cayley transform has.
    """
    eye = torch.eye(d, dtype=torch.float64)
    half_turn, cycle = eye.clone(), eye.roll(1, 0)
    half_turn[0, 0] = half_turn[-1, -1] = -1
    cycle[0] *= torch.linalg.det(cycle)
    return [eye, -eye, half_turn, cycle]


def exact(sizes: list[int], seeds: int) -> list[dict]:
    """Represent rotations exactly, and list the errors in a row for each d and block size."""
    rows = []
    for d in sizes:
        for b in (2, 4, 8):
            if b > d:
                continue
            errors, largest = [], 0.0
            matrices = awkward_rotations(d) + [random_rotation(d, seed) for seed in range(seeds)]
            for matrix in matrices:
                first, second = kaleidoscope_parameters(matrix, b)
                eye = torch.eye(d, dtype=torch.float64)
                r = kaleidoscope_matmul(eye, cayley(first), cayley(second))
                errors.append(float((r - matrix).abs().max()))
                largest = max(largest, float(first.abs().max()), float(second.abs().max()))
            rows.append(
                {
                    "d": d,
                    "block_size": b,
                    "n_factors": dense_factors(d, b),
                    "levels": d - 1,
                    "parameters": 2 * first.numel(),
                    "dimension_of_so_d": d * (d - 1) // 2,
                    "matrices": len(matrices),
                    "largest_error": f"{max(errors):.1e}",
                    "largest_parameter": f"{largest:.3f}",
                }
            )
    return rows


def fit(matrix: torch.Tensor, b: int, levels: int) -> tuple[float, float]:
    """Fit R_G to a rotation A with L-BFGS.

    Returns:
        The largest entry of R_G - A, and ||R_G - A||_F^2 / (2 d).
    """
    d = len(matrix)
    shape = (2, levels, dense_factors(d, b), d // b, b * (b - 1) // 2)
    generator = torch.Generator().manual_seed(levels)
    skew = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    skew.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [skew],
        max_iter=1500,
        history_size=30,
        tolerance_grad=1e-12,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )
    eye = torch.eye(d, dtype=torch.float64)

    def distance() -> torch.Tensor:
        return kaleidoscope_matmul(eye, cayley(skew[0]), cayley(skew[1])) - matrix

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = distance().square().sum() / (2 * d)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        rest = distance()
    return float(rest.abs().max()), float(rest.square().sum()) / (2 * d)


def fitted(d: int, sizes: tuple[int, ...], seeds: int) -> list[dict]:
    """Fit random rotations with 1, 2, ... levels, until all seeds are represented."""
    rows = []
    for b in sizes:
        m = dense_factors(d, b)
        for levels in range(1, 5):
            family = analyze(kaleidoscope_pattern(d, b, m, levels))
            errors = [fit(random_rotation(d, 100 + seed), b, levels) for seed in range(seeds)]
            rows += [
                {
                    "d": d,
                    "block_size": b,
                    "levels": levels,
                    "seed": seed,
                    "parameters": 2 * levels * m * d * (b - 1) // 2,
                    "dimension": family.dimension,
                    "dimension_of_so_d": family.all_rotations,
                    "largest_error": f"{entry:.3e}",
                    "error": f"{error:.3e}",
                }
                for seed, (entry, error) in enumerate(errors)
            ]
            if max(entry for entry, _ in errors) < REPRESENTED:
                break
    return rows


def check_claims(folder: Path) -> list[str]:
    """Check that all rotations are represented, and state it with the numbers.

    Raises:
        AssertionError: a rotation is not represented.
    """
    rows = read_csv(folder / EXACT)
    worst = max(rows, key=lambda row: float(row["largest_error"]))
    if not float(worst["largest_error"]) < REPRESENTED:
        raise AssertionError(f"not represented to {REPRESENTED}: {worst}")
    lines = [
        f"all {sum(int(row['matrices']) for row in rows)} rotations represented to "
        f"{worst['largest_error']}, with parameters up to "
        f"{max(float(row['largest_parameter']) for row in rows):.3f}"
    ]
    return lines


def tables(folder: Path) -> dict[str, list[str]]:
    """Make the page's tables by name."""
    rows = [
        [row[name] for name in ("d", "block_size", "levels", "parameters", "dimension_of_so_d")]
        + [row["largest_error"], row["largest_parameter"]]
        for row in read_csv(folder / EXACT)
    ]
    head = ["d", "b", "l", "parameters", "dimension of SO(d)", "largest error", "largest parameter"]
    exact = table(head, rows, n_words=0)
    rows = [
        [row[name] for name in ("block_size", "levels", "parameters", "dimension", "error")]
        for row in read_csv(folder / FITTED)
        if row["seed"] == "0"
    ]
    head = ["b", "l", "parameters", "dimension of the family", "error of seed 0"]
    return {"exact": exact, "fitted": table(head, rows, n_words=0)}


def draw(folder: Path) -> None:
    """Draw the error of the fits against the number of parameters."""
    rows = read_csv(folder / FITTED)
    fig, axes = figure()
    for b, look in style(sorted({row["block_size"] for row in rows})).items():
        points = [row for row in rows if row["block_size"] == b]
        axes.plot(
            [int(row["parameters"]) for row in points],
            [float(row["error"]) for row in points],
            **{**look, "linestyle": "none"},
            label=f"b = {b}, l = 1 to {max(int(row['levels']) for row in points)}",
        )
    size = int(rows[0]["dimension_of_so_d"])
    axes.axvline(size, color="#767676", linestyle="--", label=f"dimension of SO({rows[0]['d']})")
    axes.set(yscale="log", xlabel="parameters of R_G", ylabel="||R_G - A||² / 2d after L-BFGS")
    axes.set_title(f"Random rotations of {rows[0]['d']} features fitted by R_G")
    axes.legend(frameon=False)
    save_figure(fig, folder / "theorem1.svg")


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Write the data files."""
    clock = Clock()
    sizes, seeds = ([2, 4, 8], 3) if args.quick else ([2, 4, 8, 16, 32], 20)
    write_csv(folder / EXACT, exact(sizes, seeds))
    write_csv(folder / FITTED, fitted(4, (2,), 1) if args.quick else fitted(16, (2, 4), 3))
    write_log(folder / "theorem1.log", clock)


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--plot", action="store_true", help="measure nothing, draw the existing data"
    )
    args = arguments.parse_args(argv)
    folder = output_folder(args)
    if not args.plot:
        measure(args, folder)
    draw(folder)
    print("\n".join(check_claims(folder)))
    for name, lines in tables(folder).items():
        print("\n".join(lines))
        if folder == OUTPUTS:
            fill(HERE / "theorem1.md", name, lines)


if __name__ == "__main__":
    main()
