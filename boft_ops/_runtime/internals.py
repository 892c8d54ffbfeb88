"""Private parts of torch that the package uses, as no public part does their work.

No other file names ``torch._C``. ``tests/runtime/test_internals.py`` says what each of them has to
do. Those that are asked at every call of a layer are aliases: functions around them would cost host
time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable)

# Watchers and transforms of the operators of a call.
tracing_state = torch._C._get_tracing_state  # None outside of torch.jit.trace
n_dispatch_modes = torch._C._len_torch_dispatch_stack
n_function_modes = torch._C._len_torch_function_stack
has_transforms = torch._C._are_functorch_transforms_active
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor  # by the older vmap of autograd
# The hooks that would see a saved tensor, or None. Where torch cannot tell, there may be some.
saved_tensor_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)

is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # for any type of device
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # retain_graph of a backward

# Contexts: operators skip autograd, or tensor subclasses get no __torch_function__.
BelowAutograd = torch._C._AutoDispatchBelowAutograd
NoTorchFunction = torch._C.DisableTorchFunctionSubclass
DispatchKey = torch._C.DispatchKey


def undispatched(overload: Any, device: str) -> Callable:
    """The kernel of an ``OpOverload`` for a type of device, called without torch's dispatcher.

    The dispatcher would ask for autograd, modes and transforms, which takes longer than a small
    layer's arithmetic: the caller knows that there are none.
    """
    key = torch._C.DispatchKeySet(getattr(DispatchKey, device.upper()))
    return partial(overload._handle.redispatch_boxed, key)


def cuda_driver_version() -> int:
    """The CUDA version of the driver, such as 12040 for 12.4; only a torch with CUDA has it."""
    return torch._C._cuda_getDriverVersion()


def constant_in_graphs(function: Function) -> Function:
    """Decorator: Dynamo calls the function while it makes a graph, and keeps the result in it.

    ``torch.compiler.assume_constant_result`` does the same, but would import ``torch._dynamo``.
    """
    function._dynamo_marked_constant = True
    return function


def composable_states() -> Mapping[Any, Any]:
    """Weak references to the states of all modules that ``fully_shard`` manages, by module."""
    module = sys.modules.get("torch.distributed._composable_state")
    return {} if module is None else module._module_state_mapping
