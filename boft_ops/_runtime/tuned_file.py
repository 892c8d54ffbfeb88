"""The files of measured choices: one JSON a device, read with suspicion, replaced in one step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import files, native
from .device import name_of, slug, versions

FORMAT = 2
# One measurement: op, dtype, structure, sizes, backend, config, and what was seen (docs/tuning.md).
Row = dict[str, Any]
Check = Callable[[Row, str], None]


def file_of(device: torch.device) -> Path:
    """The file of what was measured on a device."""
    return native.cache_folder() / "tuned" / f"{slug(name_of(device))}.json"


def read(path: Path, device: torch.device, check: Check) -> list[Row]:
    """The rows of a file; none if there is no file.

    Args:
        path: the file.
        device: the device that it has to be of, with the versions of the software in use.
        check: raises ValueError for a row, given with the device's type, that is impossible.

    Raises:
        ValueError: the file is of another device, of other software, or spoiled.
    """
    try:
        content = json.loads(path.read_text())
        for name, expected in _head(device).items():
            if content[name] != expected:
                raise ValueError(f"{name}: expected {expected!r}, got {content[name]!r}")
        for row in content["choices"]:
            names = row["op"], row["dtype"], row["backend"]
            parts = (row["structure"], 1), (row["sizes"], 1), (row["config"], 0)
            numbers = [(number, least) for part, least in parts for number in part.values()]
            are_counts = (type(n) is int and least <= n < 1 << 31 for n, least in numbers)
            if not all(type(name) is str for name in names) or not all(are_counts):
                raise ValueError(f"not a choice: {row}")
            check(row, device.type)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from None
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a table of tuned choices: {error!r}") from None
    return content["choices"]


def _head(device: torch.device) -> Row:
    return {"format": FORMAT, "device": name_of(device), "versions": versions(device)}


def key_of(row: Row) -> tuple:
    """The problem that a row answers: of two rows with equal keys the later one counts."""
    return row["op"], row["dtype"], *row["structure"].items(), *row["sizes"].items()


def update(path: Path, device: torch.device, rows: Sequence[Row], check: Check) -> None:
    """Merge rows into the file: under its lock, and in one step for whoever reads it.

    A file of another device or of other software is replaced.
    """
    with _locked(path):
        try:
            old = read(path, device, check)
        except ValueError:
            old = []
        merged = {key_of(row): row for row in (*old, *rows)}
        # a line for each choice, so that the difference of two files can be read
        lines = ",\n".join(f"    {json.dumps(row)}" for row in merged.values())
        head = json.dumps(_head(device), indent=2).removesuffix("\n}")
        files.write_whole(path, f'{head},\n  "choices": [\n{lines}\n  ]\n}}\n'.encode())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, one process at a time; makes its folder.

    Without locks (Windows, some network file systems) replacing in one step is all the safety.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        except (ImportError, OSError):
            pass
        yield
