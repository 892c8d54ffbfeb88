"""Butterflies of many layers as dense groups, made in one launch."""

import pytest
import torch

from boft_ops import boft_linear, butterfly_groups, butterfly_matmul, cayley
from boft_ops._runtime import backend as backends


def skews(m, b, counts=(1, 3, 2), dtype=torch.float64):
    return [
        (0.4 * torch.randn(m, n << (m - 1), b * (b - 1) // 2, dtype=dtype)).requires_grad_()
        for n in counts
    ]


@pytest.mark.parametrize(("m", "b"), [(1, 3), (1, 8), (2, 8), (3, 4)])
@pytest.mark.exhaustive_if(condition=lambda backend, m, b: backend == "triton" and m == 3)
def test_they_are_the_groups_of_each_butterfly(backend, m, b):
    several = skews(m, b)
    drop_masks = [None, torch.rand(several[1].shape[:2]) < 0.5, None]
    for masks in (None, drop_masks):
        stages = butterfly_groups(several, masks)
        for i, (skew, stage) in enumerate(zip(several, stages, strict=True)):
            blocks = cayley(skew)
            if masks and masks[i] is not None:
                eye = torch.eye(b, dtype=blocks.dtype)
                blocks = torch.where(masks[i][..., None, None], eye, blocks)
            eye = torch.eye(skew.shape[1] * b, dtype=torch.float64)
            dense = butterfly_matmul(eye, blocks)
            torch.testing.assert_close(torch.block_diag(*stage), dense)
            upstream = torch.randn_like(stage)
            got = torch.autograd.grad(stage, skew, upstream, retain_graph=True)
            want = torch.autograd.grad(dense, skew, torch.block_diag(*upstream))
            torch.testing.assert_close(got, want)


def test_one_launch_for_all(monkeypatch):
    calls = []
    real = backends.Op.__call__
    monkeypatch.setattr(
        backends.Op, "__call__", lambda self, *a: calls.append(self.name) or real(self, *a)
    )
    stages = butterfly_groups(skews(2, 8))
    sum(stage.sum() for stage in stages).backward()
    assert calls == ["stage_from_skew", "stage_from_skew_backward"]


def test_gradients_of_gradients():
    several = skews(2, 4, (1, 2))
    assert torch.autograd.gradgradcheck(
        lambda *s: tuple(butterfly_groups(s)), several, fast_mode=True
    )


def test_float16_is_computed_in_float32():
    (stage,) = butterfly_groups(skews(2, 8, (2,), torch.float16))
    assert stage.dtype == torch.float32
    torch.testing.assert_close(stage @ stage.mT, torch.eye(16).expand(2, 16, 16))


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_layer_with_a_given_rotation(side):
    x, weight = torch.randn(5, 32, dtype=torch.float64), torch.randn(32, 32, dtype=torch.float64)
    scale, bias = torch.randn(2, 32, dtype=torch.float64)
    (skew,) = skews(2, 8, (2,))
    arguments = [t.requires_grad_() for t in (x, scale, bias)]

    def run(**options):
        y = boft_linear(x, weight, skew, scale, bias, side=side, **options)
        return y, *torch.autograd.grad(y, [*arguments, skew], torch.ones_like(y) + y.detach())

    for got, want in zip(run(rotation=butterfly_groups([skew])[0]), run(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([torch.zeros(2, 4, 28), torch.zeros(1, 4, 28)],), ValueError, r"skews\[1\]: expected sh"),
        (([torch.zeros(2, 4, 28), torch.zeros(2, 4, 28).double()],), TypeError, r"skews\[1\]"),
        (([torch.zeros(2, 3, 28)],), ValueError, "n_factors"),
        (([torch.zeros(4, 8, 120)],), ValueError, r"<= 64 features, got 128"),
        (([torch.zeros(2, 4, 28)], []), ValueError, "drop_masks: expected 1"),
        (
            ([torch.zeros(2, 4, 28)], [torch.zeros(2, 4)]),
            TypeError,
            r"drop_masks\[0\]: expected a bool",
        ),
        (([torch.zeros(2, 4, 28)], [[True]]), TypeError, r"drop_masks\[0\]: .* got list"),
        (
            ([torch.zeros(2, 4, 28)], [torch.zeros(2, 5) > 0]),
            ValueError,
            r"drop_masks\[0\]: .*\(2, 4\)",
        ),
        (([torch.zeros(2, 4, 28)], [torch.zeros(2, 4, device="meta") > 0]), ValueError, "its skew"),
        ((["skew"],), TypeError, r"skews\[0\]: expected a torch.Tensor"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        butterfly_groups(*arguments)


def test_bad_rotation_of_a_layer():
    x, weight, skew = torch.randn(2, 16), torch.randn(4, 16), torch.zeros(2, 2, 28)
    with pytest.raises(
        ValueError, match=r"rotation: expected shape \(1, 16, 16\), got \(2, 8, 8\)"
    ):
        boft_linear(x, weight, skew, rotation=torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="dropout: expected None beside a rotation"):
        boft_linear(x, weight, skew, rotation=torch.zeros(1, 16, 16), dropout=(0.5, 0.5))
