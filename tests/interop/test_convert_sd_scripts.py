"""Files of kohya's sd-scripts, against the formulas of its networks in float64."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from boft_ops import load_adapter
from boft_ops.interop.convert import convert, read_checkpoint

BASE = nn.ModuleDict({"to_q": nn.Linear(16, 24), "conv": nn.Conv2d(4, 8, 2)})


def merged(path, tmp_path, **options):
    """The weights of the model that our conversion makes."""
    convert(path, tmp_path / "ours", "boft_ops", base=BASE, **options)
    model = load_adapter(copy.deepcopy(BASE), tmp_path / "ours")
    return {name: layer.merged_weight().double() for name, layer in model.items()}


def check(got, rotated, rtol=1e-5, atol=1e-6):
    for name, weight in rotated.items():
        torch.testing.assert_close(got[name], weight.double(), rtol=rtol, atol=atol)
        assert (weight - BASE[name].weight).abs().max() > 0.01


def factor(d, b, i, blocks):
    """One butterfly factor of boft as a matrix: chunks b/2 apart by 2^i come together."""
    r, matrix = b // 2, torch.zeros(d, d, dtype=torch.float64)
    for k, block in enumerate(blocks):
        g, c = divmod(k, 1 << i)
        chunks = [(g * (2 << i) + c) * r, (g * (2 << i) + c + (1 << i)) * r]
        place = torch.cat([torch.arange(start, start + r) for start in chunks])
        matrix[place[:, None], place] = block
    return matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 2])
def test_boft(m, dtype, tmp_path):
    """W' = diag(s) (R W^T)^T with R = F_{m-1} ... F_0, blocks (I - S)(I + S)^-1."""
    torch.manual_seed(0)
    tensors, rotated, b = {}, {}, 4
    for name, layer in BASE.items():
        weight = layer.weight.detach().double().flatten(1)
        n, d = weight.shape
        boft_R = (0.5 * torch.randn(m, d // b, b, b)).to(dtype)
        boft_s = (1 + 0.2 * torch.randn(n, 1)).to(dtype)  # a column for convolutions, too
        tensors |= {f"lora_unet_{name}.boft_R": boft_R, f"lora_unet_{name}.boft_s": boft_s}
        skew = 0.5 * (boft_R.double() - boft_R.double().mT)
        eye = torch.eye(b, dtype=torch.float64)
        blocks = (eye - skew) @ torch.linalg.inv(eye + skew)
        rotation = torch.eye(d, dtype=torch.float64)
        for i in range(m):
            rotation = factor(d, b, i, blocks[i]) @ rotation
        rotated[name] = ((rotation @ weight.T).T * boft_s.double()).view_as(layer.weight)
    save_file(tensors, tmp_path / "boft.safetensors")
    check(merged(tmp_path / "boft.safetensors", tmp_path), rotated)


@pytest.mark.parametrize("alpha", [1e-2, 1e3, 0.0])
@pytest.mark.parametrize("prefix", ["oft_unet", "lora_unet"])
def test_the_first_oft(alpha, prefix, tmp_path):
    """W' = R^T W, R = (I + Q)(I - Q)^-1, the norm of Q at most alpha n: at alpha = 0, the base."""
    torch.manual_seed(0)
    tensors, rotated = {}, {}
    for name, layer in BASE.items():
        weight = layer.weight.detach().double()
        n, n_blocks = len(weight), 4
        oft_blocks = torch.randn(n_blocks, n // n_blocks, n // n_blocks)
        tensors |= {
            f"{prefix}_{name}.oft_blocks": oft_blocks,
            f"{prefix}_{name}.alpha": torch.tensor(alpha),
        }
        q = oft_blocks.double() - oft_blocks.double().mT
        norm = q.norm()
        q = q * (min(norm, torch.tensor(alpha).double() * n) + 1e-8) / (norm + 1e-8)
        eye = torch.eye(n // n_blocks, dtype=torch.float64)
        rotation = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q)))
        rotated[name] = (rotation.T @ weight.flatten(1)).view_as(layer.weight)
    save_file(tensors, tmp_path / "oft.safetensors", {"ss_network_module": "networks.oft"})
    got = merged(tmp_path / "oft.safetensors", tmp_path)
    if alpha:
        check(got, rotated, atol=1e-5)
    else:  # LyCORIS takes 0 for no bound
        for name, layer in BASE.items():
            torch.testing.assert_close(got[name], layer.weight.double(), rtol=1e-5, atol=1e-6)
        save_file(tensors, tmp_path / "oft.safetensors")
        as_lycoris = read_checkpoint(
            tmp_path / "oft.safetensors", base=BASE, source_format="lycoris"
        )
        assert as_lycoris.layers["to_q"].skew.norm() > 1


def test_oft_of_flux_has_blocks_for_each_of_q_k_and_v(tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"qkv": nn.Linear(6, 24)})
    parts = [torch.randn(2, 4, 4) for _ in range(3)]
    tensors = {f"oft_unet_qkv.oft_blocks.{i}": part for i, part in enumerate(parts)}
    path = tmp_path / "flux.safetensors"
    save_file(tensors | {"oft_unet_qkv.alpha": torch.tensor(0.2)}, path)
    convert(path, tmp_path / "ours", "boft_ops", base=base)
    got = load_adapter(copy.deepcopy(base), tmp_path / "ours")["qkv"].merged_weight()
    want, eye = [], torch.eye(4, dtype=torch.float64)
    for part, rows in zip(parts, base["qkv"].weight.detach().double().split(8), strict=True):
        q = part.double() - part.double().mT
        q = q * min(1.0, 0.2 * 8 / q.norm().item())  # each part has a bound of its own
        rotation = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q)))
        want.append(rotation.T @ rows)
    torch.testing.assert_close(got.double(), torch.cat(want), rtol=1e-5, atol=1e-6)
    # linear1 of a single block: the parts of q, k, v and those of the MLP have other sizes
    tensors["oft_unet_qkv.oft_blocks.3"] = torch.randn(2, 6, 6)
    save_file(tensors | {"oft_unet_qkv.alpha": torch.tensor(0.2)}, path)
    with pytest.raises(ValueError, match=r"blocks of one size in a layer, .* with 2 sizes"):
        convert(path, tmp_path / "out", "boft_ops", base=base)


