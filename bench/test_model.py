"""Benchmark of a training step of a whole model, with PEFT's adapters and with this package's.

pytest bench/test_model.py --benchmark-only
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from interleave import Contestant, Durations, measure, ratios, summary, synchronizer
from memory import peak_bytes
from models import (
    LABELS,
    MODELS,
    base,
    build,
    default_model,
    group,
    label,
    text,
    training_step,
)
from recording import CLOCK, record

FIRST = next(iter(LABELS))


class Training:
    """The contestants' models over one set of weights, their times and their memory."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, config) -> None:
        self.name, self.left_out = name, []
        self.labels: dict[str, str] = {}
        self.trainable: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        steps = {}
        model, ids = base(name, device, dtype), text(name, device)
        for contestant in LABELS:
            try:
                adapted = build(contestant, model)
                step = training_step(adapted, ids)
                losses = [float(step()) for _ in range(2)]  # the first step also fills caches
                if not 0 < losses[0] < 20 or losses[1] == losses[0]:  # refuses NaN too
                    raise AssertionError(f"{contestant}: expected losses that move, got {losses}")
                self.peak[contestant] = peak_bytes(step, device)
            except torch.OutOfMemoryError:
                if contestant == FIRST:
                    raise
                self.left_out.append(contestant)
                continue
            self.labels[contestant] = label(contestant, adapted)
            trained = [p for p in adapted.parameters() if p.requires_grad]
            self.trainable[contestant] = sum(p.numel() for p in trained)
            steps[contestant] = step
        self.durations: Durations = measure(
            [Contestant(contestant, step) for contestant, step in steps.items()],
            rounds=config.getoption("rounds"),
            seconds=config.getoption("seconds"),
            synchronize=synchronizer(device),
        )


@pytest.fixture(scope="session")
def training(device: torch.device, dtype: torch.dtype, pytestconfig: pytest.Config):
    """Return a function that measures a model, once for all tests."""
    return cache(lambda name: Training(name, device, dtype, pytestconfig))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    # With --shapes, which asks for a quick look, no large model is measured.
    name = option("model") or ("tiny" if option("shapes") else default_model(option("device")))
    metafunc.parametrize(("model", "contestant"), [(name, c) for c in LABELS])


@pytest.mark.timeout(0)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_model(benchmark, training, pytestconfig, model: str, contestant: str) -> None:
    pytest.importorskip("transformers")
    run = training(model)
    if contestant in run.left_out:
        pytest.skip("out of memory")
    times = run.durations[contestant]
    ratio, low, high = summary(ratios(run.durations, contestant, FIRST))
    tokens = MODELS[model].tokens
    record(
        pytestconfig,
        benchmark,
        group(model),
        list(times.values()),
        suite="model",
        group=group(model),
        direction="training step",
        contestant=contestant,
        label=run.labels[contestant],
        note="",
        tokens=tokens,
        tokens_per_s=tokens / summary(list(times.values()))[0],
        ratio=ratio,
        ratio_q1=low,
        ratio_q3=high,
        peak_bytes=run.peak[contestant],
        trainable=run.trainable[contestant],
        threads=torch.get_num_threads(),
        rounds=sorted(times),
        **({"left_out": run.left_out} if run.left_out else {}),
    )
