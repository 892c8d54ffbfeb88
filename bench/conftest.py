"""Options of the benchmarks, and what their results say about the machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

import environment
from contestants import EXTRAS, Shape
from memory import settle_heap
from models import MODELS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("boft_ops benchmarks")
    group.addoption("--rounds", type=int, default=60, help="at most so many rounds (60)")
    group.addoption(
        "--seconds",
        type=float,
        default=45.0,
        help="time for each shape and direction, at most about (45)",
    )
    group.addoption(
        "--shapes",
        type=lambda text: tuple(Shape.parse(part) for part in text.split(",")),
        help="DxNxTOKENS, comma-separated (those of the comparison)",
    )
    group.addoption("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    group.addoption("--dtype", choices=environment.DTYPES, default="fp32")
    group.addoption("--extras", type=_extras, default=(), help=f"also {', '.join(EXTRAS)}")
    group.addoption("--minutes", type=float, help="start no measurement after so many")
    group.addoption("--model", choices=MODELS, help="of the training step (by device)")


def _extras(text: str) -> tuple[str, ...]:
    found = tuple(filter(None, text.split(",")))
    if not set(found) <= set(EXTRAS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(EXTRAS)}, got {text!r}")
    return found


def pytest_configure(config: pytest.Config) -> None:
    # pytest-timeout's: it is no requirement of the benchmarks, and markers are strict
    config.addinivalue_line("markers", "timeout(seconds): where pytest-timeout is installed")


@pytest.fixture(scope="session")
def started() -> float:
    return time.monotonic()


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest, started: float) -> None:
    minutes = request.config.getoption("minutes")
    if minutes is not None and time.monotonic() - started > 60 * minutes:
        pytest.skip(f"--minutes={minutes:g} are over")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.config.getoption("device")


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return environment.DTYPES[request.config.getoption("dtype")]


@pytest.fixture(scope="session", autouse=True)
def _settled_heap() -> None:
    settle_heap()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    # in place of the plugin's own, which has the name of the machine
    machine_info.clear()
    machine_info.update(environment.describe(config.getoption("device")))
    machine_info["dtype"] = config.getoption("dtype")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info.clear()
    commit_info.update(environment.commit())
