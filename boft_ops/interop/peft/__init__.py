"""Accelerates PEFT's BOFT and OFT models with this package's operators (docs/interop.md).

PEFT is imported when a function is called.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..._runtime import checks

KEPT = "not restored, as its forward was replaced on the instance; restore it before that is done"


def accelerate(model: nn.Module) -> nn.Module:
    """Make the BOFT and OFT layers of a PEFT model compute through this package's operators.

    All else stays as it is: parameters, keys of the state_dict, saving and loading, merging, and
    switching, adding and deleting adapters. The dense permutation matrices of PEFT up to 0.21 are
    freed.
    Layers that PEFT adds later, for an adapter with other target modules, need another call, which
    skips the accelerated ones.
    Layers that cannot be accelerated keep PEFT's code; one warning names them with the reasons.

    Args:
        model: a ``PeftModel``, or any module that holds layers of PEFT; changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: the model has no BOFT or OFT layer of PEFT.
    """
    from . import swap

    checks.module("model", model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, swap.TUNERS)}
    if not layers:
        raise ValueError("model: expected BOFT or OFT layers of PEFT, got a model without any")
    notes = defaultdict(list)
    for name, layer in layers.items():
        if isinstance(layer, swap.Rotated):
            continue
        reason = swap.obstacle_of(layer)
        if reason is None:
            if swap.computes_otherwise(type(layer), layer.base_layer):
                notes[swap.OTHER_FUNCTION].append(name)
            swap.accelerate_layer(layer)
        else:
            notes[f"not accelerated, as {reason}"].append(name)
    swap.accelerate_tuners(model)
    for adapter, wanted, made in _lowered(model):
        notes[f"n_factors is {made}, not {wanted} as in the config: PEFT lowered it"].append(
            f"adapter {adapter!r} (made under patched() it is {wanted})"
        )
    _warn(notes)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: the layers compute through PEFT's own code again.

    Layers whose ``forward`` was replaced on the instance since, as device hooks do, stay
    accelerated; one warning names them.

    Args:
        model: as for ``accelerate``; layers made under ``patched`` are restored, too.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: the model has no accelerated layer, or the scale of an adapter is not 1.
        RuntimeError: a layer has more than one butterfly factor, which PEFT up to 0.21 computes
            with its CUDA extension only, and the extension cannot be built. The model is then
            unchanged.
    """
    from . import swap

    checks.module("model", model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, swap.Rotated)}
    if not layers:
        raise ValueError("model: expected at least one accelerated layer, got none")
    if scaled := [n for n, m in layers.items() if any(t != 1 for t in m.strengths.values())]:
        raise ValueError(
            f"model: expected adapters of scale 1, which is all that PEFT's own layers have, got "
            f"another in {scaled[0]!r}: unscale_layer() or set_scale(name, 1) first"
        )
    many = [name for name, layer in layers.items() if swap.needs_extension(layer)]
    if many and not swap.has_extension():
        raise RuntimeError(
            f"restore: {', '.join(many)}: more than one butterfly factor, for which PEFT needs its "
            "CUDA extension, and it cannot be built here"
        )
    notes = defaultdict(list)
    for name, layer in layers.items():
        if swap.has_replaced_forward(layer):
            notes[KEPT].append(name)
        else:
            swap.restore_layer(layer)
    if not notes:
        swap.restore_tuners(model)
    _warn(notes)
    return model


@contextmanager
def patched() -> Iterator[None]:
    """Context manager: PEFT makes accelerated layers from the start.

    ``get_peft_model``, ``PeftModel.from_pretrained`` and ``add_adapter`` then take as many
    butterfly factors as the config says, without PEFT's CUDA extension, and never make the dense
    permutation matrices. Models made in the block stay accelerated after it.
    The block replaces names in PEFT's modules, so it acts on all threads.
    """
    from . import swap

    notes = defaultdict(list)
    with swap.constructors(lambda reason, base: notes[reason].append(base)):
        yield
    _warn(notes)


def _lowered(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Yield (name, wanted, made) for adapters with fewer factors than their config says."""
    from . import swap

    for name, config in getattr(model, "peft_config", {}).items():
        wanted = getattr(config, "boft_n_butterfly_factor", 1)
        for layer in model.modules():
            if isinstance(layer, swap.BoftRotated) and name in layer.boft_R:
                made = layer.boft_R[name].shape[0]
                if made != wanted:
                    yield name, wanted, made
                break


def _warn(notes: dict[str, list[str]]) -> None:
    if notes:
        lines = [f"{', '.join(names)}: {reason}" for reason, names in notes.items()]
        warnings.warn("boft_ops: " + "; ".join(lines), stacklevel=3)
