"""The files of tuned choices: one JSON per device, read with suspicion, replaced in one step."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import native, paths
from .device import devices_of, name_of, slug, versions
from .shape_class import CLASSES

FORMAT = 1
Row = dict[str, Any]  # a choice as the file has it (docs/tuning.md)


def user_file(device: torch.device) -> Path:
    """Where this machine's own measurements are kept."""
    return native.cache_folder() / "tuned" / f"{slug(name_of(device))}.json"


def shipped_file(device: torch.device) -> Path:
    return paths.HERE / "configs" / f"{slug(name_of(device))}.json"


def read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The content of a file; None if there is none.

    Raises:
        ValueError: it is not to be used on this device with this software, or is no such file.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        if content["device"] != name_of(device):
            raise ValueError(f"measured on {content['device']}, this is {name_of(device)}")
        if content["versions"] != versions(device):
            raise ValueError(f"measured with {content['versions']}, this is {versions(device)}")
        for row in content["choices"]:
            _check(row, device)
        _check_rates(content["rates"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from None
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a table of tuned choices: {error!r}") from None
    return content


def _check(row: Row, device: torch.device) -> None:
    config = {k: v for k, v in row["config"].items() if (k, v) != ("weight_side", 0)}
    numbers = [*row["structure"].values(), *row["sizes"].values(), *config.values()]
    op, _, backend = names = row["op"], row["dtype"], row["backend"]
    if not all(_is_number(n) for n in numbers) or not all(type(n) is str for n in names):
        raise ValueError(f"not a choice: {row}")
    classes = CLASSES.get(op)
    if classes is None:
        raise ValueError(f"unknown operator {op}")
    if (*row["structure"], *row["sizes"]) != classes.structure + classes.sizes:
        raise ValueError(f"not a shape class of {op}: {row}")
    if backend not in ("", "reference") and device.type not in devices_of(backend):
        raise ValueError(f"no backend of {device.type}: {row}")
    if op == "plan":
        stages = min(config.get("stages", 1), row["structure"]["n_factors"])
        if config not in ({}, {"stages": stages}, {"stages": 1, "weight_side": 1}):
            raise ValueError(f"not a plan of so many factors: {row}")
    if backend == "triton":
        from ..triton_kernels.config import fields_of

        if unknown := config.keys() - fields_of(op):
            raise ValueError(f"{op}: its tiles have no {', '.join(sorted(unknown))}")
        if any(n & (n - 1) for name, n in config.items() if name != "num_stages"):
            raise ValueError(f"not a tile, of powers of two: {row}")


def _is_number(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 63


def _check_rates(rates: Row) -> None:
    found = [*rates["flops"].values()]
    if rates["bytes"] is not None:  # measured, and not only made room for
        found += rates["bytes"], rates["flops"]["float32"]
    if not all(type(rate) in (int, float) and 0 < rate < math.inf for rate in found):
        raise ValueError(f"not the rates of a machine: {rates}")


def key_of(row: Row) -> tuple:
    """What a row is about: two with equal keys are the same measurement."""
    return row["op"], row["dtype"], *row["structure"].items(), *row["sizes"].items()


def update(path: Path, device: torch.device, rows: Sequence[Row], rates: Row | None = None) -> None:
    """Merge rows into the file: under its lock, and in one step for whoever reads it.

    A file that is not to be used on this device with this software is replaced.
    """
    with locked(path):
        try:
            content = read(path, device)
        except ValueError:
            content = None
        old = content or {"rates": {"bytes": None, "flops": {}}, "choices": []}
        merged = {key_of(row): row for row in (*old["choices"], *rows)}
        if rates is not None:
            flops = {**old["rates"]["flops"], **rates["flops"]}
            old["rates"] = {"bytes": rates["bytes"], "flops": flops}
        content = {
            "format": FORMAT,
            "device": name_of(device),
            "versions": versions(device),
            "rates": old["rates"],
            "choices": list(merged.values()),
        }
        replace(path, _text(content))


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, whole."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, waiting for it; one process at a time. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows: replacing in one step is all the safety there is
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _text(content: Row) -> str:
    """JSON with a line for each choice, so that a difference of two files can be read."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in content["choices"])
    head = json.dumps({k: v for k, v in content.items() if k != "choices"}, indent=2)
    return head.removesuffix("\n}") + f',\n  "choices": [\n{rows}\n  ]\n}}\n'
