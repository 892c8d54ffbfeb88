"""Operators in torch's registry, under the namespace of this copy of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .autograd import differentiate
from .namespace import NS


def define(
    name: str,
    schema: str,
    reference: Callable | None = None,
    fake: Callable | None = None,
    namespace: str = NS,
) -> torch.library.Library:
    """Define an operator under a namespace of this copy, once per process.

    The library is kept on torch's own object: torch drops the operators of a freed one, and a
    second import of the same copy must find them, not define them again.
    """
    holder = getattr(torch.ops, namespace)
    libraries = holder.__dict__.setdefault("_boft_libraries", {})
    if name not in libraries:
        library = libraries[name] = torch.library.Library(namespace, "FRAGMENT")
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        if reference is not None:
            # for every device; a kernel registered for a device key wins over it
            library.impl(name, reference, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
            differentiate(f"{namespace}::{name}", reference, library)
    return libraries[name]
