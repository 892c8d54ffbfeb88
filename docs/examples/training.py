"""The training loop, and what one of its steps costs in memory."""

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

BATCH_SIZE = 32
WARM_UP = 0.1  # share of the steps over which the learning rate rises; after it falls linearly


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # No weight decay: it would mean something else for each of the methods.
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple) -> float:
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
) -> None:
    """Train in place. `each_step` is called with (step, steps, loss)."""
    steps = epochs * -(-len(data) // BATCH_SIZE)
    warm = max(1, round(WARM_UP * steps))
    optimizer = make_optimizer(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    # A generator of its own: every method sees the same batches, whatever randomness it uses.
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
    """Seconds of one training step on sentences of middle length, for every model.

    The models take turns and the fastest round counts: a machine that is busy with something else
    slows down all of them alike, and hardly in every round. The models are changed.
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
    return {name: min(seconds[1:]) for name, seconds in times.items()}  # the first one warms up


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Keep the profiler's native log lines, which no setting turns off, out of the output."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_allocated(work: Callable[[], object]) -> int:
    """Peak of the bytes that torch's allocator hands out during `work`, above where it started."""
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
    """Bytes one training step over the longest sentences needs beyond the model and the data.

    Activations, gradients, scratch and the optimizer's state. It is counted, not sampled: the same
    in every run, and free of what earlier methods left behind in the process. `model` is changed.
    """
    longest = sorted(range(len(data)), key=data.lengths.__getitem__)[-BATCH_SIZE:]
    batch = data.batch(longest)
    optimizer = make_optimizer(model, 1e-4)
    model.train()
    train_step(model, optimizer, batch)  # the optimizer's state comes into being here
    state = [t for slots in optimizer.state.values() for t in slots.values() if torch.is_tensor(t)]
    during = peak_allocated(lambda: train_step(model, optimizer, batch))
    return during + sum(t.nbytes for t in state)
