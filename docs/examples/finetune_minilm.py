#!/usr/bin/env python3
"""Finetune a real sentence encoder in four ways, side by side, on two CPU cores in minutes.

The task is to tell positive from negative movie-review snippets. The model is all-MiniLM-L6-v2
(BERT, six layers of width 384) with a fresh linear head over the mean of the token vectors. Besides
the head, the four methods train:

    frozen   nothing: the features stay as they are
    lora     low-rank updates of every linear layer of the top three layers (PEFT, r = 8)
    oft      block-diagonal rotations of the inputs of the same layers (boft_ops, one factor)
    boft     butterfly rotations: two such factors, interleaved (boft_ops, BOFT(2, 8))

    python docs/examples/fetch_data.py                   # once
    python docs/examples/finetune_minilm.py              # about a minute a method
    python docs/examples/finetune_minilm.py --seeds 3    # with the spread over seeds
    python docs/examples/finetune_minilm.py --search     # compares learning rates

docs/examples/README.md explains the output.
"""

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path

import curves
import report
import torch
from fetch_data import DATA_DIR, FILE_NAME, check_arguments
from methods import METHODS, build
from minilm import Cached, Classifier, cut_in_two, load_minilm, predict, run_lower
from rich.console import Console
from snippets import TRAIN, Split, make_splits, read_snippets
from torch import nn
from training import peak_memory, step_times, train

import boft_ops

EPOCHS = 2
CURVE_POINTS = 8  # number of evaluations on the validation split in a run
SEARCH_SEED = 1000  # --search must not use the seeds of the reported runs


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)

    try:
        pairs = read_snippets(args.data / FILE_NAME)
        training, validation, test = make_splits(pairs, train=args.train_size)
        tokenizer, bert = load_minilm()
    except (RuntimeError, ValueError) as error:  # the message tells the user how to correct it
        sys.exit(f"finetune_minilm: {error}")
    lower, top = cut_in_two(bert)
    with report.progress(console) as bars:
        training = cache(tokenizer, lower, training, bars, "training")
        validation = cache(tokenizer, lower, validation, bars, "validation")
        if args.search:
            rows = search(args, top, training, validation, bars)
        else:
            test = cache(tokenizer, lower, test, bars, "test")
            runs = [
                finetune(name, seed, args, top, training, validation, test, bars)
                for seed in range(args.seeds)
                for name in args.methods
            ]
            models = {name: build(name, top, seed=0) for name in args.methods}
            seconds = step_times(models, training)
            for run in runs:
                run.step_ms = 1e3 * seconds[run.name]
    if args.search:
        report.print_search(console, rows, {m.title: m.rate for m in METHODS.values()})
        return

    report.print_table(console, runs)
    seconds = time.perf_counter() - started
    command = shlex.join(["python", "docs/examples/finetune_minilm.py", *sys.argv[1:]])
    report.write_markdown(args.out / "results.md", runs, command, seconds)
    curves.draw(args.out / "finetune_minilm.png", runs, len(validation))
    console.print(f"{seconds:.0f} s. Table, learning curves and adapter are in {args.out}")


def cache(tokenizer, lower: nn.Module, split: Split, bars, name: str) -> Cached:
    """Run the frozen lower layers over a split, once for all methods."""
    task = bars.add_task(f"lower layers, {name}", total=len(split), note="")
    hidden = [torch.empty(0)] * len(split)
    for index, states in run_lower(tokenizer, lower, split.texts):
        for i, state in zip(index, states, strict=True):
            hidden[i] = state
        bars.advance(task, len(index))
    return Cached(hidden, torch.tensor(split.labels))


def accuracy(model: nn.Module, data: Cached) -> float:
    """Compute the share of correct answers."""
    return (predict(model, data) == data.labels).double().mean().item()


def finetune(name: str, seed: int, args, top, training, validation, test, bars) -> report.Run:
    """Train one method with one seed, and collect everything that is reported about it."""
    method = METHODS[name]
    peak = peak_memory(build(name, top, seed), training)
    model = build(name, top, seed)
    trained = {path: p.numel() for path, p in model.named_parameters() if p.requires_grad}
    head = sum(count for path, count in trained.items() if "head" in path.split("."))
    run = report.Run(name, method.title, seed, sum(trained.values()) - head, head, peak)

    task = bars.add_task(f"{method.title}, seed {seed}", note="")

    def each_step(step: int, steps: int, loss: float) -> None:
        run.losses.append(loss)
        if step * CURVE_POINTS // steps > (step - 1) * CURVE_POINTS // steps:
            run.curve.append((step, accuracy(model, validation)))
        note = f"loss {loss:.2f}"
        note += f", validation {100 * run.curve[-1][1]:.1f} %" if run.curve else ""
        bars.update(task, completed=step, total=steps, note=note)

    train(model, training, rate=method.rate, epochs=args.epochs, seed=seed, each_step=each_step)

    # The test split is used here only, and nothing is chosen by its results.
    answer = predict(model, test)
    run.correct = answer == test.labels
    if name == "boft":
        prove_reload(model, top, validation, args.out / "boft_adapter.safetensors", bars.console)
    if method.merge is not None:
        # The merged model consists of plain linear layers and must give the same answers.
        merged = predict(method.merge(model), test)
        run.merged_correct, run.merged_differ = merged == test.labels, int((merged != answer).sum())
    return run


def prove_reload(model: nn.Module, top: nn.Module, data: Cached, path: Path, console) -> None:
    """Save the adapter, load it into a fresh model, and count the answers that differ."""
    boft_ops.save_adapter(model, path)
    # The file names its layers and their options, so a plain model is enough.
    fresh = boft_ops.load_adapter(Classifier(top), path)
    differ = int((predict(fresh, data) != predict(model, data)).sum())
    console.print(
        f"Saved adapter and head ({path.stat().st_size / 1e3:.0f} kB), loaded into a fresh model: "
        f"{differ} of {len(data)} validation predictions differ."
    )


def search(args, top, training, validation, bars) -> list[tuple[str, float, float]]:
    """Measure (method, learning rate, validation accuracy) for every candidate rate."""
    rows = []
    for name in args.methods:
        for rate in METHODS[name].rates:
            task = bars.add_task(f"{METHODS[name].title}, rate {rate:g}", note="")

            def each_step(step: int, steps: int, loss: float, task=task) -> None:
                bars.update(task, completed=step, total=steps, note=f"loss {loss:.2f}")

            scores = []
            for seed in range(SEARCH_SEED, SEARCH_SEED + args.seeds):
                model = build(name, top, seed)
                train(
                    model, training, rate=rate, epochs=args.epochs, seed=seed, each_step=each_step
                )
                scores.append(accuracy(model, validation))
                bars.update(task, note=f"validation {100 * scores[-1]:.1f} %")
            rows.append((METHODS[name].title, rate, statistics.fmean(scores)))
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=1, metavar="N", help="number of runs of every method")
    add("--epochs", type=int, default=EPOCHS, help="passes over the training sentences")
    add("--train-size", type=int, default=TRAIN, help="number of training sentences")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to compare")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--data", type=Path, default=DATA_DIR, help="folder of the data of fetch_data.py")
    add("--out", type=Path, default=Path("build/demo"), help="folder of the results")
    add("--search", action="store_true", help="compare learning rates instead of methods")
    args = parser.parse_args()
    check_arguments(parser, args, ("seeds", "epochs", "train_size", "threads"))
    return args


if __name__ == "__main__":
    main()
