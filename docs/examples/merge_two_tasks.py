#!/usr/bin/env python3
"""Finetune one encoder for two tasks, and merge the two adapters into one.

The tasks: is a movie-review snippet positive or negative (the demo's), and where does a sentence
come from: a movie review, a product review, an editorial or a tweet. Each task trains an adapter
of its own, with a head of its own, in the demo's way. Then one encoder has to serve both heads. It
is made of the two adapters in several ways, of which boft_ops.merge_adapters has two.

    python docs/examples/fetch_data.py                   # once
    python docs/examples/merge_two_tasks.py              # BOFT(2,8), three seeds
    python docs/examples/merge_two_tasks.py --methods boft oft

Results of five seeds are committed in docs/examples/merging.md.
"""

import argparse
import copy
import random
import shlex
import statistics
import sys
from pathlib import Path

import report
import torch
from fetch_data import DATA_DIR, FILES, check_arguments
from finetune_minilm import cache
from methods import METHODS, build
from minilm import Cached, Classifier, cut_in_two, load_minilm, predict
from rich.console import Console
from snippets import SPLIT_SEED, TEST, TRAIN, Split, make_splits, normal_form, read_snippets
from torch import nn
from training import train

import boft_ops

State = dict[str, torch.Tensor]
EPOCHS = 2
CLASSES = {"sentiment": 2, "source": len(FILES)}
OWN, PRETRAINED = "each task's own adapter", "pretrained encoder"
AVERAGED = "averaged changes of the weights"


# --- Two tasks ------------------------------------------------------------------------------------


def make_tasks(folder: Path, n_train: int, n_test: int) -> dict[str, tuple[Split, Split]]:
    """Make the training and test sentences of both tasks.

    No sentence is in more than one of the four splits: a test sentence was never trained on, with
    any label.
    """
    texts = {name: read_snippets(folder / name) for name in FILES}
    movies = next(iter(FILES))
    training, _, test = make_splits(texts[movies], train=n_train, validation=0, test=n_test)
    used = {normal_form(text) for split in (training, test) for text in split.texts}
    per_class = (n_train + n_test) // len(FILES)
    pairs = []
    for label, name in enumerate(FILES):
        # The threshold leaves out no rating here, because the source is known whatever it is.
        sentences = [text for text, _ in read_snippets(folder / name, threshold=-1.0)]
        own = sorted(text for text in sentences if normal_form(text) not in used)
        random.Random(SPLIT_SEED).shuffle(own)
        used.update(map(normal_form, own))
        pairs += [(text, label) for text in own[:per_class]]
    n_source = len(pairs) - n_test
    source_training, _, source_test = make_splits(pairs, n_source, validation=0, test=n_test)
    return {"sentiment": (training, test), "source": (source_training, source_test)}


def finetune(method: str, task: str, seed: int, top, data: Cached, epochs: int, bars) -> nn.Module:
    """Train the adapter and the head of one task."""
    model = build(method, top, seed, CLASSES[task])
    bar = bars.add_task(f"{METHODS[method].title}, {task}, seed {seed}", note="")

    def each_step(step: int, steps: int, loss: float) -> None:
        bars.update(bar, completed=step, total=steps, note=f"loss {loss:.2f}")

    train(model, data, rate=METHODS[method].rate, epochs=epochs, seed=seed, each_step=each_step)
    return model


# --- One encoder of two adapters ------------------------------------------------------------------


def plain(model: nn.Module) -> State:
    """Fold the adapter of a copy of the model into the weights of its encoder."""
    return boft_ops.merge(copy.deepcopy(model)).encoder.state_dict()


def mean(states: list[State]) -> State:
    """Average the tensors of several modules."""
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


def stretched(states: list[State], pretrained: State) -> State:
    """Add to each weight the mean of its changes, made as long as the changes are on average."""
    result = {}
    for name, start in pretrained.items():
        changes = [state[name] - start for state in states]
        change = sum(changes) / len(changes)
        length = sum(c.norm() for c in changes) / len(changes)
        result[name] = start + change * (length / change.norm() if length > 0 else 1.0)
    return result


def combine(models: list[nn.Module], top: nn.Module) -> dict[str, State]:
    """Make one encoder of the adapters of two models, in each of the ways to compare."""
    for model in models:
        model.head.requires_grad_(False)  # an adapter holds trained tensors alone
    folded = [plain(model) for model in models]
    by_numbers = copy.deepcopy(models[0])
    by_numbers.encoder.load_state_dict(mean([model.encoder.state_dict() for model in models]))
    ways = {
        PRETRAINED: top.state_dict(),
        AVERAGED: mean(folded),
        "the same, stretched": stretched(folded, top.state_dict()),
        "averaged skews and scales": plain(by_numbers),
    }
    for how in ("orthomerge", "karcher"):
        merged = boft_ops.merge_adapters(models, how=how)
        ways[f'merge_adapters(how="{how}")'] = plain(boft_ops.load_adapter(Classifier(top), merged))
    return ways


