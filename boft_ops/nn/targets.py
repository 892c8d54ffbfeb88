"""The layers of a model that a user's names mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from .config import Options
from .experts import expert_parameters
from .layer_kinds import BOFT_CLASSES, is_called, is_layer
from .wrappers import dotted, pretrained_names

ALL_LINEAR = "all-linear"


def options_by_name(
    model: nn.Module,
    target_modules: str | Iterable[str] | Mapping[str, Options],
    options: Options,
    saved: Iterable[nn.Module],
) -> dict[str, Options]:
    """The options of each layer to replace, by its dotted name; see ``adapt``.

    ``saved`` are the modules to save, which "all-linear" leaves out.
    """
    if target_modules == ALL_LINEAR:
        return dict.fromkeys(_all_linear(model, saved), options)
    if not isinstance(target_modules, Mapping):
        return dict.fromkeys(matching(model, target_modules, "target_modules"), options)
    found: dict[str, Options] = {}
    for key, own in target_modules.items():
        if not isinstance(own, Mapping):
            raise TypeError(f"target_modules: expected options for {key!r}, got {own!r}")
        try:
            names = matching(model, [key], "target_modules")
        except ValueError:
            names = matching(model, key, "target_modules")
        for name in names:
            if found.setdefault(name, options | own) != options | own:
                raise ValueError(f"target_modules: expected one choice of options for {name!r}")
    return found


def _all_linear(model: nn.Module, saved: Iterable[nn.Module]) -> list[str]:
    """The names of the linear layers that "all-linear" means."""
    left_out = {inner for module in saved for inner in module.modules()}
    for module in model.modules():  # a wrapper does not have its model's methods
        head = getattr(module, "get_output_embeddings", None)
        if callable(head) and isinstance(output := head(), nn.Module):
            left_out |= set(output.modules())
    return [
        name
        for _, _, name, module in named_children(model)
        if module not in left_out
        and not isinstance(module, BOFT_CLASSES)
        and (isinstance(module, nn.Linear) or is_called(module))
    ]


def matching(
    model: nn.Module,
    names: str | Iterable[str],
    argument: str,
    weights: Mapping[str, nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """The modules that a regular expression or a list of names matches, by dotted name.

    ``argument`` is the name of the public argument, for error messages. ``weights`` are experts by
    the names of their weights, to be matched instead of the names of modules.
    """
    children = {name: module for _, _, name, module in named_children(model)}
    modules = children if weights is None else weights
    if isinstance(names, str):
        try:
            matches = {names: [n for n in modules if re.fullmatch(names, n)]}
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
        matches = {n: [m for m in modules if m == n or m.endswith(f".{n}")] for n in names}
    if unmatched := [name for name, matched in matches.items() if not matched]:
        layers = sorted({n.rpartition(".")[2] for n, m in children.items() if is_layer(m)})
        parameters = sorted({n.rpartition(".")[2] for n in expert_parameters(children)})
        raise ValueError(
            f"{argument}: expected names in the model, got {unmatched} without a match; the names "
            f"of its layers that can be adapted end in {layers}, those of its experts' weights, "
            f"for target_parameters, in {parameters}"
        )
    return {name: modules[name] for matched in matches.values() for name in matched}


def named_children(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Yield (parent, attribute, dotted name, module) for every child under each of its names.

    Names are those in the pretrained model: what a wrapper wraps bears the wrapper's name, and
    comes after it.
    """
    pretrained_name = pretrained_names(model)
    for prefix, parent in model.named_modules(remove_duplicate=False):
        is_adapted = isinstance(parent, BOFT_CLASSES)
        for attribute, child in {} if is_adapted else parent._modules.items():
            if child is not None:
                yield parent, attribute, pretrained_name(dotted(prefix, attribute)), child
