"""Largest sizes that kernels take. The C++ headers and triton/ state the same numbers: a test."""

MAX_BLOCK = 64  # block_size of the Cayley transform
MAX_STAGE = 256  # features of a group of a stage: composed, and applied to rows
MAX_ROTATION = 64  # features of a stage that is made from skew in one launch
FUSED_MULTIPLE = 192  # the size of a stage has to divide this, for the CPU's fused product
