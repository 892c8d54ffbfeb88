"""Whole models: put BOFT layers in, and take them out again merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .._runtime import checks
from .base import BOFTLayer
from .layers import BOFTConv2d, BOFTLinear
from .multi_adapter import MultiAdapterLinear
from .quantized import is_quantised

DEFAULT = "default"  # the adapter of a quantised layer

# They read a child's weight without calling the child, so a rotation in it would be ignored.
_BYPASSING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def adapt(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    modules_to_save: str | Iterable[str] = (),
    **options,
) -> nn.Module:
    """Replace the matching linear and convolution layers by BOFT layers and freeze the rest.

    A quantised linear layer (torchao's, bitsandbytes', and modules with packed integers and
    in_features and out_features, as GPTQ's and AWQ's) is kept and called, on rotated inputs, by a
    ``MultiAdapterLinear`` in its place.

    Args:
        model: changed in place. If an error is raised it is as it was.
        target_modules: which layers, as in PEFT. A string is a regular expression that must match
            the whole dotted name; a list holds whole names or last parts of names ("q_proj",
            "attention.output.dense").
        modules_to_save: as target_modules, the other modules that stay trainable, and that
            ``save_adapter`` stores (a classification head, for example).
        **options: keyword arguments of ``BOFTLinear`` and ``BOFTConv2d`` from block_size on, such
            as ``block_size=8, n_factors=2``.

    Returns:
        ``model``.

    Raises:
        TypeError: a matching module is no nn.Linear, nn.Conv2d or quantised linear layer, or is a
            subclass with a forward of its own, which a BOFT layer would lose.
        ValueError: nothing matches, a layer's features do not fit the options (its name is in the
            message), it has hooks or parametrizations, which a BOFT layer would lose, its parent
            bypasses its forward, or its weight is that of a module to save (tied embeddings).
    """
    checks.module("model", model)
    targets = _matching(model, target_modules, "target_modules")
    if not targets:
        raise ValueError("target_modules: expected at least one name, got none")
    kept = _matching(model, modules_to_save, "modules_to_save") if modules_to_save else {}
    replaced = set(targets.values())
    for name, module in kept.items():
        if not replaced.isdisjoint(module.modules()):
            raise ValueError(
                f"modules_to_save: {name!r} is, or holds, a module that is also in target_modules"
            )
    # trained there, it would move under the rotation, and without the gradient that it has here
    owners = {p: name for name, module in targets.items() for p in module.parameters()}
    for name, module in kept.items():
        for parameter in module.parameters():
            if parameter in owners:
                raise ValueError(
                    f"modules_to_save: {name!r} shares a parameter with {owners[parameter]!r} of "
                    "target_modules, which is frozen: expected one of the two"
                )
    with unfrozen_on_error(model):
        put_in(model, build_layers(model, dict.fromkeys(targets, options)))
    for module in kept.values():
        module.requires_grad_(True)
    return model


def build_layers(
    model: nn.Module, options: dict[str, dict]
) -> dict[nn.Module, BOFTLayer | MultiAdapterLinear]:
    """The BOFT layer for each named layer, with its own options; the model is not changed, but that
    quantised layers are frozen."""
    if any(isinstance(m, (BOFTLayer, MultiAdapterLinear)) for m in model.modules()):
        raise ValueError("model: expected one without BOFT layers, got an adapted one")
    children = {name: (parent, module) for parent, _, name, module in _children(model)}
    layers: dict[nn.Module, BOFTLayer | MultiAdapterLinear] = {}
    for name, layer_options in options.items():
        if name not in children:
            raise ValueError(f"model: expected a module {name!r}, got none of that name")
        parent, module = children[name]
        if module not in layers:  # it may be registered under several names
            _check_replaceable(name, module)
            check_parent(f"target_modules: {name!r}", parent)
            layers[module] = _wrap(name, module, layer_options)
    return layers


def put_in(model: nn.Module, layers: dict[nn.Module, BOFTLayer | MultiAdapterLinear]) -> None:
    """Replace each module by its BOFT layer, wherever it is registered; freeze all the rest."""
    model.requires_grad_(False)
    for parent, attribute, _, module in list(_children(model)):
        if module in layers:
            setattr(parent, attribute, layers[module])


@contextmanager
def unfrozen_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, parameters require gradients as they did before it."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for parameter, trained in before.items():
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        raise


def merge(
    model: nn.Module, requantise: Callable[[nn.Linear], nn.Module] | None = None
) -> nn.Module:
    """Replace every BOFT layer by a plain nn.Linear or nn.Conv2d with the merged weight.

    Args:
        model: changed in place; may itself be a BOFT layer, then the plain layer is returned.
        requantise: what makes a quantised layer of a merged one, over quantised bases; see
            ``MultiAdapterLinear.merged_layer``.

    Returns:
        ``model``, or the plain layer. Merged weights are frozen; other parameters keep their
        ``requires_grad``.

    Raises:
        TypeError, ValueError: the model has no BOFT layer, or a quantised one and ``requantise`` is
            None, or one over a base that computes more than a linear layer: the model is then as it
            was.
    """
    checks.module("model", model)

    def merged(layer: BOFTLayer | MultiAdapterLinear) -> nn.Module:
        if isinstance(layer, BOFTLayer):
            return layer.merged_layer()
        return layer.merged_layer(requantise if is_quantised(layer.base) else None)

    kinds = BOFTLayer, MultiAdapterLinear
    if isinstance(model, kinds):
        return merged(model)
    layers = [(p, a, m) for p, a, _, m in _children(model) if isinstance(m, kinds)]
    if not layers:
        raise ValueError("model: expected at least one BOFT layer, got none")
    plain = {layer: merged(layer) for layer in dict.fromkeys(m for _, _, m in layers)}
    for parent, attribute, layer in layers:
        setattr(parent, attribute, plain[layer])
    return model


def _matching(model: nn.Module, names: str | Iterable[str], argument: str) -> dict[str, nn.Module]:
    """The modules, by dotted name, that a regular expression or any name of a list matches."""
    modules = {name: module for _, _, name, module in _children(model)}
    if isinstance(names, str):
        try:
            hits = {names: [n for n in modules if re.fullmatch(names, n)]}
        except re.error as error:
            raise ValueError(
                f"{argument}: expected a regular expression, got {names!r}: {error}"
            ) from error
    elif not isinstance(names, Iterable):
        raise TypeError(f"{argument}: expected a string or a list of names, got {names!r}")
    else:
        names = list(names)
        if any(not isinstance(n, str) or not n for n in names):
            raise TypeError(f"{argument}: expected a string or a list of names, got {names!r}")
        hits = {n: [m for m in modules if m == n or m.endswith(f".{n}")] for n in names}
    if unmatched := [name for name, hit in hits.items() if not hit]:
        layers = sorted({n.rpartition(".")[2] for n, m in modules.items() if _is_layer(m)})
        raise ValueError(
            f"{argument}: expected names of modules of the model, got {unmatched} without a match; "
            f"the names of its linear and convolution layers end in {layers}"
        )
    return {name: modules[name] for hit in hits.values() for name in hit}


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, dotted name, module) of every child, under each of its names."""
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():
            if child is not None:
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d)) or is_quantised(module)


def _check_replaceable(name: str, module: nn.Module) -> None:
    if not _is_layer(module):
        raise TypeError(
            "target_modules: expected nn.Linear, nn.Conv2d or a quantised linear layer, "
            f"{name!r} is {type(module).__name__}"
        )


def check_parent(layer: str, parent: nn.Module) -> None:
    """Raise ValueError if the module that holds a layer may not call it."""
    if isinstance(parent, _BYPASSING_PARENTS):
        raise ValueError(
            f"{layer} lies in {type(parent).__name__}, which may read its weight "
            "without calling it, so that the rotation would be ignored; expected a layer whose "
            "forward() is called"
        )


def _wrap(name: str, module: nn.Module, options: dict) -> BOFTLayer | MultiAdapterLinear:
    try:
        if is_quantised(module):
            layer = MultiAdapterLinear(module)
            layer.add_adapter(DEFAULT, **options)
            return layer.train(module.training)
        if isinstance(module, nn.Linear):
            return BOFTLinear.from_linear(module, **options)
        return BOFTConv2d.from_conv(module, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
