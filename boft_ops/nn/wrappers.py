"""Modules that wrap a model or a part of it, and names without them.

A wrapper adds a part to the dotted names of all that it holds: compiled blocks have
``blocks.0._orig_mod.fc``, and a model under DistributedDataParallel ``module.blocks.0.fc``.
Names in adapter files and in arguments are those of the pretrained model, without such parts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
DDP = "torch.nn.parallel.distributed.DistributedDataParallel"
FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
DEEPSPEED = "deepspeed.runtime.engine.DeepSpeedEngine"
# The attribute that holds the wrapped module, by the class of the wrapper. Names of classes are
# compared, because importing them all would take seconds.
_ATTRIBUTES = {
    COMPILED: "_orig_mod",
    DDP: "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    FSDP1: "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    DEEPSPEED: "module",
}


def dotted(*parts: str) -> str:
    """Join parts of a dotted name; those of the model itself are empty, and left out."""
    return ".".join(filter(None, parts))


def wrapper_of(module: nn.Module) -> str | None:
    """The name of the known wrapper class that ``module`` is an instance of, or None."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((name for name in names if name in _ATTRIBUTES), None)


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute that holds what ``module`` wraps, or None for a module that is no wrapper."""
    wrapper = wrapper_of(module)
    return None if wrapper is None else _ATTRIBUTES[wrapper]


def pretrained_names(
    model: nn.Module, attribute_of: Callable[[nn.Module], str | None] = wrapped_attribute
) -> Callable[[str], str]:
    """Return a function from dotted names in ``model`` to those without wrappers.

    Args:
        model: the model that holds wrappers, or is one.
        attribute_of: gives the attribute of a wrapper, or None for other modules.
    """
    inner = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if attribute := attribute_of(module):
            inner.add(dotted(name, attribute))

    def without_wrappers(name: str) -> str:
        parts = name.split(".")
        ends = range(1, len(parts) + 1)
        return ".".join(parts[end - 1] for end in ends if ".".join(parts[:end]) not in inner)

    return without_wrappers
