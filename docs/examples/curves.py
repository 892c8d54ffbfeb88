"""Learning curves of the demo, drawn as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # draws to a file, without a window

import matplotlib.pyplot as plt
import numpy as np
from report import Run, by_method

# Okabe and Ito's palette, whose colors remain distinct with every common form of color blindness.
# Markers and dashes differ too, for gray print and because LoRA, OFT and BOFT lie close together.
STYLES = {
    "frozen": ("#767676", "o", ":"),
    "lora": ("#D55E00", "s", "--"),
    "oft": ("#009E73", "^", "-."),
    "boft": ("#0072B2", "D", "-"),
}


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """Compute a centered moving mean, over fewer values at the ends."""
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw(path: Path, runs: Sequence[Run], n_validation: int) -> None:
    """Draw validation accuracy and training loss against the step, as means over the seeds."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, group in by_method(runs).items():
        color, marker, dash = STYLES[name]
        look = {"color": color, "linestyle": dash, "linewidth": 2, "label": group[0].title}
        steps = [step for step, _ in group[0].curve]
        accuracy = 100 * np.array([[value for _, value in run.curve] for run in group])
        left.plot(steps, accuracy.mean(0), marker=marker, markersize=6, **look)
        loss = np.array([run.losses for run in group]).mean(0)
        right.plot(np.arange(1, len(loss) + 1), smooth(loss), **look)
    top = max(value for run in runs for _, value in run.curve)
    error = 100 * (top * (1 - top) / n_validation) ** 0.5  # standard error of one run
    left.set(xlabel="training step", ylabel="validation accuracy (%)")
    left.set_title(f"Validation accuracy ({n_validation} sentences)", fontsize=11)
    right.set(xlabel="training step", ylabel="cross-entropy", ylim=(0, None))
    right.set_title("Training loss (moving mean of 15 steps)", fontsize=11)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, None)
    # The standard error of a point of the left curves, drawn to scale where there is no curve.
    bottom = left.get_ylim()[0] + 1.5 * error
    left.errorbar([0.97 * steps[-1]], [bottom], yerr=[error], color="black", capsize=4)
    left.text(0.94 * steps[-1], bottom, "± 1 standard error of a point", ha="right", va="center")
    fig.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    seeds = len({run.seed for run in runs})
    fig.suptitle(
        "Finetuning the top three layers of MiniLM-L6 on movie-review sentiment"
        + (f", mean of {seeds} seeds" if seeds > 1 else ""),
        fontsize=12,
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)
