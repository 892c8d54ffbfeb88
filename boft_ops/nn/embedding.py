"""BOFTEmbedding: torch's embedding with a frozen table and a rotation of its vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.kaleidoscope import multiply
from .base import BOFTLayer
from .config import Options, RotationConfig

if TYPE_CHECKING:
    from typing_extensions import Self


def _embedding_arguments(embedding: nn.Embedding) -> tuple:
    sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
    return *sizes, embedding.scale_grad_by_freq, embedding.sparse


class BOFTEmbedding(BOFTLayer, nn.Embedding):
    """A frozen ``nn.Embedding`` whose vectors are multiplied by an orthogonal butterfly matrix R.

    It is the linear layer of one-hot rows, whose outputs are rotated: y = E[ids] R^T. A new layer
    equals the frozen one bit for bit, and a padding vector of zeros stays one. There is no scale.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse, device, dtype: as
            for ``nn.Embedding``; max_norm, which changes the table, has no place here.
        block_size: b; must divide embedding_dim, and be even if n_factors > 1.
        n_factors, p_component, p_block, method, kaleidoscope: as for ``BOFTLinear``.
        side: "out" alone.
        scale: False alone.

    Attributes:
        frozen_weight, weight, skew, config: as for ``BOFTLinear``; the weight is
            (num_embeddings, embedding_dim).

    Shape: ids (...), integers -> (..., embedding_dim).

    Raises:
        TypeError, ValueError: as for ``BOFTLinear``.
    """

    BASE, _base_arguments = nn.Embedding, _embedding_arguments
    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 8,
        n_factors: int = 2,
        side: str = "out",
        scale: bool = False,
        p_component: float = 0.0,
        p_block: float = 0.0,
        method: str = "exact",
        kaleidoscope: int = 0,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            device=device,
            dtype=dtype,
        )
        config = RotationConfig(
            block_size=block_size,
            n_factors=n_factors,
            side=side,
            scale=scale,
            p_component=p_component,
            p_block=p_block,
            method=method,
            kaleidoscope=kaleidoscope,
        )
        for name, expected in (("side", "out"), ("scale", False)):
            if (got := getattr(config, name)) != expected:
                raise ValueError(f"{name}: expected {expected!r} of an embedding, got {got!r}")
        self._init_rotation(config)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options: Any) -> Self:
        """Build a BOFT layer that shares the storage of the table of ``embedding``.

        Args:
            embedding: an ``nn.Embedding`` with torch's forward; it is not changed.
            **options: the keyword arguments of the constructor, from block_size on.

        Returns:
            The layer, in the mode (training or evaluation) of ``embedding``.

        Raises:
            TypeError: ``embedding`` is not an nn.Embedding or has a forward of its own, or an
                option has a wrong type.
            ValueError: ``embedding`` has hooks, parametrizations or a max_norm, or an option does
                not fit it.
        """
        if not isinstance(embedding, nn.Embedding):
            got = type(embedding).__name__
            raise TypeError(f"embedding: expected an nn.Embedding, got {got}")
        if embedding.max_norm is not None:
            raise ValueError(
                "embedding: expected max_norm=None, as others change the frozen table, got "
                f"{embedding.max_norm}"
            )
        return cls._from_base(embedding, _embedding_arguments(embedding), options)

    def _to_base(self, weight: nn.Parameter) -> nn.Embedding:
        num_embeddings, dim, padding_idx, scale_grad_by_freq, sparse = self._base_arguments()
        layer = nn.Embedding(
            num_embeddings,
            dim,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            device="meta",
            dtype=weight.dtype,
        )
        layer.weight = weight
        return layer.train(self.training)

    def reset_parameters(self) -> None:
        """Initialize the table as torch does, and the rotation to the identity."""
        with torch.no_grad():
            self.frozen_weight.normal_()
            if self.padding_idx is not None:
                self.frozen_weight[self.padding_idx] = 0
        if "skew" in self._parameters:  # torch's constructor calls this before there is one
            self.reset_adapter()

    @property
    def rotated_features(self) -> int:
        """The number of rotated features, embedding_dim."""
        return self.embedding_dim

    @property
    def _placement(self) -> Options:
        # The table is the transpose of the weight of the linear layer, so R acts on its columns.
        return {"side": "in", "kaleidoscope": self.config.kaleidoscope}

    def describe_base(self) -> tuple[str, int]:
        return self.BASE.__name__, self.embedding_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.merged:
            self._check_trainable()
            return super().forward(ids)
        table = self.frozen_weight
        skew, _ = self.at_strength()
        self._check_numbers(ids)
        blocks = self.dropout(self._blocks(skew))
        y = F.embedding(ids, table, self.padding_idx)
        return multiply(y, blocks, self.config.kaleidoscope, transpose=True)
