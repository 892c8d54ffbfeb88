"""The functions inside torch's machinery: raw ops, compile, vmap and grad, checkpointing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from boft_ops import (
    BOFTConv2d,
    BOFTLinear,
    boft_linear,
    butterfly_matmul,
    butterfly_matmul_indexed,
    cayley,
    multiplicative_dropout,
)
from boft_ops._runtime import backend as backends
from boft_ops._runtime.namespace import NS

raw = getattr(torch.ops, NS)


def rotations(m=3, b=4, d=32):
    return cayley(0.3 * torch.randn(m, d // b, b * (b - 1) // 2))


def samples():
    """Arguments of every raw op, contiguous and not."""
    skew = 0.2 * torch.randn(2, 4, 28)
    drop = torch.tensor([[True, False, False, True]] * 2)
    blocks = rotations()
    dropped = torch.rand(3, 8) < 0.5
    stage, stage1 = raw.compose(blocks, 0), raw.compose(blocks[1:], 1)
    x, g = torch.randn(5, 32), torch.randn(32, 5).T
    weight, scale, bias = torch.randn(6, 32), torch.randn(6), torch.randn(6)
    y, rows = torch.randn(5, 6), torch.tensor([1, 1, -1, 0, 1], dtype=torch.int32)
    numbers = raw.linear_from_skew(x, weight, skew, drop, None, 0, None, False, False)[2]
    ends = torch.tensor([1, 1, 4], dtype=torch.int32)  # an empty segment, a row in none
    return {
        "cayley": [
            *[(skew, None), (skew.transpose(0, 1), drop.T), (skew.bfloat16(), None)],
            (skew[:0], None),
        ],
        "cayley_backward": [(blocks, None, torch.randn_like(blocks)), (blocks.mT, dropped, blocks)],
        "cayley_neumann5": [(skew,), (skew.double(),)],
        "cayley_neumann5_backward": [(skew, cayley(skew))],
        "compose": [(blocks, 0), (blocks[1:], 1), (blocks[:1], 0)],
        "compose_backward": [(blocks, stage[None], 0), (blocks[1:], stage1.mT[None], 1)],
        "stage_from_skew": [(skew, None), (skew.double(), drop)],
        "stage_from_skew_backward": [
            (blocks, None, stage[None]),
            (blocks, dropped, stage.mT[None]),
        ],
        "rotate": [(x, stage, 2, 1, False), (g, stage1, 2, 2, True), (x[:0], stage, 2, 1, True)],
        "rotate_indexed": [
            (x, torch.stack([stage, stage.mT]), rows, 2, 1, False),
            (g, torch.stack([stage1, stage1]).mT, rows, 2, 2, True),
            (x[:0], stage[None], rows[:0], 2, 1, True),
        ],
        "segment_stage_grads": [
            *[(x, g, ends, 16, 2, 1, 1), (x, g, ends, 8, 2, 2, 1)],
            *[(g.double(), x.double(), ends, 16, 2, 1, 1), (x, g, ends[:0], 16, 2, 1, 1)],
        ],
        "rotate_backward": [
            *[(x, g, stage, 2, 1, False, 1), (g, x, stage1, 2, 2, True, 1)],
            (x.bfloat16(), g.bfloat16(), stage, 2, 1, False, 1),
        ],
        "scale": [(x, x[0], None, None), (g, x[0], x[1], g[0]), (x[:0], x[0], x[1], x[2])],
        "scale_backward": [(x, x + 1, x[0], None), (g, x, g[0], x[1]), (x[:0], x[:0], x[0], x[1])],
        "rotate_stage_grad": [
            *[(x, g, 16, 2, 1, 1), (x, g, 8, 2, 2, 1)],
            (x.double(), g.double(), 16, 2, 1, 1),
        ],
        "rotated_linear": [
            (x, weight, stage, scale, bias, False, True),
            (x, weight, stage, scale, bias, True, True),
            (g, weight, stage, None, bias, False, True),
            (g, weight, stage, scale, bias, False, False),
        ],
        "rotated_linear_backward": [
            (y, x, weight, stage, scale, None, y, 1, True),
            (y, x, weight, stage, scale, bias, y, 1, False),
            (y, g, weight, stage, None, None, None, 1, True),
            (y, g, weight, stage, scale, None, None, 1, False),
        ],
        "linear_from_skew": [
            (x, weight, skew, None, scale, 1, bias, True, False),
            (g[None], weight, skew.mT.contiguous().mT, drop, None, 0, None, False, False),
            (x.repeat(20, 1), weight, skew, drop, scale, 1, None, False, True),
            (x, weight, skew, None, scale, 0, bias, True, False),
        ],
        "linear_from_skew_backward": [
            (y, x, weight, skew, numbers, None, scale, 1, bias, y, False, 1, True, False),
            (y, g, weight, skew, numbers, drop, scale, 0, None, y, True, 1, False, True),
            (y, g, weight, skew, numbers, drop, scale, 1, bias, y, True, 1, True, False),
            (y[None], x[None], weight, skew, numbers, drop, None, 0, *[None] * 2, False, 1, False,
             False),
        ],
    }  # fmt: skip


def test_samples_cover_every_op():
    assert samples().keys() == backends.ops().keys()


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(raw, name), arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["unscaled", "scaled", "trained"])
def test_the_fake_of_a_batched_layer(kind, dtype):
    """With the bias in z, where no CPU kernel is: shapes and dtypes are the reference's."""
    x, weight, bias, grad = (torch.randn(s).to(dtype) for s in ((5, 32), (6, 32), (6,), (5, 6)))
    wide = torch.promote_types(dtype, torch.float32)
    stage, scale = torch.randn(2, 16, 16, dtype=wide), torch.randn(6, dtype=wide)
    scale = None if kind == "unscaled" else scale
    forward = x, weight, stage, scale, bias, True, kind == "trained"
    z = grad if kind == "trained" else None
    calls = {"rotated_linear": [forward]}
    calls["rotated_linear_backward"] = [
        (grad, x, weight, stage, scale, bias, z, 2, need_bias) for need_bias in (False, True)
    ]
    for name, several in calls.items():
        for arguments in several:
            expected = backends.ops()[name].reference(*arguments)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
                got = getattr(raw, name)(*fakes)
            for ours, theirs in zip(got, expected, strict=True):
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def functions():
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    skew = 0.3 * torch.randn(3, 8, 6)
    skew_out = 0.3 * torch.randn(2, 4, 6)
    scale, bias = torch.randn(16), torch.randn(16)
    blocks = rotations()
    return {
        "cayley": (cayley, (skew,)),
        "neumann5": (lambda s: cayley(s, method="neumann5"), (skew,)),
        "butterfly": (butterfly_matmul, (x, blocks)),
        "butterfly_t": (lambda x, b: butterfly_matmul(x, b, transpose=True), (x, blocks)),
        "two stages": (butterfly_matmul, (torch.randn(3, 512), rotations(8, 4, 512))),
        "indexed": (
            lambda x, b: butterfly_matmul_indexed(
                x, b, torch.tensor([1, -1, 0, 1], device=x.device)
            ),
            (x, torch.stack([blocks, rotations()])),
        ),
        "linear": (boft_linear, (x, weight, skew, scale, bias)),
        "linear_out": (
            lambda *a: boft_linear(*a, side="out"),
            (x, weight, skew_out, scale, bias),
        ),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", functions())
def test_compile_fullgraph(name, dynamic):
    function, arguments = functions()[name]
    arguments = [a.requires_grad_() for a in arguments]
    expected = function(*arguments)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, arguments, upstream)
    torch._dynamo.reset()
    # Tracing, fakes and the joint graph are what could break; Inductor has a test of its own below,
    # as its C++ takes seconds per kernel to compile.
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = compiled(*arguments)
    torch.testing.assert_close(got, expected)
    for g, w in zip(torch.autograd.grad(got, arguments, upstream), grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_one_compiled_graph_for_any_number_of_rows():
    """As many as the kernel for the whole layer takes: its fakes keep symbolic rows symbolic."""
    _, (_, weight, skew, scale, bias) = functions()["linear"]
    skew.requires_grad_()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(boft_linear, fullgraph=True, dynamic=True, backend=counter)
    for rows in (100, 130, 170):
        compiled(torch.randn(rows, 32), weight, skew, scale, bias).sum().backward()
    assert counter.frame_count == 1


def test_an_exported_layer_takes_any_number_of_rows():
    layer = BOFTLinear(32, 16, block_size=4)
    torch.nn.init.normal_(layer.skew, std=0.2)
    rows = {"x": {0: torch.export.Dim("rows", min=2)}}
    exported = torch.export.export(layer, (torch.randn(100, 32),), dynamic_shapes=rows).module()
    for n in (3, 130):
        x = torch.randn(n, 32)
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_the_linear_function():
    x, arguments = torch.randn(100, 32), functions()["linear"][1][1:]
    expected = boft_linear(x, *arguments)
    for traced in (
        torch.jit.trace(lambda x: boft_linear(x, *arguments), x),
        make_fx(lambda x: boft_linear(x, *arguments))(x),
    ):
        torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, *arguments)]
        assert boft_linear(*fake).shape == expected.shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_traced_layer_takes_an_adapter_that_comes_later(dtype):
    """The shortcut for the identity, which a new layer is, depends on data that a trace is not for.

    torch traces a second time under no_grad, and compares the two graphs.
    """
    layer, x = BOFTLinear(32, 16, block_size=4, dtype=dtype), torch.randn(70, 32, dtype=dtype)
    traced = torch.jit.trace(layer, (x,))
    torch.nn.init.normal_(layer.skew, std=0.3)
    torch.nn.init.normal_(layer.scale_offset, std=0.3)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "compiler"), [("reference", "aot_eager"), (None, "inductor")])
