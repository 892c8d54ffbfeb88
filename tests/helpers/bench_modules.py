"""The modules of bench/, which import each other as top-level modules."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
try:
    import chart
    import contestants
    import correctness
    import definitions
    import device_time
    import figures
    import goals
    import gpu_decide
    import gpu_operators
    import host
    import indexed
    import interleave
    import layer_operators
    import machines
    import memory
    import models
    import operators
    import page
    import peers
    import peft_model
    import prices
    import recording
    import results
    import run
    import sections
    import sizes
    import store
    import summary
    import test_layer
    from decide import contest as decide_contest
    from decide import cublas as decide_cublas
    from decide import errors as decide_errors
    from decide import kernels as decide_kernels
    from decide import lines as decide_lines
    from decide import page as decide_page
    from decide import verdicts as decide_verdicts
finally:
    sys.path.remove(str(BENCH))

__all__ = [
    "BENCH",
    "chart",
    "contestants",
    "correctness",
    "decide_contest",
    "decide_cublas",
    "decide_errors",
    "decide_kernels",
    "decide_lines",
    "decide_page",
    "decide_verdicts",
    "definitions",
    "device_time",
    "figures",
    "goals",
    "gpu_decide",
    "gpu_operators",
    "host",
    "indexed",
    "interleave",
    "layer_operators",
    "machines",
    "memory",
    "models",
    "operators",
    "page",
    "peers",
    "peft_model",
    "prices",
    "recording",
    "results",
    "run",
    "sections",
    "sizes",
    "store",
    "summary",
    "test_layer",
]