def right_answers(top: nn.Module, encoder: State, head: nn.Module, data: Cached) -> torch.Tensor:
    """Tell for each test sentence whether the encoder and the head classify it correctly."""
    model = Classifier(top, head.out_features)
    model.encoder.load_state_dict(encoder)
    model.head = head
    return (predict(model, data) == data.labels).double()


# --- Numbers --------------------------------------------------------------------------------------

# For each way and task: 1 for a right answer, else 0, as (seeds, test sentences).
Answers = dict[str, dict[str, torch.Tensor]]


def both_tasks(answers: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Compute the mean of both tasks' means, and its standard error.

    The error is that of the choice of test sentences and, with several seeds, of the training runs.
    Differences of two ways are treated as answers are, sentence by sentence and seed by seed.
    """
    per_task = answers.values()
    n = len(answers)
    variance = sum(report.standard_error(a.mean(0)) ** 2 for a in per_task) / n**2
    per_seed = torch.stack([a.mean(1) for a in per_task]).mean(0).tolist()
    if len(per_seed) > 1:
        variance += statistics.variance(per_seed) / len(per_seed)
    return statistics.fmean(per_seed), variance**0.5


def difference(answers: Answers, way: str, other: str) -> tuple[float, float]:
    """Compute how much better one way serves both tasks than another, and the standard error."""
    return both_tasks({task: a - answers[other][task] for task, a in answers[way].items()})


def table(answers: Answers) -> list[str]:
    """Format the lines of a Markdown table, in percent."""
    tasks = list(CLASSES)
    lines = [f"| one encoder for both | {' | '.join(tasks)} | both | against {AVERAGED} |"]
    lines.append("| --- |" + " ---: |" * (len(tasks) + 2))
    for way, by_task in answers.items():
        cells = [f"{100 * by_task[task].mean():.1f}" for task in tasks]
        value, error = both_tasks(by_task)
        cells.append(f"{100 * value:.1f} ± {100 * error:.1f}")
        value, error = difference(answers, way, AVERAGED)
        cells.append("-" if way == AVERAGED else f"{100 * value:+.2f} ± {100 * error:.2f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def verdicts(answers: Answers) -> list[str]:
    """State which of the differences to the averaged changes are larger than their errors."""
    lines = []
    for way in list(answers)[-2:]:
        for other in (AVERAGED, "the same, stretched", "averaged skews and scales"):
            value, error = difference(answers, way, other)
            carried = "carried" if abs(value) > report.CARRIES * error else "not carried"
            name = f"{AVERAGED}, stretched" if other == "the same, stretched" else other
            text = f"{way} over {name}: {100 * value:+.2f} ± {100 * error:.2f}, {carried}"
            lines.append(text)
    return lines


# --- The command ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    console = Console()
    tokenizer, bert = load_minilm()
    lower, top = cut_in_two(bert)
    tasks = make_tasks(args.data, args.train_size, args.test_size)
    command = shlex.join(["python", "docs/examples/merge_two_tasks.py", *sys.argv[1:]])
    text = ["# Two adapters merged into one", "", *report.provenance(command)]
    text += [f"- Seeds: {args.seeds}"]
    with report.progress(console) as bars:
        data = {
            task: [cache(tokenizer, lower, split, bars, task) for split in splits]
            for task, splits in tasks.items()
        }
        for method in args.methods:
            answers = compare(method, args, top, data, bars)
            text += ["", f"## {METHODS[method].title}", "", *table(answers), ""]
            text += [f"- {line}." for line in verdicts(answers)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "merging.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    console.print("\n".join(text), highlight=False)


def compare(method: str, args, top, data, bars) -> Answers:
    """Finetune, merge and measure with one method, for each seed."""
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    for seed in range(args.seeds):
        models = {
            task: finetune(method, task, seed, top, training, args.epochs, bars)
            for task, (training, _) in data.items()
        }
        own = {task: plain(model) for task, model in models.items()}
        ways = {OWN: own} | {
            way: dict.fromkeys(models, encoder)
            for way, encoder in combine(list(models.values()), top).items()
        }
        for way, encoders in ways.items():
            for task, model in models.items():
                answer = right_answers(top, encoders[task], model.head, data[task][1])
                found.setdefault(way, {}).setdefault(task, []).append(answer)
    return {
        way: {task: torch.stack(rows) for task, rows in by_task.items()}
        for way, by_task in found.items()
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    rotations = ("boft", "oft")
    add("--methods", nargs="+", choices=rotations, default=["boft"], help="methods of the demo")
    add("--seeds", type=int, default=3, metavar="N", help="number of runs of every method")
    add("--epochs", type=int, default=EPOCHS, help="passes over the training sentences")
    add("--train-size", type=int, default=TRAIN, help="training sentences of a task")
    add("--test-size", type=int, default=TEST, help="test sentences of a task")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--data", type=Path, default=DATA_DIR, help="folder of the data of fetch_data.py")
    add("--out", type=Path, default=Path("build/merging"), help="folder of the results")
    args = parser.parse_args(arguments)
    check_arguments(parser, args, ("seeds", "epochs", "train_size", "test_size", "threads"), FILES)
    return args


if __name__ == "__main__":
    main()
