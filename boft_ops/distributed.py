"""Tensor-parallel styles of BOFT layers, for ``parallelize_module`` (docs/distributed.md).

A module of its own, because it imports ``torch.distributed.tensor``, which takes a second.
"""

from .nn.tensor_parallel import ColwiseBOFT, RowwiseBOFT

__all__ = ["ColwiseBOFT", "RowwiseBOFT"]