def test_metadata_tell_what_names_do_not(tmp_path):
    tensors = {"lora_unet_to_q.oft_R.weight": torch.zeros(4, 6)}
    path = tmp_path / "v2.safetensors"
    save_file(tensors, path, {"ss_network_module": "networks.oft_v2", "ss_tag": json.dumps({})})
    assert set(read_checkpoint(path, base=BASE).layers) == {"to_q"}
    with pytest.raises(ValueError, match="expected the format onetrainer, got that of sd-scripts"):
        read_checkpoint(path, base=BASE, source_format="onetrainer")
    with pytest.raises(ValueError, match="source_format: expected one of"):
        read_checkpoint(path, base=BASE, source_format="kohya")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"boft_R": torch.ones(1, 4, 4, 4)}, "expected oft_R.weight, or boft_R and boft_s"),
        ({"boft_R": torch.ones(1, 4, 4, 3), "boft_s": torch.ones(24, 1)}, "boft_R: expected"),
        ({"boft_R": torch.ones(1, 4, 4, 4), "boft_s": torch.ones(24)}, r"expected \(n, 1\)"),
        ({"boft_R": torch.ones(1, 4, 4, 4), "boft_s": torch.ones(23, 1)}, "scale: expected shape"),
        ({"boft_R": torch.ones(2, 2, 8, 8), "boft_s": torch.ones(24, 1), "alpha": torch.ones(1)},
         "expected oft_R.weight, or"),
        ({"oft_blocks.0": torch.ones(4, 6, 6)}, "or oft_blocks and alpha, got"),
        ({"oft_blocks.0": torch.ones(2, 4, 6, 6), "alpha": torch.ones(())}, r"expected \(K, b"),
        ({"oft_blocks.0": torch.ones(4, 6, 6), "alpha": -torch.ones(())}, "alpha: expected one"),
        ({"oft_blocks.0": torch.ones(3, 6, 6), "alpha": torch.ones(())}, "a rotation of 24"),
        ({"boft_R": torch.full((1, 4, 4, 4), torch.nan), "boft_s": torch.ones(24, 1)}, "finite"),
    ],
)  # fmt: skip
def test_what_is_refused(tensors, match, tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({f"lora_unet_to_q.{part}": t for part, t in tensors.items()}, path)
    before = load_file(path).keys()
    with pytest.raises(ValueError, match=match):
        convert(path, tmp_path / "out", "boft_ops", base=BASE)
    assert load_file(path).keys() == before
    assert not (tmp_path / "out").exists()
