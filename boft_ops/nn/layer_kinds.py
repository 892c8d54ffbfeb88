"""The kinds of layers that ``adapt`` knows: those that it replaces, and those that it calls."""

from __future__ import annotations

from torch import nn

from .base import BOFTLayer
from .base_modules import (
    check_forward,
    check_unmodified,
    is_conv1d,
    is_quantized,
    linear_features,
)
from .config import Options
from .conv import CONVOLUTIONS
from .distributed import data_mesh
from .embedding import BOFTEmbedding
from .expert_modules import is_experts
from .experts import BOFTExperts
from .layers import BOFTLinear
from .multi_adapter import MultiAdapterLinear
from .rotated_weight import is_sharded

DEFAULT = "default"  # name of the adapter that adapt() adds to a layer that it calls
BOFT_CLASSES = BOFTLayer, MultiAdapterLinear, BOFTExperts


def is_layer(module: nn.Module) -> bool:
    """True for layers that ``adapt`` replaces or calls by itself."""
    return isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or is_called(module)


def is_called(module: nn.Module) -> bool:
    """True for linear layers that are always kept, and called on rotated inputs."""
    return is_quantized(module) or is_conv1d(module)


def _has_to_be_called(module: nn.Module) -> bool:
    """True for a linear layer that no BOFTLinear can replace."""
    if linear_features(module) is None:
        return False
    try:
        check_forward(module, nn.Linear)
        check_unmodified(module)
    except (TypeError, ValueError):
        return True
    return False


def check_replaceable(name: str, module: nn.Module, wrap: bool) -> None:
    """Raise TypeError or ValueError unless ``build_layer`` takes modules of this kind."""
    if isinstance(module, BOFT_CLASSES):
        raise ValueError(
            f"target_modules: {name!r} is adapted already: expected other layers, or unload(model) "
            "first"
        )
    if not is_layer(module) and not (wrap and _has_to_be_called(module)):
        hint = "; wrap=True calls it on rotated inputs" if linear_features(module) else ""
        if is_experts(module):
            hint = f"; target_parameters takes '{name}.down_proj'"
        raise TypeError(
            "target_modules: expected nn.Linear, nn.Conv1d to nn.Conv3d, nn.Embedding or a "
            f"quantized linear layer, {name!r} is {type(module).__name__}{hint}"
        )


def build_layer(
    name: str, module: nn.Module, options: Options, wrap: bool, is_managed: bool
) -> BOFTLayer | MultiAdapterLinear:
    """Build the layer that rotates ``module``.

    Args:
        name: for messages.
        module: a kind that ``check_replaceable`` accepts.
        options: keyword arguments of the layer or its adapter.
        wrap: as for ``adapt``.
        is_managed: True if ``fully_shard`` manages the weight, which has to stay where it is.
    """
    weight, has_to_be_called = getattr(module, "weight", None), _has_to_be_called(module)
    is_shard = weight is not None and is_sharded(weight)
    calls = is_called(module) or (isinstance(module, nn.Linear) and is_shard)
    try:
        mesh = data_mesh(weight) if is_managed else None
        if calls or (wrap and has_to_be_called):
            layer = MultiAdapterLinear(module)
            adapter = layer.add_adapter(DEFAULT, **options)
            if mesh is not None:
                adapter.replicate(mesh)
            return layer.train(module.training)
        if is_shard:
            raise ValueError("expected adapt() before the layer is sharded, got a shard")
        if isinstance(module, nn.Linear):
            return BOFTLinear.from_linear(module, **options)
        if isinstance(module, nn.Embedding):
            return BOFTEmbedding.from_embedding(module, **options)
        form = next(form for base, form in CONVOLUTIONS.items() if isinstance(module, base))
        return form.from_conv(module, **options)
    except (TypeError, ValueError) as error:
        may_wrap = has_to_be_called and not (calls or wrap or is_managed)
        hint = " (wrap=True would keep and call it)" if may_wrap else ""
        raise type(error)(f"{name}: {error}{hint}") from error
