"""Benchmark of single operators.

    pytest bench/ --benchmark-only

The Cayley transform is compared with a batched solve, the rotation with a copy, and the fused layer
with a plain matrix product.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from environment import DTYPES
from interleave import Durations, measure, ratios, summary, synchronizer
from operators import contest, label, members, work
from recording import CLOCK, record
from sizes import sizes_on


@pytest.fixture(scope="session")
def op_durations(device: torch.device, dtype: torch.dtype, pytestconfig: pytest.Config):
    """Return a function that measures a group and direction, once for all tests."""

    @cache
    def get(group: str, direction: str) -> Durations:
        return measure(
            contest(group, direction, device, dtype),
            rounds=pytestconfig.getoption("rounds"),
            seconds=pytestconfig.getoption("seconds") / 10,
            synchronize=synchronizer(device),
            calls=sizes_on(device.type).calls,
        )

    return get


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    groups = members(option("device"), DTYPES[option("dtype")])
    cases = [(*key, name, names[0]) for key, names in groups.items() for name in names]
    metafunc.parametrize(("group", "direction", "name", "first"), cases)


@pytest.mark.timeout(0)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_op(
    benchmark,
    op_durations,
    device,
    dtype,
    pytestconfig,
    group: str,
    direction: str,
    name: str,
    first: str,
) -> None:
    durations = op_durations(group, direction)
    ratio, low, high = summary(ratios(durations, name, first))
    info = {
        "suite": "ops",
        "group": group,
        "direction": direction,
        "contestant": name,
        "label": label(name, device),
        "note": "",
        "ratio": ratio,
        "ratio_q1": low,
        "ratio_q3": high,
        "overhead": ratio - 1,
        "threads": torch.get_num_threads(),
        "rounds": sorted(durations[name]),
        **work(group, direction, name, device, dtype)._asdict(),
    }
    times = list(durations[name].values())
    record(pytestconfig, benchmark, f"{group}, {direction}", times, **info)
