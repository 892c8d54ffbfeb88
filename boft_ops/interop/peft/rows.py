"""Accelerated forms of PEFT's BOFT and OFT models, which take ``adapter_names``. Needs PEFT.

PEFT's own models drop that argument of ``forward`` and ``generate`` without a word, except LoRA's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from peft.tuners.boft import BOFTModel
from peft.tuners.oft import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layers import Rotated

BASE = "__base__"  # PEFT's name of the base model among adapter_names


class TakesRows:
    """Mixin that precedes a tuner of PEFT among the bases of its accelerated form."""

    @contextmanager
    def _enable_peft_forward_hooks(
        self,
        *args,
        adapter_names: Sequence[str] | None = None,
        num_beams: int | None = None,
        **kwargs,
    ) -> Iterator[None]:
        """Context manager in which PEFT calls the model: rows go through their own adapters.

        Args:
            adapter_names: the name of an adapter for each row; "__base__" is the base model.
            num_beams: argument of ``generate``, which repeats each row so many times.
            args, kwargs: further arguments of the call, which are not looked at.
        """
        if adapter_names is None:
            yield
            return
        names = list(adapter_names)
        layers = {n: m for n, m in self.named_modules() if isinstance(m, BaseTunerLayer)}
        if foreign := [name for name, m in layers.items() if not isinstance(m, Rotated)]:
            raise ValueError(
                f"adapter_names: expected accelerated layers alone, got {foreign[0]!r}, which PEFT "
                "computes for all rows alike"
            )
        if self.training:
            raise ValueError("adapter_names: expected eval(), got a model in training mode")
        known = {BASE, *self.peft_config}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"adapter_names: expected some of {sorted(known)}, got {unknown[0]!r}")
        repeats = num_beams or 1
        repeated = [name for name in names for _ in range(repeats)]
        with ExitStack() as stack:
            for layer in layers.values():
                layer.row_names = names, repeats
                stack.callback(delattr, layer, "row_names")
            for module in self.modules():  # heads that each adapter trained a copy of
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hook = partial(_add_names, adapter_names=repeated)
                    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield


def _add_names(
    module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]
) -> tuple[tuple, dict]:
    """Forward pre-hook that adds ``adapter_names`` to the arguments."""
    return args, {**kwargs, "adapter_names": adapter_names}


class BoftModel(TakesRows, BOFTModel):
    peft_class = BOFTModel


class OftModel(TakesRows, OFTModel):
    peft_class = OFTModel


MODEL_FORMS = {form.peft_class: form for form in (BoftModel, OftModel)}
