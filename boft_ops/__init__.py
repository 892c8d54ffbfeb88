"""Orthogonal butterfly finetuning (BOFT, arXiv 2311.06243): operators and layers.

Functions: ``cayley``, ``butterfly_matmul``, ``butterfly_matmul_indexed``, ``kaleidoscope_matmul``,
``butterfly_groups``, ``multiplicative_dropout``, ``boft_linear``.
Layers: ``BOFTLinear``, ``OFTLinear``, ``BOFTConv2d``, ``MultiAdapterLinear``,
``MultiplicativeDropout``.
Models: ``adapt``, ``merge``, ``save_adapter``, ``load_adapter``.
"""

from . import _paths

_paths.mount_triton(__name__)
_paths.hide_phantom_triton()

from ._version import __version__  # noqa: E402
from .adapter_file import load_adapter, save_adapter  # noqa: E402
from .butterfly import butterfly_matmul  # noqa: E402
from .butterfly_groups import butterfly_groups  # noqa: E402
from .cayley import cayley  # noqa: E402
from .dropout import MultiplicativeDropout, multiplicative_dropout  # noqa: E402
from .indexed import butterfly_matmul_indexed  # noqa: E402
from .kaleidoscope import kaleidoscope_matmul  # noqa: E402
from .layers import BOFTConv2d, BOFTLinear, OFTLinear  # noqa: E402
from .linear import boft_linear  # noqa: E402
from .model import adapt, merge  # noqa: E402
from .multi import MultiAdapterLinear  # noqa: E402

__all__ = [
    "BOFTConv2d",
    "BOFTLinear",
    "MultiAdapterLinear",
    "MultiplicativeDropout",
    "OFTLinear",
    "__version__",
    "adapt",
    "boft_linear",
    "butterfly_groups",
    "butterfly_matmul",
    "butterfly_matmul_indexed",
    "cayley",
    "kaleidoscope_matmul",
    "load_adapter",
    "merge",
    "multiplicative_dropout",
    "save_adapter",
]
