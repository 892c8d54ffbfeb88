"""What the layers share: a frozen weight, the parameters of its rotation, and merging."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import nn

from .._runtime import autocast, checks, linalg
from ..ops.cayley import cayley
from ..ops.dropout import MultiplicativeDropout
from ..ops.kaleidoscope import multiply
from .plain import check_forward, check_untouched


def _exactly(method: Callable) -> Callable:
    """Run a method without autograd and autocast: what it returns replaces or inspects weights."""

    @wraps(method)
    def wrapper(self, *args):
        # not in inference mode either: a weight made there could not be trained around later
        exact = torch.inference_mode(False), torch.no_grad()
        with exact[0], exact[1], autocast.disabled(self.weight.device.type):
            return method(self, *args)

    return wrapper


def adapter_options(adapter: object, dropout: object) -> dict[str, int | float | str | bool]:
    """The options of a rotation and its scale, whatever holds them, and of their dropout."""
    return {
        "block_size": adapter.block_size,
        "n_factors": adapter.n_factors,
        "side": adapter.side,
        "scale": adapter.scale is not None,
        "p_component": dropout.p_component,
        "p_block": dropout.p_block,
        "method": adapter.method,
    }


class BOFTLayer(nn.Module):
    """What BOFTLinear and BOFTConv2d share: the rotation of a frozen weight seen as (n, d).

    Attributes:
        skew: trainable (m, K, b(b-1)/2), zeros at first; (2 l m, ...) with kaleidoscope = l.
        scale: trainable (n,), ones at first, or None.
        merged: whether ``weight`` holds the merged weight.
    """

    _merged_with: tuple[torch.Tensor, torch.Tensor | None] | None = None  # skew, scale
    BASE: type[nn.Module]  # torch's layer of which a subclass is the frozen, rotated form
    OPTIONS = frozenset(
        ("block_size", "n_factors", "side", "scale", "p_component", "p_block", "method")
    )

    def _init_rotation(
        self,
        block_size: int,
        n_factors: int,
        side: str,
        scale: bool,
        p_component: float,
        p_block: float,
        method: str,
        kaleidoscope: int = 0,
    ) -> None:
        """Freeze the base parameters and add the adapter's, once the base module is there."""
        checks.choice("side", side, checks.SIDES)
        checks.choice("method", method, checks.METHODS)
        if not isinstance(scale, bool):
            raise TypeError(f"scale: expected a bool, got {scale!r}")
        checks.floating_dtype("dtype", self.weight.dtype)
        n, d = self._matrix().shape
        features = d if side == "in" else n
        checks.butterfly_shape(features, block_size, n_factors)
        checks.kaleidoscope("kaleidoscope", kaleidoscope, n_factors)
        self.block_size, self.n_factors = block_size, n_factors
        self.side, self.method, self.kaleidoscope = side, method, kaleidoscope
        self.dropout = MultiplicativeDropout(p_component, p_block)
        self.merged, self.n_identity = False, 0
        self.requires_grad_(False)
        packed = block_size * (block_size - 1) // 2
        self._shapes = ((2 * kaleidoscope or 1) * n_factors, features // block_size, packed), n
        self._init_adapter(scale, self.weight.device)

    def reset_parameters(self) -> None:
        """Initialise the base layer as torch does, and the adapter to the identity."""
        super().reset_parameters()
        if "skew" in self._parameters:  # torch's constructors call this before there is one
            nn.init.zeros_(self.skew)
            if self.scale is not None:
                nn.init.ones_(self.scale)

    def _init_adapter(self, scale: bool, device: torch.device) -> None:
        # float32 under half-precision weights: a step of 1e-4 is lost beside 1.0 in bfloat16
        kind = {"device": device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        skew_shape, n = self._shapes
        self.skew = nn.Parameter(torch.zeros(skew_shape, **kind))
        self.register_parameter("scale", nn.Parameter(torch.ones(n, **kind)) if scale else None)

    @classmethod
    def _from_base(cls, base: nn.Module, arguments: tuple, options: dict) -> BOFTLayer:
        check_forward(base, cls.BASE)
        if isinstance(base.weight, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"expected an initialised layer, got {type(base).__name__} without a shape yet "
                "(run it once)"
            )
        check_untouched(base)
        # built without memory of its own, then given the storage of the base layer
        layer = cls(*arguments, device="meta", dtype=base.weight.dtype, **options)
        layer.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        if base.bias is not None:
            layer.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        layer._init_adapter(layer.scale is not None, base.weight.device)
        return layer.train(base.training)

    def _to_base(self, arguments: tuple) -> nn.Module:
        layer = self.BASE(*arguments, device="meta", dtype=self.weight.dtype)
        layer.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def _matrix(self) -> torch.Tensor:
        """The weight as (n, d)."""
        return self.weight.flatten(1)

    def options(self) -> dict[str, int | float | str | bool]:
        """The keyword arguments of BOFTLinear or BOFTConv2d that make another layer like this."""
        more = {"kaleidoscope": self.kaleidoscope} if self.kaleidoscope else {}
        return adapter_options(self, self.dropout) | more

    def base_kind(self) -> tuple[str, int]:
        """What is rotated: torch's layer, and its outputs."""
        return self.BASE.__name__, self._shapes[1]

    def _active(self, skew: torch.Tensor) -> torch.Tensor:
        """``skew`` without the factors that ``interpolate`` made the identity."""
        m = self.n_factors - self.n_identity
        if self.n_identity == 0:
            return skew  # a slice would cost a copy in backward
        return skew[:m] if m else torch.zeros_like(skew[:1])

    def _blocks(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        skew = self._active(self.skew)
        return cayley(skew if dtype is None else skew.to(dtype), method=self.method)

    def _rotate_matrix(
        self, matrix: torch.Tensor, blocks: torch.Tensor, back: bool = False
    ) -> torch.Tensor:
        """W R^T (side "in") or R W (side "out"); ``back`` undoes it, for orthogonal blocks."""
        if self.side == "in":
            return multiply(matrix, blocks, self.kaleidoscope, transpose=not back)
        return multiply(matrix.mT, blocks, self.kaleidoscope, transpose=not back).mT

    @property
    def n_effective_parameters(self) -> int:
        """Trainable numbers: those of skew, + n for the scale, + n for a bias that is trained."""
        return sum(p.numel() for p in self.parameters(recurse=False) if p.requires_grad)

    @_exactly
    def rotation(self) -> torch.Tensor:
        """The dense rotation R, (features, features), for inspection; row vectors: y = x R."""
        features = self._shapes[0][1] * self.block_size
        eye = torch.eye(features, dtype=self.skew.dtype, device=self.skew.device)
        return multiply(eye, self._blocks(), self.kaleidoscope)

    @_exactly
    def merged_weight(self) -> torch.Tensor:
        """diag(s) W R^T (side "in") or diag(s) R W, in the shape and dtype of ``weight``.

        Computed in at least float32 and rounded once. If the layer is merged, a copy of ``weight``.
        """
        if self.merged:
            return self.weight.clone()
        wide = torch.promote_types(self.skew.dtype, torch.float32)
        blocks = self._blocks(wide)
        rotated = self._rotate_matrix(self._matrix().to(wide), blocks)
        if self.scale is not None:
            rotated = rotated * self.scale[:, None].to(wide)
        return rotated.to(self.weight.dtype).reshape(self.weight.shape)

    @_exactly
    def merge(self) -> BOFTLayer:
        """Put the merged weight in the place of ``weight``: no rotation at inference.

        The tensor that ``weight`` was is left alone, as other modules may share it.

        Raises:
            RuntimeError: the layer is merged already.
        """
        if self.merged:
            raise RuntimeError("merge: expected an unmerged layer, got one that is merged already")
        self.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        self.merged = True
        self._keep_merged()
        return self

    def _keep_merged(self) -> None:
        # both may be stepped or loaded before unmerge(), which has to undo these
        scale = None if self.scale is None else self.scale.detach().clone()
        self._merged_with = (self.skew.detach().clone(), scale) if self.merged else None

    @_exactly
    def unmerge(self) -> BOFTLayer:
        """Undo ``merge``, up to the rounding of the weight's dtype.

        What is undone is the ``skew`` and ``scale`` that were merged, whatever they are by now.

        Raises:
            RuntimeError: the layer is not merged.
            ValueError: ``scale`` holds a zero, which no division undoes.
        """
        if not self.merged:
            raise RuntimeError("unmerge: expected a merged layer, got one that is not")
        skew, scale = self._merged_with or (self.skew, self.scale)  # not there in old pickles
        wide = torch.promote_types(skew.dtype, torch.float32)
        matrix = self._matrix().to(wide)
        if scale is not None:
            if (scale == 0).any():
                raise ValueError("scale: expected no zero in order to unmerge, got some")
            matrix = matrix / scale[:, None].to(matrix)
        blocks = cayley(self._active(skew).to(matrix), method=self.method)
        if self.method != "exact":  # not orthogonal: the inverse is not the transpose
            blocks = linalg.inverse(blocks).mT
        matrix = self._rotate_matrix(matrix, blocks, back=True)
        weight = matrix.to(self.weight.dtype).reshape(self.weight.shape).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.merged, self._merged_with = False, None
        return self

    def interpolate(self, n: int) -> BOFTLayer:
        """Make the n factors of the largest strides the identity (the paper's Fig. 10).

        From n = 0, the finetuned layer, to n = n_factors, the pretrained weight (still scaled).
        ``skew`` is not changed: ``interpolate(0)`` brings everything back.

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
        trained = self.skew.requires_grad or (self.scale is not None and self.scale.requires_grad)
        if self.training and torch.is_grad_enabled() and trained:
            raise RuntimeError(
                "the layer is merged, so skew and scale would get no gradient: expected unmerge() "
                "before training, or eval() for inference"
            )

    def get_extra_state(self) -> torch.Tensor:
        # a merged weight loaded as an unmerged one would be rotated twice, and unmerging has to
        # undo exactly the factors that were merged
        return torch.tensor([self.merged, self.n_identity], dtype=torch.int64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        merged, self.n_identity = state.tolist()
        self.merged = bool(merged)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # torch copies into the weight in place; where that changes whether it is merged, the
        # storage may be shared with layers that it must not change for
        state, whole = state_dict.get(f"{prefix}_extra_state"), f"{prefix}weight" in state_dict
        if state is not None and bool(state[0]) != self.merged:
            if not whole:
                raise ValueError(
                    f"{prefix}_extra_state: expected merged={self.merged}, as the layer is, in a "
                    "state without its weight, got the other"
                )
            self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if whole:
            self._keep_merged()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged_with is not None:  # of the weight, whatever the parameters are by now
            for name, tensor in zip(("skew", "scale"), self._merged_with, strict=True):
                if tensor is not None:
                    destination[f"{prefix}{name}"] = tensor

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items() if value)
        return f"{super().extra_repr()}, {options}" + (", merged" if self.merged else "")
