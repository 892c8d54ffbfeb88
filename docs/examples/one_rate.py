#!/usr/bin/env python3
"""Train several block sizes and numbers of factors with the same learning rates, in two ways.

Once AdamW gets boft_ops.param_groups(model, lr), which gives each skew a rate by its structure;
once it gets the plain parameters with the same lr. If one rate serves every structure, the best
accuracies of a table are in one column, and the accuracies of a column are alike.

    python docs/examples/fetch_data.py                   # once
    python docs/examples/one_rate.py                     # some minutes on one core

Results are committed in docs/examples/one_rate.md.
"""

import argparse
import shlex
import sys
from pathlib import Path

import report
import torch
from fetch_data import DATA_DIR, FILE_NAME, check_arguments
from finetune_minilm import cache
from minilm import LINEARS, Cached, Classifier, cut_in_two, load_minilm, predict
from rich.console import Console
from snippets import TEST, VALIDATION, make_splits, read_snippets
from torch import nn
from training import train

import boft_ops

SHAPES = ((1, 4), (2, 8), (4, 4), (1, 64), (2, 32))  # (n_factors, block_size)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEED = 0
GROUPS, PLAIN = "param_groups(model, lr)", "the plain parameters, lr"

Shape = tuple[int, int]
# For each (n_factors, block_size): 1 for a right answer, else 0, as (rates, validation sentences).
Answers = dict[Shape, torch.Tensor]


def build(top: nn.Module, shape: Shape) -> nn.Module:
    """Build the demo's classifier with BOFT(n_factors, block_size) in its linear layers."""
    torch.manual_seed(SEED)
    model = Classifier(top)
    model.encoder.requires_grad_(False)
    n_factors, block_size = shape
    return boft_ops.adapt(
        model, LINEARS, n_factors=n_factors, block_size=block_size, modules_to_save=["head"]
    )


def rate_of_skews(top: nn.Module, shape: Shape) -> float:
    """Look up the rate that param_groups gives the skews, as a multiple of lr."""
    return boft_ops.param_groups(build(top, shape), lr=1.0)[0]["lr"]


def measure(
    shape: Shape, scaled: bool, args, top: nn.Module, training: Cached, held_in: Cached, bars
) -> torch.Tensor:
    """Train at each rate, and tell for each validation sentence if the answer is right."""
    answers = []
    for rate in RATES:
        model = build(top, shape)
        name = f"{shape}, {'param_groups' if scaled else 'plain parameters'}, lr {rate:g}"
        bar = bars.add_task(name, note="")

        def each_step(step: int, steps: int, loss: float, bar=bar) -> None:
            bars.update(bar, completed=step, total=steps, note=f"loss {loss:.2f}")

        train(
            model,
            training,
            rate=rate,
            epochs=args.epochs,
            seed=SEED,
            each_step=each_step,
            scaled=scaled,
        )
        answers.append((predict(model, held_in) == held_in.labels).double())
    return torch.stack(answers)


# --- Numbers and text -----------------------------------------------------------------------------


def best(answers: torch.Tensor) -> int:
    """Find the column of the highest accuracy."""
    return int(answers.mean(1).argmax())


def carried(difference: torch.Tensor) -> bool:
    """Tell if the mean of differences by sentence is larger than chance explains."""
    return bool(difference.mean().abs() > report.CARRIES * report.standard_error(difference))


def widest(answers: Answers, column: int) -> tuple[float, float]:
    """Compute the largest difference of two accuracies in a column, and its standard error."""
    rows = sorted((rows[column] for rows in answers.values()), key=lambda row: row.mean())
    difference = rows[-1] - rows[0]  # sentence by sentence, as both answered the same ones
    return difference.mean().item(), report.standard_error(difference)


def table(answers: Answers, factors: dict[Shape, float]) -> list[str]:
    """Format accuracies in percent with their standard errors; the best of each row is bold."""
    lines = ["| (m, b) | rate of the skews | " + " | ".join(f"lr {r:g}" for r in RATES) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(RATES))
    for shape, rows in answers.items():
        cells = [f"{100 * row.mean():.1f} ± {100 * report.standard_error(row):.1f}" for row in rows]
        cells[best(rows)] = f"**{cells[best(rows)]}**"
        lines.append(f"| {shape} | {factors[shape]:.2f} lr | {' | '.join(cells)} |")
    wide = [widest(answers, column) for column in range(len(RATES))]
    cells = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in wide]
    return [*lines, f"| highest minus lowest | | {' | '.join(cells)} |"]


