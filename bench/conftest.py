"""Options of the benchmarks, and the description of the machine in their results."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this file

import environment
import summary
from contestants import EXTRAS, Shape
from memory import settle_heap
from models import MODELS
from recording import RECORDS, expected_seconds
from results import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("boft_ops benchmarks")
    group.addoption("--rounds", type=int, default=60, help="largest number of rounds (60)")
    group.addoption(
        "--seconds",
        type=float,
        default=12.0,
        help="approximate time limit of a training step at a large shape (12); others take less",
    )
    group.addoption(
        "--shapes",
        type=lambda text: tuple(Shape.parse(part) for part in text.split(",")),
        help="shapes DxNxTOKENS, separated by commas (the shapes of the committed results)",
    )
    group.addoption("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    group.addoption("--dtype", choices=environment.DTYPES, default="fp32")
    group.addoption(
        "--extras", type=_extras, default=(), help=f"further contestants: {', '.join(EXTRAS)}"
    )
    group.addoption("--minutes", type=float, help="start no measurement after this many minutes")
    group.addoption(
        "--model", choices=MODELS, help="model of the training step (depends on the device)"
    )


def _extras(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if not set(names) <= set(EXTRAS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(EXTRAS)}, got {text!r}")
    return names


def pytest_configure(config: pytest.Config) -> None:
    # Markers are strict, and this one is pytest-timeout's, which the benchmarks do not require.
    config.addinivalue_line("markers", "timeout(seconds): time limit, for pytest-timeout")


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly or not session.items:
        return
    seconds = expected_seconds(session.items, config.getoption("seconds"))
    if minutes := config.getoption("minutes"):
        seconds = min(seconds, 60 * minutes)
    reporter.write_line(
        f"The benchmarks take about {max(1, round(seconds / 60))} min on an idle machine "
        f"(--seconds={config.getoption('seconds'):g}, --rounds={config.getoption('rounds')})."
    )


@pytest.hookimpl(trylast=True)  # after the tables of pytest-benchmark
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    records = config.stash.get(RECORDS, [])
    if not records or getattr(config.option, "benchmark_quiet", False):  # bench/run.py prints
        return
    machine: dict = {}
    pytest_benchmark_update_machine_info(config, machine)
    results = Results(
        {"machine_info": machine, "commit_info": {}, "datetime": "", "benchmarks": records}
    )
    terminalreporter.section("adapters, " + machine["cpu"])
    for line in summary.lines(results, shutil.get_terminal_size().columns):
        terminalreporter.write_line(line)


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
    # This replaces the plugin's own description, which contains the name of the machine.
    machine_info.clear()
    machine_info.update(environment.describe(config.getoption("device")))
    machine_info["dtype"] = config.getoption("dtype")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info.clear()
    commit_info.update(environment.commit())
