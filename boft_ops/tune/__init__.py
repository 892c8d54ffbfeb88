"""Measures which backend, tile and plan is fastest on this machine (docs/tuning.md).

``python -m boft_ops.tune``. Only the command line imports anything of it.
"""
