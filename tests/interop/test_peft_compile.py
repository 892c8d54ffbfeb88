"""Accelerated PEFT models in compiled and exported graphs, under autocast and checkpointing; and no
d x d tensor on any path."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft_models import assert_same, boft, mlp, net, oft, step, tuned
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from boft_ops.interop.peft import accelerate, patched

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(config, layers=1):
    """A small Llama with adapters on all its linear layers, made without PEFT's extension."""
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    with patched():
        model = tuned(base, config)
    return model, torch.randint(0, 64, (2, 16))


def losses(model, run, ids, steps=3):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


CONFIGS = {
    "boft": boft(TARGETS, m=2, init_weights=True),
    "oft_neumann": oft(TARGETS, init_weights=True, use_cayley_neumann=True),
}


@pytest.mark.exhaustive_if(condition=lambda case: case != "boft")
@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_a_whole_llama_is_one_graph(case):
    model, ids = llama(CONFIGS[case], layers=2 if case == "boft" else 1)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    got, want = losses(model, compiled, ids), losses(eager, eager, ids)
    assert got == pytest.approx(want, rel=1e-4)
    assert got[-1] < got[0]
    assert counter.frame_count == 1  # the steps after the first find their graph


@pytest.mark.slow
def test_dropout_in_a_compiled_llama():
    """One graph for all steps, and another mask in each."""
    model, ids = llama(boft(TARGETS, m=2, p=0.5))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    values = {compiled(input_ids=ids, labels=ids).loss.item() for _ in range(4)}
    assert len(values) == 4
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor():
    base, x = mlp()
    model = accelerate(tuned(base, boft()))
    want = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), want[0], rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()


def test_compiled_convolutions():
    base, x = net()
    for config in (boft(("conv", "point")), oft(("conv", "point"))):
        with pytest.warns(match="overlapping") if config.peft_type == "OFT" else nullcontext():
            model = accelerate(tuned(base, config))
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(step(compiled, x), renamed(step(model, x)))


def renamed(result):
    y, grads = result
    return y, {n if n == "x" else f"_orig_mod.{n}": g for n, g in grads.items()}


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", ["boft", "oft_neumann"])
def test_export(case, merged):
    model, ids = llama(CONFIGS[case])
    randomise(model)
    model.eval()
    want = model(input_ids=ids, use_cache=False).logits
    if merged:
        model.merge_adapter()
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
    got = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def randomise(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tuner", ["boft", "oft"])
def test_checkpointing_recomputes_the_same_mask(tuner, reentrant):
    base, x = mlp()
    model = accelerate(tuned(base, boft(p=0.5) if tuner == "boft" else oft(coft=True, eps=0.05)))
    want = step(model, x)
    forward = model.forward
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    assert_same(step(model, x), want, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant):
    model, ids = llama(boft(TARGETS, m=2, p=0.5))
    torch.manual_seed(2)
    model(input_ids=ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(2)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, grad in want.items():
        got = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


def test_autocast_trains():
    base, x = mlp()
    model = accelerate(tuned(base, boft(p=0.3)))
    exact = step(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = step(model, x)
    assert y.dtype == torch.float32  # as PEFT's, in the dtype of the input
    for name, grad in exact[1].items():
        assert (grads[name] - grad).norm() <= 0.03 * grad.norm()


class Largest(TorchDispatchMode):
    """The most elements of any tensor, and of any storage, that an operator gave back."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                held = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.most = max(self.most, leaf.numel(), held)
        return result


D = 256  # against which everything else is made small
SMALL = {
    "boft": lambda: (nn.Sequential(nn.Linear(D, 8)), torch.randn(4, D), boft(["0"], b=8, p=0.3)),
    "boft_m3": lambda: (nn.Sequential(nn.Linear(D, 8)), torch.randn(4, D), boft(["0"], b=8, m=3)),
    "boft_conv": lambda: (
        nn.Sequential(nn.Conv2d(D // 4, 4, 2)),
        torch.randn(1, D // 4, 4, 4),
        boft(["0"], b=8, m=2, p=0.3),
    ),
    "oft": lambda: (nn.Sequential(nn.Linear(D, 8)), torch.randn(4, D), oft(["0"], b=8)),
    "oft_neumann": lambda: (
        nn.Sequential(nn.Linear(D, 8)),
        torch.randn(4, D),
        oft(["0"], b=8, use_cayley_neumann=True),
    ),
    "oft_shared": lambda: (
        nn.Sequential(nn.Linear(D, 8)),
        torch.randn(4, D),
        oft(["0"], b=8, block_share=True),
    ),
    "oft_conv": lambda: (
        nn.Sequential(nn.Conv2d(D, 4, 1)),
        torch.randn(1, D, 4, 4),
        oft(["0"], b=8),
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_no_dense_matrix_anywhere(case):
    base, x, config = SMALL[case]()
    with Largest() as seen:
        with patched():
            model = tuned(base, config)
            model.add_adapter("other", config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        step(model, x)
        optimizer.step()
        model.base_model.set_adapter(["default", "other"])
        step(model, x)
        model.merge_adapter()
        model(x)
        model.unmerge_adapter()
        with model.disable_adapter():
            model(x)
        model.merge_and_unload()
    assert D < seen.most < D * D // 4


def test_the_trap_catches_peft():
    base, _, config = SMALL["oft"]()
    with Largest() as seen:
        tuned(base, config).merge_adapter()
    assert seen.most >= D * D


def test_accelerating_frees_the_dense_permutation():
    model = tuned(nn.Sequential(nn.Linear(D, 8)), boft(["0"]))
    assert sum(b.numel() for b in model.buffers()) == D * D
    assert not list(accelerate(model).buffers())
