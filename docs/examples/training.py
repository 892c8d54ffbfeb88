"""The training loop of the demo, and the time and memory of one of its steps."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from minilm import Cached, shuffled
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import boft_ops

BATCH_SIZE = 32
WARM_UP = 0.1  # share of the steps in which the learning rate rises; then it falls linearly


def make_optimizer(model: nn.Module, rate: float, scaled: bool = True) -> torch.optim.Optimizer:
    """Make AdamW for the trainable parameters; `scaled` gives each skew its own rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if scaled and any(isinstance(module, boft_ops.BOFTLinear) for module in model.modules()):
        # One rate serves OFT and BOFT: a step changes every rotation equally.
        trained = boft_ops.param_groups(model, lr=rate)
    # There is no weight decay, because it would have a different meaning for each method.
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple) -> float:
    """Run one training step; returns the loss."""
    hidden, mask, labels = batch
    loss = F.cross_entropy(model(hidden, mask), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(
    model: nn.Module,
    data: Cached,
    *,
    rate: float,
    epochs: int,
    seed: int,
    each_step: Callable[[int, int, float], None],
    scaled: bool = True,
) -> None:
    """Train a model in place. `each_step` is called with (step, steps, loss).

    With `scaled=False` the skews train at `rate` itself, not at that of boft_ops.param_groups.
    """
    steps = epochs * -(-len(data) // BATCH_SIZE)
    warm = max(1, round(WARM_UP * steps))
    optimizer = make_optimizer(model, rate, scaled)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    # The batches have their own generator, so that they are the same for every method.
    order = torch.Generator().manual_seed(seed)
    step = 0
    model.train()
    for _ in range(epochs):
        for index in shuffled(data.lengths, BATCH_SIZE, order):
            loss = train_step(model, optimizer, data.batch(index))
            schedule.step()
            step += 1
            each_step(step, steps, loss)


def step_times(models: dict[str, nn.Module], data: Cached, rounds: int = 10) -> dict[str, float]:
    """Measure the seconds of one training step on sentences of medium length, for every model.

    The steps of the models are interleaved, so that other load of the machine affects all of them
    alike. The fastest round counts, because other load rarely affects every round. The models are
    changed.
    """
    order = sorted(range(len(data)), key=data.lengths.__getitem__)
    start = max(0, (len(order) - BATCH_SIZE) // 2)
    batch = data.batch(order[start : start + BATCH_SIZE])
    optimizers = {name: make_optimizer(model.train(), 1e-4) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            train_step(model, optimizers[name], batch)
            times[name].append(time.perf_counter() - started)
    # The first round is a warm-up.
    return {name: min(seconds[1:]) for name, seconds in times.items()}


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Hide the profiler's native log lines, which no setting turns off."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_allocated(work: Callable[[], object]) -> int:
    """Measure the peak of the bytes that torch allocates during `work`, above the start value."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with no_stderr():
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                work()
            profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def peak_memory(model: nn.Module, data: Cached) -> int:
    """Count the bytes of one training step on the longest sentences, beyond model and data.

    They are those of activations, gradients, scratch memory and the optimizer's state. All
    allocations are counted, so the result is the same in every run and does not depend on earlier
    methods in the process. `model` is changed.
    """
    longest = sorted(range(len(data)), key=data.lengths.__getitem__)[-BATCH_SIZE:]
    batch = data.batch(longest)
    optimizer = make_optimizer(model, 1e-4)
    model.train()
    train_step(model, optimizer, batch)  # makes the state of the optimizer
    state = [t for slots in optimizer.state.values() for t in slots.values() if torch.is_tensor(t)]
    during = peak_allocated(lambda: train_step(model, optimizer, batch))
    return during + sum(t.nbytes for t in state)
