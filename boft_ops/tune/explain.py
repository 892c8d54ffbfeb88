"""What the cost model says of a layer, as a table."""

from __future__ import annotations

import torch

from .._runtime.tuned import lookup
from .._runtime.tuned_file import read, shipped_file, user_file
from ..ops.stages import default_plan
from .cost import plans
from .machine import Machine, data_sheet


def show(
    rows: int, d: int, n: int, m: int, b: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Print a line for each plan of BOFT(m, b) on a layer of d inputs and n outputs."""
    machine, source = _machine(device)
    name = str(dtype).removeprefix("torch.")
    stages, weight_side = default_plan(m, b, device.type, rows, n)
    default, choice = (len(stages), weight_side), None
    if device.type == "cpu" or torch.cuda.is_available():
        choice = lookup("plan", device, dtype, (m, b), (rows, d, n))
    best = None  # a choice without stages is a problem on which the device was lost
    if choice and "stages" in choice.config:
        best = choice.config["stages"], bool(choice.config.get("weight_side"))
    print(
        f"BOFT({m}, {b}), {d} -> {n}, {rows} rows, {name} on {device.type}; rates {source}: "
        f"{machine.bytes / 1e9:.3g} GB/s, {machine.rate(name) / 1e12:.3g} TFLOP/s, "
        f"{1e6 * machine.launch:.3g} us a launch"
    )
    header = ("stages", "sizes", "side", "compose us", "forward us", "backward us", "total us", "")
    lines = [header]
    for cost in plans(rows, d, n, m, b, name, machine, device.type):
        count = len(cost.stages)
        this = count, cost.side == "weight"
        marks = ["default"] * (this == default) + ["measured best"] * (this == best)
        marks += ["chosen"] * (this == (best or default))
        times = (cost.make, cost.forward, cost.backward, cost.total)
        sizes = " ".join(str(stage.size) for stage in cost.stages)
        figures = (f"{1e6 * seconds:.1f}" for seconds in times)
        lines.append((str(count), sizes, cost.side, *figures, ", ".join(marks)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = (
            cell.ljust(w) if i in (1, 2, 7) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def _machine(device: torch.device) -> tuple[Machine, str]:
    """With the rates that a file has of this device, if there is one."""
    machine = data_sheet(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return machine, "of an H100's data sheet"
    for file in (user_file, shipped_file):
        try:
            content = read(file(device), device)
        except (ValueError, RuntimeError):
            continue
        if content and content["rates"]["bytes"]:
            rates = content["rates"]
            return machine._replace(bytes=rates["bytes"], flops=rates["flops"]), "measured"
    return machine, "assumed"
