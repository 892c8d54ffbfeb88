"""Orthogonal butterfly finetuning (BOFT, arXiv 2311.06243): operators and layers.

Functions: ``cayley``, ``butterfly_matmul``, ``butterfly_matmul_indexed``,
``butterfly_matmul_segments``, ``kaleidoscope_matmul``, ``butterfly_groups``,
``multiplicative_dropout``, ``boft_linear``.
Layers: ``BOFTLinear``, ``OFTLinear``, ``BOFTConv1d``, ``BOFTConv2d``, ``BOFTConv3d``,
``BOFTEmbedding``, ``BOFTExperts``, ``MultiAdapterLinear``, ``MultiplicativeDropout``.
Models: ``adapt``, ``param_groups``, ``set_strength``, ``merge``, ``unload``, ``reset_adapters``,
``save_adapter``, ``load_adapter``, ``merge_adapters``, ``cache_merged``.
"""

from ._runtime import paths

paths.mount_triton(__name__)
paths.hide_phantom_triton()

from ._version import __version__  # noqa: E402
from .nn.adapt import adapt, merge, unload  # noqa: E402
from .nn.adapter_file import load_adapter, save_adapter  # noqa: E402
from .nn.adapter_parameters import reset_adapters  # noqa: E402
from .nn.conv import BOFTConv1d, BOFTConv2d, BOFTConv3d  # noqa: E402
from .nn.dropout import MultiplicativeDropout  # noqa: E402
from .nn.embedding import BOFTEmbedding  # noqa: E402
from .nn.experts import BOFTExperts  # noqa: E402
from .nn.layers import BOFTLinear, OFTLinear  # noqa: E402
from .nn.merge_adapters import merge_adapters  # noqa: E402
from .nn.merged_cache import MergedCache, cache_merged  # noqa: E402
from .nn.multi_adapter import MultiAdapterLinear  # noqa: E402
from .nn.param_groups import param_groups  # noqa: E402
from .nn.strength import set_strength  # noqa: E402
from .ops.butterfly import butterfly_matmul  # noqa: E402
from .ops.butterfly_groups import butterfly_groups  # noqa: E402
from .ops.cayley import cayley  # noqa: E402
from .ops.dropout import multiplicative_dropout  # noqa: E402
from .ops.kaleidoscope import kaleidoscope_matmul  # noqa: E402
from .ops.linear import boft_linear  # noqa: E402
from .ops.rotate_indexed import (  # noqa: E402
    butterfly_matmul_indexed,
    butterfly_matmul_segments,
)

__all__ = [
    "BOFTConv1d",
    "BOFTConv2d",
    "BOFTConv3d",
    "BOFTEmbedding",
    "BOFTExperts",
    "BOFTLinear",
    "MergedCache",
    "MultiAdapterLinear",
    "MultiplicativeDropout",
    "OFTLinear",
    "__version__",
    "adapt",
    "boft_linear",
    "butterfly_groups",
    "butterfly_matmul",
    "butterfly_matmul_indexed",
    "butterfly_matmul_segments",
    "cache_merged",
    "cayley",
    "kaleidoscope_matmul",
    "load_adapter",
    "merge",
    "merge_adapters",
    "multiplicative_dropout",
    "param_groups",
    "reset_adapters",
    "save_adapter",
    "set_strength",
    "unload",
]

# Pickles and messages name the public path of a class, in a vendored copy that of the copy.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
del _name
