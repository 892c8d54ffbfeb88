"""The modules of bench/, which import each other as top-level modules."""

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
try:
    import chart
    import contestants
    import correctness
    import goals
    import gpu_operators
    import gpu_report
    import host
    import indexed
    import interleave
    import layer_operators
    import memory
    import models
    import operators
    import page
    import peers
    import peft_model
    import results
    import run
    import sizes
    import test_layer
finally:
    sys.path.remove(str(BENCH))

__all__ = [
    "BENCH",
    "chart",
    "contestants",
    "correctness",
    "goals",
    "gpu_operators",
    "gpu_report",
    "host",
    "indexed",
    "interleave",
    "layer_operators",
    "memory",
    "models",
    "operators",
    "page",
    "peers",
    "peft_model",
    "results",
    "run",
    "sizes",
    "test_layer",
]
