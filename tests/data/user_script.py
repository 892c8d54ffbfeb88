# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A user's program, which type checkers read and tests run: each public name, as it is meant."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from typing_extensions import assert_type

import boft_ops
from boft_ops import (
    BOFTConv2d,
    BOFTConv3d,
    BOFTEmbedding,
    BOFTLinear,
    MultiAdapterLinear,
    MultiplicativeDropout,
    OFTLinear,
)
from boft_ops.interop.convert import convert
from boft_ops.interop.peft import accelerate, patched, restore


def operators() -> None:
    x, skew = torch.randn(4, 16), torch.zeros(2, 2, 28)
    blocks = assert_type(boft_ops.cayley(skew), torch.Tensor)
    assert_type(boft_ops.butterfly_matmul(x, blocks, transpose=True), torch.Tensor)
    index = torch.tensor([0, -1, 0, 0])
    assert_type(boft_ops.butterfly_matmul_indexed(x, blocks[None], index), torch.Tensor)
    assert_type(boft_ops.kaleidoscope_matmul(x, blocks[None], blocks[None]), torch.Tensor)
    assert_type(boft_ops.butterfly_groups([skew]), list[torch.Tensor])
    dropped = boft_ops.multiplicative_dropout(blocks, 0.5, 0.5, training=True)
    assert_type(dropped, torch.Tensor)
    y = boft_ops.boft_linear(x, torch.randn(8, 16), skew, side="in", dropout=(0.5, 0.5))
    assert_type(y, torch.Tensor)


def layers() -> None:
    linear = torch.nn.Linear(16, 8)
    layer = assert_type(BOFTLinear.from_linear(linear, block_size=8, n_factors=2), BOFTLinear)
    assert_type(layer.skew, torch.nn.Parameter)
    assert_type(layer.scale_offset, torch.nn.Parameter | None)
    assert_type(layer.scale, torch.Tensor | None)
    assert_type(layer.forward(torch.randn(4, 16)), torch.Tensor)
    assert_type(layer.merge(keep=False), BOFTLinear)
    assert_type(layer.unmerge(), BOFTLinear)
    assert_type(layer.interpolate(1), BOFTLinear)
    assert_type(layer.merged_weight(), torch.Tensor)
    assert_type(layer.rotation(), torch.Tensor)
    assert_type(layer.n_effective_parameters, int)
    assert_type(OFTLinear.from_linear(linear, block_size=4), OFTLinear)
    conv = torch.nn.Conv2d(8, 4, 3)
    assert_type(BOFTConv2d.from_conv(conv, block_size=8, n_factors=1), BOFTConv2d)
    volume = torch.nn.Conv3d(8, 4, 2)
    assert_type(BOFTConv3d.from_conv(volume, block_size=8, n_factors=1), BOFTConv3d)
    embedding = BOFTEmbedding.from_embedding(torch.nn.Embedding(8, 16), block_size=4)
    assert_type(embedding.set_strength(0.5), BOFTEmbedding)
    assert_type(MultiplicativeDropout(0.5, 0.5), MultiplicativeDropout)


def models() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    options: dict[str, Any] = {"block_size": 4, "n_factors": 1}
    assert_type(boft_ops.adapt(model, ["0"], **options), torch.nn.Module)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        boft_ops.save_adapter(model, file)
        boft_ops.load_adapter(model, str(file))
        convert(file, Path(folder) / "peft", "peft", base=model)
        merged = boft_ops.merge_adapters([file, str(file), model], [1, 2, 0.5], how="karcher")
        merged.save(file)
        boft_ops.load_adapter(model, merged)
    with boft_ops.cache_merged(model) as cache:
        assert_type(cache, boft_ops.MergedCache)
        assert_type(cache.nbytes + cache.held_bytes, int)
        cache.drop()
    assert_type(boft_ops.set_strength(model, 0.5), torch.nn.Module)
    torch.optim.AdamW(boft_ops.param_groups(model, lr=1e-3, weight_decay=0.01))
    assert_type(boft_ops.unload(model), torch.nn.Module)
    assert_type(boft_ops.merge(boft_ops.adapt(model, "all-linear", **options)), torch.nn.Module)


def peft(model: torch.nn.Module) -> torch.nn.Module:
    with patched():
        assert_type(accelerate(model), torch.nn.Module)
    return restore(model)


def adapters() -> None:
    layer = MultiAdapterLinear(torch.nn.Linear(16, 8))
    layer.add_adapter("one", block_size=4)
    assert_type(layer.names, tuple[str, ...])
    y = layer.forward(torch.randn(2, 16), layer.index_of(["one", None]))
    assert_type(y, torch.Tensor)


def mistakes() -> None:
    """Show that what a checker should refuse is refused: else the comments would be unused."""
    boft_ops.cayley([0.0])  # type: ignore[arg-type]
    boft_ops.boft_linear(torch.zeros(1), torch.zeros(1))  # type: ignore[call-arg]
    BOFTLinear(16, 8, block_size="8")  # type: ignore[arg-type]
    MultiAdapterLinear(16)  # type: ignore[arg-type]


if __name__ == "__main__":
    operators()
    layers()
    models()
    adapters()