def test_compile_a_training_step_of_layers(backend, compiler):
    with backends.force(backend):
        model = torch.nn.Sequential(
            BOFTConv2d(4, 8, 2, block_size=4),
            torch.nn.Flatten(),
            BOFTLinear(8 * 9, 16, block_size=4, p_component=0.5, p_block=0.5),
            BOFTLinear(16, 8, block_size=4, side="out", scale=False),
        )
        for name, parameter in model.named_parameters():
            if name.endswith("skew"):
                torch.nn.init.normal_(parameter, std=0.2)
        x = torch.randn(3, 4, 4, 4)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        compiled(x).square().sum().backward()  # with dropout: runs, and reaches every parameter
        assert all(p.grad is not None for p in trained)
        model.eval()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiled_and_eager_draw_dropout_alike_in_distribution():
    blocks = torch.full((4, 16, 2, 2), 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda b: multiplicative_dropout(b, 0.5, 0.25, training=True),
        fullgraph=True,
        backend="aot_eager",
    )
    out = compiled(blocks)
    dropped = (out == torch.eye(2)).all(-1).all(-1).sum(1)
    assert sorted(dropped.tolist()) == [0, 0, 4, 4]


@pytest.mark.parametrize("backend", ["reference", None])
def test_func_transforms(backend):
    with backends.force(backend):
        layer = BOFTLinear(32, 16)
        torch.nn.init.normal_(layer.skew, std=0.2)
        parameters = {k: v.detach() for k, v in layer.named_parameters()}

        def loss(parameters, x):
            return functional_call(layer, parameters, (x,)).square().sum()

        x = torch.randn(5, 32)
        per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        trained = (layer.skew, layer.scale_offset)
        for i in range(5):
            want = torch.autograd.grad(layer(x[i]).square().sum(), trained)
            for name, gradient in zip(("skew", "scale_offset"), want, strict=True):
                torch.testing.assert_close(per_sample[name][i], gradient, rtol=1e-4, atol=1e-4)


