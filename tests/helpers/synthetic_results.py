"""Synthetic results of the benchmarks, in the form that pytest-benchmark writes."""

from pathlib import Path

import torch
from bench_modules import contestants, operators, page, results, sizes, store

FLOOR, LORA, PEFT_BOFT = contestants.FLOOR, contestants.LORA, contestants.PEFT_BOFT
SHAPES, BOTH = contestants.SHAPES, operators.BOTH
CPU = torch.device("cpu")

NOISE = 0.010, 0.020, 0.012  # seconds of the first contestant of each group, by round
# Overheads that meet every goal. Each is one number, or a list with a number for each round.
OVERHEADS = {
    FLOOR: 0.0,
    LORA: 0.1,
    "peft-oft": 0.2,
    "peft-oft-exact": 0.2,
    "peft-oft-32": 0.2,
    PEFT_BOFT: 30.0,
    **dict.fromkeys(contestants.RIVALS, 1.5),
    "oft-8": 0.05,
    "oft-32": 0.05,
    "boft-1-16": 0.05,
    "boft-2-8": 0.04,
    "boft-4-4": 0.09,
    "boft-dense": 0.09,
}
OPS = {
    (sizes.CPU.product, "forward"): {"mm": 10.0},
    (sizes.CPU.cayley, "forward"): {"solve": 1.0, "cayley": 1 / 11},
    (sizes.CPU.cayley, "backward"): {"solve": 1.0, "cayley": 1 / 11},
    (sizes.CPU.rotation, "forward"): {"clone": 1.0, "rotate-2-8": 1.4},
    (sizes.CPU.rotation, "backward"): {"clone": 1.0, "rotate-2-8": 2.4},
    (sizes.CPU.linear, "forward"): {"f-linear": 1.0, "boft-linear": 0.9},
}


def benchmark(suite, group, direction, name, ratios, more):
    """Make pytest-benchmark's entry for one contestant."""
    ratios = ratios if isinstance(ratios, list) else [ratios] * 3
    data = [second * ratio for second, ratio in zip(NOISE, ratios, strict=True)]
    low, middle, high = sorted(ratios)
    info = {"suite": suite, "group": group, "contestant": name, "label": f"<{name}>", "note": ""}
    info |= {"direction": direction, "rounds": [0, 1, 2], "threads": 2, "overhead": middle - 1}
    info |= {"ratio": middle, "ratio_q1": low, "ratio_q3": high} | more
    q1, median, q3 = sorted(data)
    return {
        "extra_info": info,
        "stats": {"data": data, "median": median, "q1": q1, "q3": q3},
    }


def synthetic(backend="auto", ops=None, **overheads):
    """Make a result in which contestants take 1 + overhead times as long as the frozen layer."""
    benchmarks = []
    overheads = OVERHEADS | {name.replace("_", "-"): value for name, value in overheads.items()}
    for shape in SHAPES:
        more = dict.fromkeys(("saved_bytes", "peak_bytes", "adapter_bytes", "trainable"), 4096)
        more |= shape._asdict()
        for direction in ("forward", BOTH):
            for name in contestants.names(shape):
                value = overheads[name]
                ratios = [1 + v for v in value] if isinstance(value, list) else 1 + value
                benchmarks.append(benchmark("layer", str(shape), direction, name, ratios, more))
    for (group, direction), members in OPS.items():
        for name, ratio in members.items():
            more = operators.work(group, direction, name, CPU, torch.float32)._asdict()
            ratio = (ops or {}).get((direction, name), ratio)
            benchmarks.append(benchmark("ops", group, direction, name, ratio, more))
    machine = {"device": "cpu", "cpu": "Some CPU", "threads": 2, "dtype": "fp32", "torch": "2.13"}
    machine |= {"backend": backend, "peft": "0.21", "boft_ops": "0.1", "python": "3.12"}
    machine |= {"triton": None, "serving": {"cayley": "cpu", "rotate": "reference"}}
    return {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": benchmarks,
    }


def without(content, leave_out):
    """Copy a result without the benchmarks for which ``leave_out(info)`` is true."""
    kept = [b for b in content["benchmarks"] if not leave_out(b["extra_info"])]
    return content | {"benchmarks": kept}


def machine(*runs, decided=()):
    """Make the machine of some results or contents of results; the first one names it."""
    runs = [results.Results(run) if isinstance(run, dict) else run for run in runs]
    facts = runs[0].machine
    name = facts["device"] if facts["device"] != "cpu" else facts["cpu"]
    return store.Machine(name, facts["device"], Path(), runs, list(decided))


def measurements(*runs):
    """Write the section of all measurements of a page, each run on a machine of its own."""
    return "\n".join(page.results([machine(run) for run in runs]))
