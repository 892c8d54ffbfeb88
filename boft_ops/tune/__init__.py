"""Measures which backend, tile, number of stages and blocking is fastest here (docs/tuning.md).

``python -m boft_ops.tune``. Nothing of it is imported by the package itself, unless
BOFT_OPS_AUTOTUNE=1 asks for it.
"""
