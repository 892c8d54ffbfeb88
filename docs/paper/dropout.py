#!/usr/bin/env python3
"""Multiplicative dropout on the demo's task: what it does to training and test accuracy.

BOFT(2,8) of MiniLM as in the demo, with one of the two factors chosen in each step and a share
p_block of its blocks made the identity. Several seeds; seeds share their batches and heads across
the shares, so the differences are taken seed by seed. arXiv 2311.06243, section 4.

    python docs/paper/dropout.py                     # trains nine models, once
    python docs/paper/dropout.py --quick --out X     # seconds, on a tiny random model
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
KINDS = ("train", "test")


def recipe(share: float, seed: int) -> Recipe:
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
    draw(rows, out / "dropout.png", "a tiny random BERT" if args.quick else "MiniLM-L6")
    seconds = sum(float(row["training_s"]) for row in rows)
    _common.write_log(out / "dropout.log", clock, {"training_s": f"{seconds:.0f}"})


def measure(task: _finetuned.Task, seeds: range) -> list[dict]:
    """One row for each share and seed; the differences are to the same seed without dropout."""
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
    """Of the mean: how far another draw of the test sentences would move it."""
    return (values.std() / len(values) ** 0.5).item()


def mean_and_error(rows: list[dict], column: str) -> tuple[float, float]:
    """Mean over the seeds, in percent, and its standard error from their spread."""
    values = [100 * float(row[column]) for row in rows]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def by_share(rows: list[dict]) -> dict[str, list[dict]]:
    shares = dict.fromkeys(row["p_block"] for row in rows)
    return {share: [row for row in rows if row["p_block"] == share] for share in shares}


def difference(group: list[dict]) -> tuple[float, float]:
    """Points of test accuracy over no dropout, and their standard error.

    Of two parts: the seeds' spread, and the draw of the test sentences, which all seeds share.
    """
    mean, spread = mean_and_error(group, "difference")
    sentences = 100 * statistics.fmean(float(row["difference_error"]) for row in group)
    return mean, math.hypot(0.0 if math.isnan(spread) else spread, sentences)


def table(rows: list[dict]) -> list[str]:
    """Accuracies and differences of every share, in the page's table."""
    lines = []
    for share, group in by_share(rows).items():
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(group, f"{k}_accuracy")) for k in KINDS]
        mean, error = difference(group)
        # + 0.0: what rounds to nothing has no sign
        over = "" if float(share) == 0 else f"{round(mean, 1) + 0.0:+.1f} ± {error:.1f}"
        lines.append([share, str(len(group)), *cells, over])
    head = ["p_block", "seeds", "training %", "test %", "test, points over no dropout"]
    return _page.table(head, lines, n_words=0)


def draw(rows: list[dict], path: Path, model: str) -> None:
    """Accuracy of training and test sentences, and the difference to no dropout."""
    fig, (left, right) = _common.figure(2, (4.6, 3.6))
    groups = list(by_share(rows).values())
    at = [float(share) for share in by_share(rows)]
    style = _common.style(["train_accuracy", "test_accuracy", "difference"])
    for column, label in zip(style, ("training", "test"), strict=False):
        means, errors = zip(*(mean_and_error(group, column) for group in groups), strict=True)
        left.errorbar(at, means, yerr=errors, **style[column], label=label, capsize=4)
        for x, group in zip(at, groups, strict=True):
            values = [100 * float(row[column]) for row in group]
            left.plot([x] * len(values), values, ".", color=style[column]["color"], alpha=0.4)
    left.set(xlabel="share of dropped blocks in one of two factors", ylabel="accuracy (%)")
    left.legend(frameon=False)
    means, errors = zip(*(difference(group) for group in groups), strict=True)
    right.errorbar(at[1:], means[1:], yerr=errors[1:], **style["difference"], ls="", capsize=4)
    right.axhline(0, color="black", lw=0.8)
    right.set_xticks(at[1:])
    right.set(
        xlim=left.get_xlim(),
        xlabel="share of dropped blocks",
        ylabel="test accuracy, points over no dropout",
    )
    seeds = len(groups[0])
    fig.suptitle(f"Multiplicative dropout, BOFT(2,8) of {model}, {seeds} seeds; ± 1 standard error")
    _common.save_figure(fig, path)


if __name__ == "__main__":
    main()
