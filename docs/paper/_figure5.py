"""Figure 5 and its page, made from the data files, and checks of the paper's statements."""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from _common import HERE, figure, read_csv, save_figure, style
from _page import fill, table

DATA, TRACES = "figure5.csv", "figure5_convergence.csv"
# Pairs of (m, b) by number of features d. The first of a pair has fewer parameters. It has a
# smaller error (BETTER), or an error that is larger by at most SIMILAR (AS_GOOD).
BETTER = {512: ((9, 2), (1, 16)), 64: ((6, 2), (1, 8))}
AS_GOOD = {512: ((6, 4), (2, 16)), 64: ((4, 4), (2, 8))}
SIMILAR = 0.02
ERROR = "||R - A||² / 2d"


class Point(NamedTuple):
    """One structure, with the mean of its errors over the seeds."""

    parameters: int
    error: float
    at_half: float  # after half of the sweeps
    seeds: int
    sweeps: str


def read_points(folder: Path, seeds: int | None = None) -> dict[tuple[str, int, int], Point]:
    """Read the point of each (method, m, b), as the mean over all seeds or the first few."""
    groups: dict[tuple[str, int, int], list[dict]] = {}
    for row in read_csv(folder / DATA):
        key = row["method"], int(row["n_factors"]), int(row["block_size"] or 0)
        if seeds is None or int(row["seed"]) < seeds:
            groups.setdefault(key, []).append(row)
    return {
        key: Point(
            int(group[0]["parameters"]),
            fmean(float(row["error"]) for row in group),
            fmean(float(row["error_at_half"]) for row in group),
            len(group),
            group[0]["sweeps"],
        )
        for key, group in groups.items()
    }


def check_claims(data: dict[tuple[str, int, int], Point], d: int) -> list[str]:
    """Check the paper's statements about its figure, and list them with the numbers.

    Raises:
        AssertionError: a statement does not hold.
    """
    lines, failed = [], []
    for (first, second), margin in ((BETTER[d], 0.0), (AS_GOOD[d], SIMILAR)):
        few, many = data[("boft", *first)], data[("boft", *second)]
        holds = few.parameters < many.parameters and few.error < many.error + margin
        lines.append(
            f"BOFT{first}: error {few.error:.4f} with {few.parameters} parameters; BOFT{second}: "
            f"{many.error:.4f} with {many.parameters}: "
            + ("holds" if holds else "DOES NOT HOLD")
            + (f" (within {margin})" if margin else "")
        )
        failed += [] if holds else [lines[-1]]
    if failed:
        raise AssertionError("\n".join(failed))
    return lines


def draw(folder: Path) -> None:
    """Draw the figure from the data files of a folder."""
    fig, (top, bottom) = figure(2)
    draw_errors(top, read_points(folder))
    draw_convergence(bottom, folder)
    save_figure(fig, folder / "figure5.svg")


def draw_errors(axes, data: dict[tuple[str, int, int], Point]) -> None:
    """Draw the error against the number of parameters, one curve over m for each block size."""
    looks = style(sorted({b for method, _, b in data if method == "boft"}))
    curves = {
        "boft": {"linestyle": "-", "markersize": 4},
        "shuffle": {"linestyle": ":", "markersize": 4, "markerfacecolor": "white"},
    }
    for method, line in curves.items():
        for b, look in looks.items():
            points = sorted((key[1], p) for key, p in data.items() if key[::2] == (method, b))
            if points:
                most = points[-1][0]
                name = f"BOFT(1:{most}, {b})" if method == "boft" else f"shuffle(1:{most}, {b})"
                xs, ys = [p.parameters for _, p in points], [p.error for _, p in points]
                axes.plot(xs, ys, **{**look, **line}, label=name)
    ranks = sorted(point for key, point in data.items() if key[0] == "low-rank")
    xs, ys = [p.parameters for p in ranks], [p.error for p in ranks]
    axes.plot(xs, ys, "--", color="#767676", label="I + low rank")
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=ERROR)
    axes.set_title("Approximation of random orthogonal matrices")
    axes.legend(fontsize=8, frameon=False)


def draw_convergence(axes, folder: Path) -> None:
    """Draw the error against the number of sweeps or steps."""
    traces: dict[tuple[str, int, int], list[tuple[int, float]]] = {}
    for row in read_csv(folder / TRACES):
        key = row["method"], int(row["n_factors"]), int(row["block_size"])
        traces.setdefault(key, []).append((int(row["sweep"]), float(row["error"])))
    lines = {
        "boft-long": ("-", "sweeps from I"),
        "boft-random": ("--", "sweeps from a random start"),
        "boft-adam": (":", "steps of Adam from I"),
    }
    checked = [key[1:] for key in traces if key[0] == "boft-long"]
    for structure, look in style(checked).items():
        for method, (dash, name) in lines.items():
            xs, ys = zip(*traces[(method, *structure)])
            axes.plot(xs, ys, dash, color=look["color"], label=f"BOFT{structure}, {name}")
    axes.set(xscale="log", xlabel="sweeps over all factors, or steps", ylabel=ERROR)
    axes.set_title("Convergence")
    axes.legend(fontsize=8, frameon=False)


def fill_page(folder: Path, claims: list[str]) -> None:
    """Write the tables of figure5.md."""
    page, data = HERE / "figure5.md", read_points(folder)
    fill(page, "claims", [f"- {line}" for line in claims])

    checked = [key[1:] for key in data if key[0] == "boft-long"]
    lines = []
    for structure in checked:
        seeds = data[("boft-long", *structure)].seeds
        same = read_points(folder, seeds)
        cells = [f"BOFT{structure}"]
        for method in ("boft", "boft-random", "boft-long", "boft-adam"):
            point = same[(method, *structure)]
            cells.append(f"{point.error:.4f} ({point.sweeps})")
        lines.append(cells)
    head = ["", "from I", "from a random start", "from I, longer", "Adam, steps"]
    fill(page, "checks", table(head, lines))

    ranks = sorted(point for key, point in data.items() if key[0] == "low-rank")
    lines = []
    for (method, m, b), point in sorted(data.items(), key=lambda item: (item[0][2], item[0][1])):
        if method != "boft":
            continue
        shuffled = data.get(("shuffle", m, b))
        low = [rank.error for rank in ranks if rank.parameters <= point.parameters]
        lines.append(
            [
                f"BOFT({m}, {b})",
                f"{point.parameters:,}",
                f"{512 * (b - 1) // 2 + (m - 1) * 512 * b // 4:,}",
                f"{point.error:.4f}",
                f"{point.at_half - point.error:.4f}",
                f"{shuffled.error:.4f}" if shuffled else "",
                f"{low[-1]:.4f}" if low else "",
            ]
        )
    head = ["", "parameters", "dimension", "error", "last half", "shuffle(m, b)", "I + low rank"]
    fill(page, "errors", table(head, lines))
