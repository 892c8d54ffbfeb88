#!/usr/bin/env python3
"""Effect of multiplicative dropout on training and test accuracy, on the demo's task.

MiniLM is finetuned with BOFT(2,8) as in the demo. In each step one of the two factors is chosen,
and a share p_block of its blocks becomes the identity. Runs with the same seed have the same
batches and the same head for all shares, so differences are taken seed by seed. arXiv 2311.06243,
section 4.

    python docs/paper/dropout.py                     # trains nine models, once
    python docs/paper/dropout.py --quick --out X     # takes seconds, on a tiny random model
"""

import math
import statistics
from pathlib import Path

import _common
import _finetuned
import _page
import torch
from _finetuned import Recipe, boft

SHARES = (0.0, 0.1, 0.5)
SEEDS = 3
SPLITS = ("train", "test")


def recipe(share: float, seed: int) -> Recipe:
    """Make the recipe for a share of dropped blocks; 0 means no dropout."""
    options = {"p_component": 0.5, "p_block": share} if share else {}
    return boft(2, 8, 3e-3, seed, **options)


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    args = parser.parse_args()
    out, clock = _common.output_folder(args), _common.Clock()
    rows = measure(_finetuned.load_task(args.quick), range(args.seeds))
    _common.write_csv(out / "dropout.csv", rows)
    rows = _common.read_csv(out / "dropout.csv")
    if args.out is None:  # the page shows the committed outputs
        _page.fill(_common.HERE / "dropout.md", "accuracy", table(rows))
    draw(rows, out / "dropout.svg", "a tiny random BERT" if args.quick else "MiniLM-L6")
    seconds = sum(float(row["training_s"]) for row in rows)
    _common.write_log(out / "dropout.log", clock, {"training_s": f"{seconds:.0f}"})


def measure(task: _finetuned.Task, seeds: range) -> list[dict]:
    """Measure one row for each share and seed, with the difference to the seed without dropout."""
    rows = []
    for seed in seeds:
        without = _finetuned.finetuned(task, recipe(0.0, seed))
        for share in SHARES:
            tuned = _finetuned.finetuned(task, recipe(share, seed))
            differ = tuned.correct.double() - without.correct.double()
            rows.append(
                {
                    "p_block": share,
                    "seed": seed,
                    "train_accuracy": tuned.train_accuracy,
                    "test_accuracy": tuned.test_accuracy,
                    "difference": differ.mean().item(),
                    "difference_error": standard_error(differ),
                    "training_s": tuned.seconds,
                }
            )
    return rows


def standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean, from the random choice of the test sentences."""
    return (values.std() / len(values) ** 0.5).item()


def mean_and_error(rows: list[dict], column: str) -> tuple[float, float]:
    """Return the mean over the seeds in percent, and its standard error from their spread."""
    values = [100 * float(row[column]) for row in rows]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def by_share(rows: list[dict]) -> dict[str, list[dict]]:
    """Group rows by share."""
    shares = dict.fromkeys(row["p_block"] for row in rows)
    return {share: [row for row in rows if row["p_block"] == share] for share in shares}


def difference(group: list[dict]) -> tuple[float, float]:
    """Return the gain in test accuracy over no dropout in points, and its standard error.

    The error combines the spread of the seeds and the random choice of the test sentences, which
    all seeds share.
    """
    mean, spread = mean_and_error(group, "difference")
    sentences = 100 * statistics.fmean(float(row["difference_error"]) for row in group)
    return mean, math.hypot(0.0 if math.isnan(spread) else spread, sentences)


def table(rows: list[dict]) -> list[str]:
    """Make the page's table of accuracies and differences."""
    lines = []
    for share, group in by_share(rows).items():
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(group, f"{k}_accuracy")) for k in SPLITS]
        mean, error = difference(group)
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        over = "" if float(share) == 0 else f"{round(mean, 1) + 0.0:+.1f} ± {error:.1f}"
        lines.append([share, str(len(group)), *cells, over])
    head = ["p_block", "seeds", "training %", "test %", "test, points over no dropout"]
    return _page.table(head, lines, n_words=0)


def draw(rows: list[dict], path: Path, model: str) -> None:
    """Draw the accuracy on training and test sentences, and the difference to no dropout."""
    fig, (top, bottom) = _common.figure(2, 3.4)
    groups = list(by_share(rows).values())
    shares = [float(share) for share in by_share(rows)]
    style = _common.style(["train_accuracy", "test_accuracy", "difference"])
    for column, label in zip(style, ("training", "test"), strict=False):
        means, errors = zip(*(mean_and_error(group, column) for group in groups), strict=True)
        top.errorbar(shares, means, yerr=errors, **style[column], label=label, capsize=4)
        for x, group in zip(shares, groups, strict=True):
            values = [100 * float(row[column]) for row in group]
            top.plot([x] * len(values), values, ".", color=style[column]["color"], alpha=0.4)
    top.set(xlabel="share of dropped blocks in one of two factors", ylabel="accuracy (%)")
    top.legend(frameon=False)
    means, errors = zip(*(difference(group) for group in groups), strict=True)
    bottom.errorbar(shares[1:], means[1:], yerr=errors[1:], **style["difference"], ls="", capsize=4)
    bottom.axhline(0, color="black", lw=0.8)
    bottom.set_xticks(shares[1:])
    bottom.set(
        xlim=top.get_xlim(),
        xlabel="share of dropped blocks",
        ylabel="test accuracy, points over no dropout",
    )
    seeds = len(groups[0])
    fig.suptitle(f"Multiplicative dropout, BOFT(2,8) of {model}, {seeds} seeds; ± 1 standard error")
    _common.save_figure(fig, path)


if __name__ == "__main__":
    main()
