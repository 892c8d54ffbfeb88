"""A stand-in for PEFT after its pull request 3540, written from the description of the request.

BOFT then rotates activations in plain torch: no CUDA extension, permutations as integer buffers
``boft_P`` and ``boft_P_inv`` (m, d), any number of factors everywhere.
"""

import torch
from peft.tuners.boft import layer as peft_boft
from torch import nn
from torch.nn import functional as F

GONE = ("get_fbd_cuda", "_FBD_CUDA", "FastBlockDiag", "patch_environment")


def install(monkeypatch):
    """Give PEFT's modules the interface of the pull request until ``monkeypatch`` is undone."""
    for name in GONE:
        monkeypatch.delattr(peft_boft, name)
    monkeypatch.delattr(peft_boft.BOFTLayer, "perm2mat")
    for owner, update in ((peft_boft.BOFTLayer, _update_linear), (peft_boft.Conv2d, _update_conv)):
        monkeypatch.setattr(owner, "update_layer", update)
    for owner, forward in ((peft_boft.Linear, _linear_forward), (peft_boft.Conv2d, _conv_forward)):
        monkeypatch.setattr(owner, "forward", forward)
        monkeypatch.setattr(owner, "get_delta_weight", _dense)


def _update_linear(self, adapter_name, config, **kwargs):
    _add(self, adapter_name, config, self.in_features, (self.out_features, 1))


def _update_conv(self, adapter_name, config, **kwargs):
    features = self.get_base_layer().weight[0].numel()
    _add(self, adapter_name, config, features, (1, self.out_features))


def _add(self, name, config, d, scale_shape):
    m, b = config.boft_n_butterfly_factor, config.boft_block_size or d // config.boft_block_num
    n_blocks = d // b
    if d % b or n_blocks % (1 << m - 1):
        raise ValueError(f"Invalid combination of {d} features, {m} factors and block size {b}")
    orders = torch.stack(
        [self.block_butterfly_perm(d, n_blocks >> i, b // 2, m - 1) for i in range(m)]
    )
    self.register_buffer("boft_P", orders, persistent=False)
    self.register_buffer("boft_P_inv", orders.argsort(-1), persistent=False)
    p = config.boft_dropout
    self.boft_dropout[name] = peft_boft.MultiplicativeDropoutLayer(p) if p else nn.Identity()
    self.boft_R[name] = nn.Parameter(torch.zeros(m, n_blocks, b, b))
    self.boft_s[name] = nn.Parameter(torch.ones(scale_shape))
    self.reset_boft_parameters(name, config.init_weights)
    self.boft_block_size[name], self.boft_block_num[name] = b, n_blocks
    self._move_adapter_to_device_of_base_layer(name)
    self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


def _blocks(self, name, dropped=False):
    R = self.boft_R[name]
    blocks = self.cayley_batch(R.flatten(0, 1)).view(R.shape)
    return self.boft_dropout[name](blocks) if dropped else blocks


def _rotate(self, x, blocks):
    """The rows of x times the product of all factors."""
    _, n_blocks, b, _ = blocks.shape
    for i in reversed(range(len(blocks))):
        gathered = x[..., self.boft_P_inv[i]].unflatten(-1, (n_blocks, b))
        x = torch.einsum("...kb,kbc->...kc", gathered, blocks[i]).flatten(-2)[..., self.boft_P[i]]
    return x


def _dense(self, name):
    blocks = _blocks(self, name)
    scale = self.boft_s[name].reshape(-1, 1)
    return _rotate(self, torch.eye(self.boft_P.shape[1]), blocks), scale


def _own(self):
    return [name for name in self.active_adapters if name in self.boft_R]


def _linear_forward(self, x, *args, **kwargs):
    if self.disable_adapters and self.merged:
        self.unmerge()
    if self.disable_adapters or self.merged:
        return self.base_layer(x, *args, **kwargs)
    dtype, scale = x.dtype, 1.0
    blocks = {name: _blocks(self, name, dropped=True) for name in _own(self)}
    for name in reversed(_own(self)):
        x = _rotate(self, x, blocks[name].to(x))
        scale = scale * self.boft_s[name].flatten()
    bias = 0 if self.base_layer.bias is None else self.base_layer.bias
    return ((self.base_layer(x, *args, **kwargs) - bias) * scale + bias).to(dtype)


def _conv_forward(self, x, *args, **kwargs):
    if self.disable_adapters and self.merged:
        self.unmerge()
    if self.disable_adapters or self.merged:
        return self.base_layer(x, *args, **kwargs)
    base = self.base_layer
    weight = base.weight.flatten(1)
    for name in _own(self):
        eye = torch.eye(weight.shape[1])
        rotation = _rotate(self, eye, _blocks(self, name, dropped=True))
        weight = (rotation @ weight.T).T * self.boft_s[name].reshape(-1, 1)
    return F.conv2d(x, weight.view_as(base.weight), base.bias, base.stride, base.padding)
