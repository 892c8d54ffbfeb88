"""Single operators: the Cayley transform against a batched solve, the rotation against a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from interleave import Contestant, Durations, ReplayClock, measure, ratios, summary, synchronizer

from boft_ops import butterfly_matmul, cayley

CLOCK = ReplayClock()
N_BLOCKS, BLOCK = 4096, 8
TOKENS, FEATURES = 1024, 2048
CAYLEY = f"cayley, {N_BLOCKS} blocks {BLOCK}x{BLOCK}"
ROTATION = f"rotation, {TOKENS} rows of {FEATURES}"
ROTATIONS = {f"rotate-{m}-{b}": (m, b) for m, b in ((1, 16), (2, 8), (4, 4))}
# the first of each is the floor
MEMBERS = {
    (CAYLEY, "forward"): ("solve", "cayley"),
    (CAYLEY, "forward+backward"): ("solve", "cayley"),
    (ROTATION, "forward"): ("clone", *ROTATIONS),
    (ROTATION, "backward"): ("clone", *ROTATIONS),
}
LABELS = {
    "solve": "torch.linalg.solve",
    "cayley": "cayley",
    "clone": "x.clone()",
    **{name: f"butterfly_matmul ({m},{b})" for name, (m, b) in ROTATIONS.items()},
}


def solve(skew: torch.Tensor) -> torch.Tensor:
    """The Cayley transform by autograd through torch.linalg."""
    i, j = torch.triu_indices(BLOCK, BLOCK, 1, device=skew.device)
    upper = skew.new_zeros(len(skew), BLOCK, BLOCK)
    upper[:, i, j] = skew
    q = upper - upper.mT
    eye = torch.eye(BLOCK, dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - q, eye + q)


def cayley_contest(direction: str, device: torch.device) -> list[Contestant]:
    # float32 in every run: batched solvers know no bfloat16
    torch.manual_seed(0)
    skew = (0.1 * torch.randn(N_BLOCKS, BLOCK * (BLOCK - 1) // 2)).to(device).requires_grad_(True)
    grad = torch.randn(N_BLOCKS, BLOCK, BLOCK).to(device)
    if not torch.allclose(cayley(skew), solve(skew), atol=1e-5):
        raise AssertionError("cayley: expected what torch.linalg.solve gives")

    def run(function: Callable) -> Callable[[], object]:
        if direction == "forward":
            return lambda: function(skew)
        return lambda: torch.autograd.grad(function(skew), skew, grad)

    return [Contestant("solve", run(solve)), Contestant("cayley", run(cayley))]


def rotation_contest(direction: str, device: torch.device, dtype: torch.dtype) -> list[Contestant]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, FEATURES).to(device, dtype).requires_grad_(True)
    grad = torch.randn(TOKENS, FEATURES).to(device, dtype)
    source = x.detach()
    contestants = [Contestant("clone", lambda: source.clone())]
    for name, (m, b) in ROTATIONS.items():
        skew = 0.1 * torch.randn(m, FEATURES // b, b * (b - 1) // 2)
        blocks = cayley(skew.to(device)).requires_grad_(True)
        contestants.append(Contestant(name, _rotation(direction, x, blocks, grad)))
    return contestants


def _rotation(
    direction: str, x: torch.Tensor, blocks: torch.Tensor, grad: torch.Tensor
) -> Callable[[], object]:
    if direction == "forward":
        return lambda: butterfly_matmul(x, blocks)
    y = butterfly_matmul(x, blocks)
    return lambda: torch.autograd.grad(y, (x, blocks), grad, retain_graph=True)


@pytest.fixture(scope="session")
def op_durations(device: torch.device, dtype: torch.dtype, pytestconfig: pytest.Config):
    @cache
    def get(group: str, direction: str) -> Durations:
        if group == CAYLEY:
            contestants = cayley_contest(direction, device)
        else:
            contestants = rotation_contest(direction, device, dtype)
        return measure(
            contestants,
            rounds=pytestconfig.getoption("rounds"),
            seconds=pytestconfig.getoption("seconds") / 10,
            synchronize=synchronizer(device),
        )

    return get


@pytest.mark.timeout(0)
@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(
    ("group", "direction", "name"),
    [(*key, name) for key, names in MEMBERS.items() for name in names],
)
def test_op(benchmark, op_durations, dtype, group: str, direction: str, name: str) -> None:
    durations = op_durations(group, direction)
    ratio, low, high = summary(ratios(durations, name, MEMBERS[group, direction][0]))
    info = {
        "suite": "ops",
        "group": group,
        "direction": direction,
        "contestant": name,
        "label": LABELS[name],
        "note": "",
        "ratio": ratio,
        "ratio_q1": low,
        "ratio_q3": high,
        "overhead": ratio - 1,
        "threads": torch.get_num_threads(),
        "rounds": sorted(durations[name]),
    }
    if group == ROTATION:
        # x in and out; backward: x and the gradient in, the gradient of x out
        arrays = 3 if direction == "backward" and name != "clone" else 2
        info["bytes"] = arrays * TOKENS * FEATURES * dtype.itemsize
    benchmark.group = f"{group}, {direction}"
    benchmark.extra_info.update(info)
    CLOCK.replay(benchmark, list(durations[name].values()))