def one_for_all(answers: Answers) -> str:
    """State what it costs to train every structure at the rate that is best on average."""
    common = int(torch.stack([rows.mean(1) for rows in answers.values()]).mean(0).argmax())
    lost = {shape: rows[best(rows)] - rows[common] for shape, rows in answers.items()}
    worst = max(lost, key=lambda shape: lost[shape].mean().item())
    return (
        f"With lr {RATES[common]:g} for all, a structure is at most {100 * lost[worst].mean():.1f} "
        f"± {100 * report.standard_error(lost[worst]):.1f} points below its own best: {worst}, "
        f"{'carried' if carried(lost[worst]) else 'not carried'}."
    )


def cells_apart(with_groups: Answers, plain: Answers) -> str:
    """List the cells in which the two tables differ."""
    cells: dict[bool, list[str]] = {True: [], False: []}
    for shape, rows in with_groups.items():
        for rate, difference in zip(RATES, rows - plain[shape], strict=True):
            if carried(difference):
                points = f"{shape} at lr {rate:g} ({100 * difference.mean():+.1f})"
                cells[bool(difference.mean() > 0)].append(points)
    ahead, behind = ("; ".join(cells[key]) or "none" for key in (True, False))
    return f"At the same lr, param_groups is better in: {ahead}; worse in: {behind}."


def verdicts(found: dict[str, Answers]) -> list[str]:
    """State what the tables carry; the first of `found` is that of param_groups."""
    lines, columns, apart = [], [], []
    for way, answers in found.items():
        bests = {shape: best(rows) for shape, rows in answers.items()}
        rates = ", ".join(f"{RATES[column]:g} for {shape}" for shape, column in bests.items())
        order = [rows[rows.mean(1).argsort(descending=True)] for rows in answers.values()]
        ahead = sum(carried(rows[0] - rows[1]) for rows in order)
        lines.append(
            f"{way}: the best lr is {rates}. Its lead on the second is carried in {ahead} of "
            f"{len(answers)} rows. {one_for_all(answers)}"
        )
        columns.append(len(set(bests.values())))
        wide = [widest(answers, column) for column in range(len(RATES))]
        apart.append(sum(value > report.CARRIES * error for value, error in wide))
    lines.append(cells_apart(*found.values()))
    shown = "The best rate stays in one column with param_groups and wanders without."
    if not columns[0] == 1 < columns[1]:
        shown = (
            "That the best rate stays with param_groups and wanders without is NOT shown: it is in "
            f"{columns[0]} of {len(RATES)} columns with them and in {columns[1]} without."
        )
    lines.append(shown)
    lines.append(
        "Highest minus lowest of a column is carried in "
        f"{apart[0]} of {len(RATES)} columns with param_groups and in {apart[1]} without."
    )
    lines.append(
        f"Carried: more than {report.CARRIES:.0f} standard errors, paired by sentence. One seed: "
        "the errors know the choice of sentences, not the luck of a training."
    )
    return lines


# --- The command ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    console = Console()
    pairs = read_snippets(args.data / FILE_NAME)
    training, held_in, _ = make_splits(pairs, args.train_size, VALIDATION, TEST)
    tokenizer, bert = load_minilm()
    lower, top = cut_in_two(bert)
    factors = {shape: rate_of_skews(top, shape) for shape in SHAPES}
    found: dict[str, Answers] = {GROUPS: {}, PLAIN: {}}
    with report.progress(console) as bars:
        training = cache(tokenizer, lower, training, bars, "training")
        held_in = cache(tokenizer, lower, held_in, bars, "validation")
        for shape in SHAPES:
            answers = measure(shape, True, args, top, training, held_in, bars)
            found[GROUPS][shape] = found[PLAIN][shape] = answers
            # BOFT(2, 8) trains at lr in both ways, so once is enough.
            if factors[shape] != 1.0:
                found[PLAIN][shape] = measure(shape, False, args, top, training, held_in, bars)
    command = shlex.join(["python", "docs/examples/one_rate.py", *sys.argv[1:]])
    text = ["# One learning rate for every structure", "", *report.provenance(command)]
    epochs = "1 epoch" if args.epochs == 1 else f"{args.epochs} epochs"
    steps = f"{epochs} of {len(training)} training sentences"
    text += [f"- Accuracies in percent on {len(held_in)} validation sentences, after {steps}"]
    plain = dict.fromkeys(factors, 1.0)
    for way, answers in found.items():
        text += ["", f"## {way}", "", *table(answers, factors if way == GROUPS else plain)]
    text += ["", "## What the tables carry", "", *(f"- {line}" for line in verdicts(found))]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "one_rate.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    console.print("\n".join(text), highlight=False, markup=False, soft_wrap=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--epochs", type=int, default=1, help="passes over the training sentences")
    add("--train-size", type=int, default=512, help="training sentences")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--data", type=Path, default=DATA_DIR, help="folder of the data of fetch_data.py")
    add("--out", type=Path, default=Path("build/one_rate"), help="folder of the results")
    args = parser.parse_args(arguments)
    check_arguments(parser, args, ("epochs", "train_size", "threads"))
    return args


if __name__ == "__main__":
    main()
