"""Weights that are no plain tensors: F.linear sees them, and nothing else touches them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing

from boft_ops import BOFTLinear, boft_linear


class Quantized(torch.Tensor):
    """Integers with one step; like torchao's tensors it implements the product and little else."""

    @staticmethod
    def __new__(cls, numbers, step, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=dtype)

    def __init__(self, numbers, step, dtype):
        self.numbers, self.step = numbers, step

    def __tensor_flatten__(self):
        return ["numbers"], (self.step, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, tensors, meta, outer_size, outer_stride):
        return cls(tensors["numbers"], *meta)

    def dense(self):
        return self.numbers.to(self.dtype) * self.step

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dense(), *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            new = cls(args[0].numbers, args[0].step, args[0].dtype)
            return return_and_correct_aliasing(op, args, kwargs or {}, new)
        raise NotImplementedError(f"{op}: not of quantized tensors")


def quantized(n, d, dtype):
    return Quantized(torch.randint(-9, 9, (n, d), dtype=torch.int8), 0.05, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("rows", [1, 63, 64, 256])
def test_outputs_and_gradients_are_those_of_the_dense_weight(rows, side, dtype):
    weight = quantized(64, 64, dtype)
    skew, scale = 0.1 * torch.randn(2, 8, 28), 1 + 0.1 * torch.randn(64)
    inputs = [torch.randn(rows, 64), skew, scale, torch.randn(64)]
    inputs = [t.to(dtype if i in (0, 3) else t.dtype) for i, t in enumerate(inputs)]
    x, skew, scale, bias = (t.requires_grad_() for t in inputs)
    upstream = torch.randn(rows, 64).to(dtype)
    results = []
    for w in (weight, weight.dense()):
        y = boft_linear(x, w, skew, scale, bias, side=side)
        results.append([y, *torch.autograd.grad(y, inputs, upstream)])
    eps = torch.finfo(dtype).eps
    for ours, dense in zip(*results, strict=True):
        assert (ours - dense).norm() <= 8 * eps * dense.norm()


@pytest.mark.parametrize("rows", [8, 128])
def test_a_layer_whose_weight_is_quantized_after_adapting(rows):
    layer = BOFTLinear(64, 64, block_size=8)
    torch.nn.init.normal_(layer.skew, std=0.1)
    x, weight = torch.randn(rows, 64), quantized(64, 64, torch.float32)
    layer.frozen_weight.data.copy_(weight.dense())
    want = layer(x)
    layer._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x), want)
