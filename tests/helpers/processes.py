"""A pool of processes, joined by gloo, that run the bodies of tests in tests/distributed/."""

from __future__ import annotations

import datetime
import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS = 120  # after which a call is given up
GRACE = 5  # seconds that the other ranks get once one has failed, as they may wait for it


class Processes:
    """Processes that are started when they are first needed, and then serve all tests.

    Every call makes a process group of its own. After one that hung the processes start anew.
    """

    def __init__(self) -> None:
        self._workers: list[tuple] = []  # (process, connection) by rank

    def run(self, n: int, function: Callable, **kwargs) -> list:
        """Call a function on ranks 0 to n - 1, in a gloo group of n, and return its results.

        Args:
            n: number of ranks.
            function: defined at the top of a file that can be imported anew: its path and name are
                what is sent.
            **kwargs: of the function, the same for all ranks; they are pickled, as are the results.

        Raises:
            AssertionError: the function raised on some rank; the message has the tracebacks.
        """
        self._start(n)
        with tempfile.TemporaryDirectory() as folder:
            task = (inspect.getfile(function), function.__qualname__, kwargs, n, f"{folder}/store")
            message = pickle.dumps(task)
            for _, connection in self._workers[:n]:
                connection.send_bytes(message)
            results = self._results(n)
        failed = {rank: text for rank, (ok, text) in results.items() if not ok}
        if failed or len(results) < n:
            missing = sorted(set(range(n)) - results.keys())
            if missing or "the process ended" in failed.values():
                self.stop()  # the next call starts others
            texts = [f"rank {rank} of {n}:\n{text}" for rank, text in sorted(failed.items())]
            texts += [f"rank {rank} of {n}: no answer" for rank in missing]
            raise AssertionError("\n".join(texts))
        return [results[rank][1] for rank in range(n)]

    def _start(self, n: int) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(len(self._workers), n):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def _results(self, n: int) -> dict[int, tuple]:
        results: dict[int, tuple] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:n])}
        deadline = time.monotonic() + SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in multiprocessing.connection.wait(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    results[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    results[rank] = False, "the process ended"
                if not results[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results

    def stop(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


def serve(connection: multiprocessing.connection.Connection, rank: int) -> None:
    """Run in a process of the pool: answer calls until the connection is closed."""
    import torch

    torch.set_num_threads(1)
    modules: dict[str, object] = {}
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, _call(modules, rank, *pickle.loads(message))))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _call(
    modules: dict[str, object], rank: int, path: str, name: str, kwargs: dict, n: int, store: str
) -> object:
    import torch
    import torch.distributed as dist

    if path not in modules:
        spec = importlib.util.spec_from_file_location(f"in_processes_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules[path] = module
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, n),
        rank=rank,
        world_size=n,
        timeout=datetime.timedelta(seconds=SECONDS // 4),
    )
    try:
        return getattr(modules[path], name)(**kwargs)
    finally:
        dist.destroy_process_group()