def test_vmap_of_every_backend(backend):
    skew = 0.3 * torch.randn(3, 2, 4, 6)
    torch.testing.assert_close(vmap(cayley)(skew), cayley(skew))


def test_vmap_over_blocks():
    """One rotation per sample, as for a batch of adapters."""
    blocks = torch.stack([rotations(), rotations()])
    x = torch.randn(2, 6, 32)
    got = vmap(butterfly_matmul)(x, blocks)
    want = torch.stack([butterfly_matmul(a, b) for a, b in zip(x, blocks, strict=True)])
    torch.testing.assert_close(got, want)


def test_activation_checkpointing_with_dropout():
    layer = BOFTLinear(32, 16, p_component=1.0, p_block=0.5, dtype=torch.float64)
    torch.nn.init.normal_(layer.skew)
    x = torch.randn(4, 32, dtype=torch.float64)
    grads = []
    for function in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(function(x).square().sum(), layer.skew)[0])
    torch.testing.assert_close(grads[0], grads[1])
    assert (grads[0] == 0).any()


def test_gradients_only_where_needed():
    """A frozen input or frozen blocks cost nothing in backward."""
    calls = []
    x, blocks = torch.randn(4, 32), rotations().detach()
    real = backends.Op.__call__

    def spy(self, *arguments):
        calls.append(self.name)
        return real(self, *arguments)

    backends.Op.__call__ = spy
    try:
        butterfly_matmul(x, blocks.requires_grad_()).sum().backward()
        assert calls == ["compose", "rotate", "rotate_stage_grad", "compose_backward"]
        calls.clear()
        butterfly_matmul(x.requires_grad_(), blocks).sum().backward()
        assert calls == ["compose", "rotate", "rotate_backward", "compose_backward"]
        calls.clear()
        butterfly_matmul(x, blocks.detach()).sum().backward()
        assert calls == ["compose", "rotate", "rotate"]
    finally:
        backends.Op.__call__ = real


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", functions())
def test_cuda_agrees_with_cpu(name):
    function, arguments = functions()[name]
    arguments = [a.requires_grad_() for a in arguments]
    expected = function(*arguments)
    upstream = torch.randn_like(expected)
    want = torch.autograd.grad(expected, arguments, upstream)
    moved = [a.detach().cuda().requires_grad_() for a in arguments]
    got = function(*moved)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
    for g, w in zip(torch.autograd.grad(got, moved, upstream.cuda()), want, strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=1e-4, atol=1e-4)
