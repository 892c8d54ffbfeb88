"""The common part of the BOFT layers: a frozen weight, the trained rotation, and merging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .._runtime import checks
from .._runtime.dtypes import widest
from ..ops.kaleidoscope import multiply
from ..ops.merge import merge_weight, unmerge_weight, untracked
from ..ops.rotation import SkewRotation
from ..ops.scale import scale_of
from .adapter_parameters import HasAdapter
from .base_modules import check_forward, check_initialized, check_numbers, check_unmodified
from .config import Options, RotationConfig
from .distributed import frozen_parameter
from .dropout import MultiplicativeDropout
from .merging import Merged, check_own_weight, merge_in_place, parameter_of, to_restore
from .rotated_weight import Weight, is_dense, is_sharded, one_draw, rotated_weight

if TYPE_CHECKING:
    from typing_extensions import Self


class BOFTLayer(HasAdapter, nn.Module):
    """Common base of all BOFT layers: the rotation of a frozen weight, seen as (n, d).

    Attributes:
        config: the ``RotationConfig``.
        skew: trainable (m, K, b(b-1)/2), initialized to zeros; (2 l m, ...) with kaleidoscope = l.
        scale_offset: trainable (n,), the scale minus one, initialized to zeros, or None.
        scale: 1 + scale_offset in at least float32, or None; read-only.
        merged: True if ``frozen_weight`` holds the merged weight.

    The frozen weight is the parameter ``weight`` in ``named_parameters()`` and state dicts.
    Reading the attribute ``weight`` gives what the layer multiplies by, as other code expects.
    """

    _merged_with: Merged | None = None
    BASE: type[nn.Module]  # torch's class of the frozen layer
    _base_arguments: Callable[[BOFTLayer], tuple]  # those of BASE, from its attributes
    _is_loading = False  # True while load_state_dict() assigns parameters

    @property
    def frozen_weight(self) -> torch.Tensor:
        """The weight that the layer holds: the pretrained one, or the merged one of a merged layer.

        In-place changes and new numbers belong here. Assigning to it replaces the parameter.
        """
        for owner in (self._parameters, vars(self)):  # FSDP puts a plain tensor into the latter
            if "weight" in owner:
                return owner["weight"]
        raise AttributeError(f"{type(self).__name__} has no weight yet")

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer multiplies by: diag(s) W R^T or diag(s) R W, differentiable.

        It is computed when its numbers are first read, in at least float32, and rounded once.
        In training mode it has a dropout of its own. The weight of a merged layer is its parameter,
        and so are placeholders on the meta device and what FSDP has put in the place of a weight.
        """
        frozen = self.frozen_weight
        # FSDP version 1 reads its own tensors here, and writes back those that are not the same.
        is_fsdp = "weight" in vars(self) or hasattr(frozen, "_fsdp_flattened")
        if self.merged or is_fsdp or "skew" not in self._parameters:
            return frozen
        return rotated_weight(self._rotated_once(), frozen, *self.at_strength())

    @weight.setter
    def weight(self, weight: torch.Tensor) -> None:  # not reached by parameters
        vars(self)["weight"] = weight

    @weight.deleter
    def weight(self) -> None:
        del vars(self)["weight"]

    def _check_numbers(self, x: torch.Tensor | None = None) -> None:
        """Raise ValueError for placeholders, unless all that is computed with is one, as x is."""
        skew, offset = self.skew, self.scale_offset
        check_numbers({"weight": self.frozen_weight, "skew": skew, "scale_offset": offset}, x)

    def _rotated_once(self) -> Callable[..., torch.Tensor]:
        """A function of weight, skew and scale_offset that draws one dropout mask for all calls."""
        draw = one_draw(self.dropout)

        def rotated(weight, skew, offset) -> torch.Tensor:
            self._check_numbers(weight)
            skew = self._active(skew)
            rotation = SkewRotation(_widened(skew), self.config.method, draw(skew))
            return merge_weight(weight, rotation.blocks(), scale_of(offset), **self._placement)

        return rotated

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as ``nn.Module`` does, which also serves ``layer.weight = param``.

        A dense ``weight`` is the new frozen weight, as loaders and tied weights mean it.
        A quantized one was made from the rotated weight, by torchao's ``quantize_`` for example:
        the layer is merged then, and ``unmerge()`` brings the former weight back.

        Raises:
            ValueError: a dense weight was made from the rotated weight.
        """
        is_complete = "weight" in self._parameters and "skew" in self._parameters
        if name == "frozen_weight":
            super().register_parameter("weight", param)
        elif name != "weight" or not is_complete or self.merged or self._is_loading:
            super().register_parameter(name, param)
        elif param is None or is_dense(param) or is_sharded(param):
            if param is not None:
                former = Weight(self._rotated_once(), self.frozen_weight, self.at_strength())
                former.check_written(param)
            super().register_parameter(name, param)
        else:
            self._put_aside(param, self.frozen_weight)

    def _init_rotation(self, config: RotationConfig) -> None:
        """Freeze the parameters of the base layer, which exist, and add skew and scale_offset."""
        checks.floating_dtype("dtype", self.frozen_weight.dtype)
        self.config = config
        # kept, as sharding may leave a weight without elements
        self._matrix_shape = tuple(self._matrix().shape)
        config.check_features(self.rotated_features)
        self.dropout = MultiplicativeDropout(config.p_component, config.p_block)
        self.merged, self.n_identity = False, 0
        self.requires_grad_(False)
        self._init_adapter(self.frozen_weight.device)

    @property
    def rotated_features(self) -> int:
        """The number of rotated features: d (side "in") or n (side "out")."""
        n, d = self._matrix_shape
        return d if self.config.side == "in" else n

    def reset_parameters(self) -> None:
        """Initialize the base layer as torch does, and the rotation and scale to the identity."""
        # torch's method reads ``weight``, which is not the parameter here
        self.BASE.reset_parameters(SimpleNamespace(weight=self.frozen_weight, bias=self.bias))
        if "skew" in self._parameters:  # torch's constructors call this before there is one
            self.reset_adapter()

    def _init_adapter(self, device: torch.device) -> None:
        # float32 under half-precision weights, as steps of 1e-4 are lost beside 0.1 in bfloat16
        options = {"device": device, "dtype": widest(self.frozen_weight.dtype)}
        skew_shape = self.config.skew_shape(self.rotated_features)
        self.skew = nn.Parameter(torch.zeros(skew_shape, **options))
        offset = torch.zeros(self._matrix_shape[0], **options)
        self.register_parameter("scale_offset", nn.Parameter(offset) if self.config.scale else None)

    @classmethod
    def _from_base(cls, base: nn.Module, arguments: tuple, options: dict) -> Self:
        """Build a layer that shares the storage of ``base``; ``arguments`` are torch's."""
        check_forward(base, cls.BASE)
        check_initialized(base)
        check_unmodified(base)
        # built without memory of its own, then given the storage of the base layer
        layer = cls(*arguments, device="meta", dtype=base.weight.dtype, **options)
        layer.frozen_weight = frozen_parameter(base.weight)
        if getattr(base, "bias", None) is not None:
            layer.bias = frozen_parameter(base.bias)
        layer._init_adapter(base.weight.device)
        return layer.train(base.training)

    def pretrained_layer(self) -> nn.Module:
        """Build torch's layer with the pretrained weight, which it shares with this layer.

        Raises:
            ValueError: the layer is merged and its weight cannot be restored, see ``unmerge``, or
                the weight is a placeholder on the meta device, whose numbers a hook holds.
        """
        check_numbers({"weight": self.frozen_weight})
        weight = self._unmerged_weight() if self.merged else self.frozen_weight
        return self._to_base(weight)

    def merged_layer(self) -> nn.Module:
        """Build torch's layer with the merged weight, frozen, and the bias of this layer."""
        return self._to_base(nn.Parameter(self.merged_weight(), requires_grad=False))

    def _to_base(self, weight: nn.Parameter) -> nn.Module:
        layer = self.BASE(*self._base_arguments(), device="meta", dtype=weight.dtype)
        layer.weight, layer.bias = weight, self.bias
        return layer.train(self.training)

    def _matrix(self) -> torch.Tensor:
        """The weight as (n, d)."""
        return self.frozen_weight.flatten(1)

    def describe_base(self) -> tuple[str, int]:
        """The class name of torch's layer that is rotated, and the number n of its outputs."""
        return self.BASE.__name__, self._matrix_shape[0]

    def _active(self, skew: torch.Tensor) -> torch.Tensor:
        """``skew`` without the factors that ``interpolate`` made the identity."""
        if self.n_identity == 0:
            return skew  # a slice would cost a copy in backward
        m = self.config.n_factors - self.n_identity
        return skew[:m] if m else torch.zeros_like(skew[:1])

    def _blocks(self, skew: torch.Tensor) -> torch.Tensor:
        return SkewRotation(self._active(skew), self.config.method).blocks()

    @property
    def _placement(self) -> Options:
        """The arguments of ``ops.merge`` that say where in the weight the rotation acts."""
        return {"side": self.config.side, "kaleidoscope": self.config.kaleidoscope}

    @property
    def n_effective_parameters(self) -> int:
        """The number of trained values: those of skew, scale_offset and a trained bias."""
        return sum(p.numel() for p in self.parameters(recurse=False) if p.requires_grad)

    @untracked
    def rotation(self) -> torch.Tensor:
        """The dense rotation R, (features, features), for inspection; row vectors: y = x R."""
        check_numbers({"skew": self.skew})
        eye = torch.eye(self.rotated_features, dtype=self.skew.dtype, device=self.skew.device)
        return multiply(eye, self._blocks(self.at_strength()[0]), self.config.kaleidoscope)

    @untracked
    def merged_weight(self) -> torch.Tensor:
        """diag(s) W R^T (side "in") or diag(s) R W, in the shape and dtype of the frozen weight W.

        Computed in at least float32 and rounded once, without dropout.
        If the layer is merged, a copy of its weight.
        """
        self._check_numbers()
        if self.merged:
            return self.frozen_weight.clone()
        return self._merge_with(merge_weight, self.frozen_weight, *self.at_strength())

    def _merge_with(self, merge: Callable[..., torch.Tensor], weight, skew, offset) -> torch.Tensor:
        blocks_of = lambda skew: self._blocks(_widened(skew))  # noqa: E731
        return merge_in_place(merge, weight, blocks_of, skew, scale_of(offset), **self._placement)

    @untracked
    def merge(self, *, keep: bool = True) -> Self:
        """Replace the frozen weight by the merged weight, so that inference computes no rotation.

        The former tensor is not written to, as other modules may share it. Only shards are, as
        FSDP gathers from the very Parameter that it made; all ranks have to merge together.

        Args:
            keep: True puts the former weight aside, for ``unmerge`` to bring it back bit for bit;
                it takes its memory meanwhile. False lets it go, and ``unmerge`` computes it from
                the merged weight, with a rounding error each time.

        Returns:
            The layer itself.

        Raises:
            RuntimeError: the layer is merged already.
            ValueError: parameters are placeholders on the meta device, or FSDP has gathered the
                weight and will put its shard back.
        """
        if self.merged:
            raise RuntimeError("merge: expected an unmerged layer, got one that is merged already")
        check_own_weight(self, self.frozen_weight)
        former = to_restore(self.frozen_weight) if keep else None
        self._put_aside(self.merged_weight(), former)
        return self

    def _put_aside(self, weight: torch.Tensor, former: torch.Tensor | None) -> None:
        """Make ``weight`` the merged weight, and keep ``former`` for ``unmerge``."""
        self.frozen_weight, self.merged = parameter_of(weight, self.frozen_weight), True
        self._keep_merged(former)

    def _keep_merged(self, former: torch.Tensor | None = None) -> None:
        # both may be stepped or loaded before unmerge(), which has to undo these
        copies = (t if t is None else t.detach().clone() for t in self.at_strength())
        self._merged_with = Merged(*copies, former) if self.merged else None

    @untracked
    def unmerge(self) -> Self:
        """Undo ``merge``: bring back the weight that it put aside, bit for bit.

        Without that weight, after ``merge(keep=False)`` or a state dict of a merged layer, it is
        computed, up to the rounding of its dtype: the skew and scale that were merged are undone,
        even if they have changed since.

        Returns:
            The layer itself.

        Raises:
            RuntimeError: the layer is not merged.
            ValueError: the weight is computed and ``scale`` holds a zero, which no division undoes;
                or parameters are placeholders on the meta device.
        """
        if not self.merged:
            raise RuntimeError("unmerge: expected a merged layer, got one that is not")
        check_own_weight(self, self.frozen_weight)
        self.frozen_weight = parameter_of(self._unmerged_weight(), self.frozen_weight)
        self.merged, self._merged_with = False, None
        return self

    @untracked
    def _unmerged_weight(self) -> nn.Parameter:
        """The weight of a merged layer before merging: see ``unmerge``."""
        self._check_numbers()
        merged, (skew, offset, former) = self.frozen_weight, self._merged_with
        if former is None:
            # the layer may have moved to another device since
            skew, offset = (t if t is None else t.to(merged.device) for t in (skew, offset))
            unmerge = partial(unmerge_weight, orthogonal=self.config.method == "exact")
            former = self._merge_with(unmerge, merged, skew, offset)
        elif (former.device, former.dtype) != (merged.device, merged.dtype):
            former = former.to(merged.device, merged.dtype)
        is_parameter = isinstance(former, nn.Parameter)
        return former if is_parameter else nn.Parameter(former, requires_grad=False)

    def interpolate(self, n: int) -> Self:
        """Replace the n factors of the largest strides by the identity (the paper's Fig. 10).

        n = 0 is the finetuned layer, n = n_factors the pretrained weight, still scaled.
        ``skew`` is not changed: ``interpolate(0)`` restores the finetuned layer.

        Args:
            n: number of factors, in [0, n_factors].

        Returns:
            The layer itself.

        Raises:
            ValueError: n is not in [0, n_factors].
            RuntimeError: the layer is merged, or a kaleidoscope, for which no path is defined.
        """
        if self.kaleidoscope:
            raise RuntimeError("interpolate: expected a butterfly, got a kaleidoscope")
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= self.n_factors:
            raise ValueError(f"n: expected an int in [0, {self.n_factors}], got {n!r}")
        if self.merged:
            raise RuntimeError("interpolate: expected an unmerged layer, got a merged one")
        self.n_identity = n
        return self

    def _check_trainable(self) -> None:
        trained = any(p.requires_grad for p in (self.skew, self.scale_offset) if p is not None)
        if self.training and torch.is_grad_enabled() and trained:
            raise RuntimeError(
                "the layer is merged, so skew and scale would get no gradient: expected unmerge() "
                "before training, or eval() for inference"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self._check_state(state_dict, prefix)
        # A merged weight that is loaded as an unmerged one would be rotated twice, and unmerging
        # has to undo exactly the factors that were merged.
        state = state_dict.pop(f"{prefix}_extra_state", None)  # only if there is something to say
        has_weight, merged = f"{prefix}weight" in state_dict, self.merged
        if state is not None:
            merged, self.n_identity = bool(state[0]), int(state[1])
        else:
            merged = merged and not has_weight
            self.n_identity = 0 if f"{prefix}skew" in state_dict else self.n_identity
        if merged != self.merged:
            if not has_weight:
                raise ValueError(
                    f"{prefix}_extra_state: expected merged={self.merged}, as the layer is, in a "
                    "state without its weight, got the other"
                )
            # torch copies into the weight in place. Other layers that share its storage must not
            # change with it.
            copy = self.frozen_weight.detach().clone()
            self.frozen_weight = nn.Parameter(copy, requires_grad=False)
            self.merged = merged
        self._is_loading = True  # a state holds the frozen or merged weight, not the rotated one
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            del self._is_loading
        if has_weight:
            if self.merged:
                self.strength = 1.0  # a state holds the powers that were merged
            self._keep_merged()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged or self.n_identity:  # loaders of plain layers' states trip over such a key
            state = torch.tensor([self.merged, self.n_identity], dtype=torch.int64)
            destination[f"{prefix}_extra_state"] = state
        if self._merged_with is not None:  # the merged ones, even if the parameters have changed
            merged = self._merged_with
            destination[f"{prefix}skew"] = merged.skew
            if merged.scale_offset is not None:
                destination[f"{prefix}scale_offset"] = merged.scale_offset

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items() if value)
        return f"{super().extra_repr()}, {options}" + (", merged" if self.merged else "")


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(widest(tensor.dtype))
