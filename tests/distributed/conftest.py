"""Tests with the marker ``processes(n)`` run their bodies on n ranks, instead of in pytest."""

import inspect

import pytest
from processes import Processes


@pytest.fixture(scope="session", autouse=True)  # nothing is started yet
def processes():
    """The pool of processes: ``processes.run(n, function, **kwargs)``."""
    pool = Processes()
    yield pool
    pool.stop()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Let one worker of xdist run all of these tests, so that the processes start once."""
    for item in items:
        if "processes" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Send the body of a test, with its parameters and fixtures, to its ranks."""
    marker = pyfuncitem.get_closest_marker("processes")
    if marker is None:
        return None
    function, values = pyfuncitem.function, pyfuncitem.funcargs
    arguments = {name: values[name] for name in inspect.signature(function).parameters}
    values["processes"].run(*marker.args, function, **arguments)
    return True
