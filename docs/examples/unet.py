#!/usr/bin/env python3
"""Finetune a UNet of diffusers to denoise, with boft_ops.adapt, and weaken what it learned.

    python docs/examples/unet.py --steps 50

No package holds the weights of a diffusion model, so a small UNet with random weights stands in.
For a real one replace `build()` by `UNet2DConditionModel.from_pretrained(..., subfolder="unet")`
and `latents` by the encoded images. docs/examples/recipes.md explains the choices.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.functional import mse_loss

import boft_ops

# The linear layers of the attention blocks. Any attention processor calls them, so that it sees
# their rotated form.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def build() -> nn.Module:
    """Make a small UNet of Stable Diffusion's kind with random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def denoising_loss(unet: nn.Module, latents: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Add noise of a random strength, and compare the noise that the UNet finds with it."""
    scheduler = DDPMScheduler()
    noise = torch.randn_like(latents)
    times = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
    noisy = scheduler.add_noise(latents, noise, times)
    return mse_loss(unet(noisy, times, prompts).sample, noise)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of BOFT(2, 8)")
    parser.add_argument("--out", type=Path, default=Path("build/unet.safetensors"))
    args = parser.parse_args(argv)
    unet = build()
    latents, prompts = torch.randn(4, 4, 16, 16), torch.randn(4, 8, 32)

    boft_ops.adapt(unet, ATTENTION, block_size=8, n_factors=2)
    optimizer = torch.optim.AdamW(boft_ops.param_groups(unet, lr=args.rate), lr=args.rate)
    unet.train()
    losses = []
    for _ in range(args.steps):
        loss = denoising_loss(unet, latents, prompts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    boft_ops.save_adapter(unet, args.out)

    unet.eval()
    times = torch.full((4,), 500)
    with torch.no_grad():
        outputs = [
            boft_ops.set_strength(unet, t)(latents, times, prompts).sample for t in (0, 0.5, 1)
        ]
    way = [float((y - outputs[0]).norm()) for y in outputs[1:]]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; half the strength is {way[0] / way[1]:.2f}")
    boft_ops.merge(unet)  # plain layers, for any pipeline
    return losses


if __name__ == "__main__":
    main()
