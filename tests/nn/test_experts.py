"""Experts whose weights are 3-D parameters: rotated rows against merged weights, in float64."""

import copy
import inspect
import io

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.integrations import finegrained_fp8, moe
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

import boft_ops
from boft_ops import BOFTExperts
from boft_ops.interop.convert import convert
from boft_ops.ops.geodesic import geodesic

COMMON = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON |= {"num_key_value_heads": 1, "num_experts_per_tok": 2}
WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]
OPTIONS = {"block_size": 4, "n_factors": 2}


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=4)
    )


def qwen():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **COMMON, intermediate_size=32, moe_intermediate_size=8, head_dim=8, num_experts=6
        )
    )


def gpt_oss():
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**COMMON, intermediate_size=24, head_dim=8, num_local_experts=4)
    )


def nemotron():
    """Experts without a gate: an activation between two projections."""
    config = COMMON | {"layers_block_type": ["full_attention", "moe"], "head_dim": 8}
    del config["num_hidden_layers"]
    return transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(
            **config,
            n_routed_experts=4,
            moe_intermediate_size=8,
            moe_shared_expert_intermediate_size=8,
        )
    )


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss, "nemotron": nemotron}
every_model = pytest.mark.parametrize("name", MODELS)
every_mode = pytest.mark.parametrize("experts", ["each", "shared"])


def built(name, dtype=torch.float64, spread=0.3):
    """A model whose biases, too, are random numbers."""
    model = MODELS[name]().to(dtype).eval()
    model.set_experts_implementation("eager")  # the only one of float64 but batched_mm
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=spread)
    return model


def adapted(model, experts, train=True, **options):
    parameters = options.pop("target_parameters", r".*experts\.(gate_up|up|down)_proj")
    boft_ops.adapt(model, [], target_parameters=parameters, experts=experts, **(OPTIONS | options))
    if train:
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return model


def rotated_experts(model):
    return [module for module in model.modules() if isinstance(module, BOFTExperts)]


def weights_of(base):
    return ("gate_up_proj" if base.has_gate else "up_proj", "down_proj")


def logits(model):
    ids = torch.arange(14).reshape(2, 7) * 5 % 32
    return model(input_ids=ids).logits


@every_mode
@every_model
def test_a_new_adapter_changes_nothing(name, experts):
    model = built(name)
    want = logits(model)
    torch.testing.assert_close(logits(adapted(model, experts, train=False)), want)


@every_mode
@every_model
def test_the_merged_model_is_the_adapted_one(name, experts):
    model = adapted(built(name), experts)
    plain = logits(copy.deepcopy(model).requires_grad_(False))
    shapes = [
        [getattr(e.base, w).shape for w in weights_of(e.base)] for e in rotated_experts(model)
    ]
    got, merged = logits(model), boft_ops.merge(model)
    assert not rotated_experts(merged)
    experts = [module for module in merged.modules() if hasattr(module, "has_gate")]
    assert [[getattr(e, w).shape for w in weights_of(e)] for e in experts] == shapes
    torch.testing.assert_close(logits(merged), got)
    torch.testing.assert_close(plain, got)


def merged_in_graph(experts, trained):
    """The weights of experts, rotated by dense matrices, as a function of the trained tensors."""
    base = experts.base
    weights = {}
    for projection in weights_of(base):
        adapter, weight = getattr(experts, projection), getattr(base, projection)
        skew, scale = trained[f"{projection}.skew"], 1 + trained[f"{projection}.scale_offset"]
        rotated = []
        for e in range(len(weight)):
            own = [t if adapter.experts == "shared" else t[e] for t in (skew, scale)]
            matrix = weight[e].mT if base.is_transposed else weight[e]
            dense = boft_ops.butterfly_matmul(
                torch.eye(matrix.shape[1]).to(weight), boft_ops.cayley(own[0])
            )
            turned = own[1][:, None] * (matrix @ dense.T)
            rotated.append(turned.mT if base.is_transposed else turned)
        weights[projection] = torch.stack(rotated)
    return weights


# every expert has rows, some have one or none, all rows have one
ROUTES = {
    "all": [0, 1, 2, 3, 3, 2, 1, 0, 1, 2],
    "few": [3, 3, 3, 1, 3, 3, 3, 3, 3, 3],
    "one": [2] * 10,
}


@pytest.mark.parametrize("routes", ROUTES)
@every_mode
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron"])
def test_gradients(name, experts, routes):
    """Those of rotated dense weights, in float64, of the trained tensors, inputs and routing."""
    layer = rotated_experts(adapted(built(name), experts))[0]
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    index = torch.tensor(ROUTES[routes]).reshape(5, 2)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    trained = {k: p for k, p in layer.named_parameters() if not k.startswith("base.")}
    leaves = [x, weights, *trained.values()]
    upstream = torch.randn(5, 16, dtype=torch.float64)
    got = torch.autograd.grad(layer(x, index, weights), leaves, upstream)
    plain = boft_ops.unload(copy.deepcopy(layer))
    base, dense = plain.requires_grad_(False), merged_in_graph(layer, trained)
    want = torch.func.functional_call(base, dense, (x, index, weights))
    wanted = torch.autograd.grad(want, leaves, upstream)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@every_model
def test_every_implementation(name, implementation):
    model = adapted(built(name, torch.float32), "each")
    want = logits(copy.deepcopy(model).double())
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model).double(), want.double(), rtol=1e-4, atol=1e-4)


def test_implementations_that_hide_the_rows_are_refused():
    model = adapted(built("mixtral"), "each")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match="experts_implementation: expected 'grouped_mm' or 'batch"):
        logits(model)
    # any other will do if nothing is rotated between the products
    other = built("mixtral")
    want = logits(other)
    moe.ALL_EXPERTS_FUNCTIONS.register("of a test", moe.batched_mm_experts_forward)
    adapted(other, "each", False, target_parameters=["experts.gate_up_proj"], scale=False)
    other.config._experts_implementation = "of a test"
    torch.testing.assert_close(logits(other), want)


@every_mode
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron"])
def test_experts_of_other_processes(name, experts):
    """Numbers from E on: their rows add nothing, whatever is in them, and have no gradient."""
    layer = rotated_experts(adapted(built(name), experts))[0]
    layer.base._is_expert_parallel = True
    e = layer.base.num_experts
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, e], [e, 1], [2, 3], [e, e], [3, e], [1, 1]])
    weights = torch.rand(6, 2, dtype=torch.float64).masked_fill(index == e, 0.0)
    got = layer(x, index, weights)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(got.sum(), [x, *parameters])
    here = torch.where(index == e, 0, index)
    want = layer(x, here, weights)
    wanted = torch.autograd.grad(want.sum(), [x, *parameters])
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not got[3].any()


def test_experts_that_a_dispatch_surrounds():
    """A forward of the instance gets the numbers of all experts, what it calls those of its own."""
    whole = rotated_experts(adapted(built("mixtral"), "each"))[0]
    base = boft_ops.unload(copy.deepcopy(whole))
    for name in ("gate_up_proj", "down_proj"):
        setattr(base, name, nn.Parameter(getattr(base, name)[:2]))
    base.num_experts, base._is_expert_parallel, inner = 2, True, base.forward
    base.forward = lambda x, index, weights: inner(
        x, index.where(index < 2, 2), weights.where(index < 2, 0)
    )
    layer = BOFTExperts(base)
    for name in ("gate_up_proj", "down_proj"):
        adapter = layer.add_adapter(name, **OPTIONS)
        adapter.skew.data.copy_(getattr(whole, name).skew[:2])
        adapter.scale_offset.data.copy_(getattr(whole, name).scale_offset[:2])
    x, index = torch.randn(6, 16, dtype=torch.float64), torch.arange(12).reshape(6, 2) % 4
    weights = torch.rand(6, 2, dtype=torch.float64)
    want = whole(x, index, weights.where(index < 2, 0))
    torch.testing.assert_close(layer(x, index, weights), want)


@every_mode
@every_model
def test_saved_and_loaded(name, experts, tmp_path):
    pretrained, path = built(name), tmp_path / "adapter.safetensors"
    model = adapted(copy.deepcopy(pretrained), experts, p_block=0.5, p_component=0.5)
    want = logits(model)
    boft_ops.save_adapter(model, path)
    fresh, other = copy.deepcopy(pretrained), adapted(copy.deepcopy(pretrained), experts)
    for loaded in (fresh, other):
        boft_ops.load_adapter(loaded, path)
        torch.testing.assert_close(logits(loaded), want)
        trained = [key for key, p in loaded.named_parameters() if p.requires_grad]
        assert all(key.endswith(("skew", "scale_offset")) for key in trained)
    assert rotated_experts(fresh)[0].down_proj.config.p_block == 0.5
    mode = {"each": "shared", "shared": "each"}[experts]
    with pytest.raises(ValueError, match=f"'experts': '{mode}'.*, got .*'experts': '{experts}'"):
        boft_ops.load_adapter(adapted(pretrained, mode), path)


@every_model
def test_unload_gives_the_experts_back(name):
    model = built(name)
    before, want = [m for m in model.modules() if hasattr(m, "down_proj")], logits(model)
    boft_ops.unload(adapted(model, "each"))
    assert [m for m in model.modules() if hasattr(m, "down_proj")] == before
    for module in before:
        assert not {"_apply_gate", "act_fn"} & vars(module).keys()
        assert module.config is model.config
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@every_mode
@every_model
def test_low_precision(name, experts, dtype):
    """At most twice the error of merged experts in the same dtype, against float64."""
    exact = adapted(built(name), experts)
    model, reference = copy.deepcopy(exact), boft_ops.merge(copy.deepcopy(exact)).to(dtype)
    for module in model.modules():  # the trained tensors stay wide, as under a cast before adapt
        for key, parameter in module._parameters.items():
            if parameter is not None and key not in ("skew", "scale_offset"):
                parameter.data = parameter.data.to(dtype)
            elif parameter is not None:
                parameter.data = parameter.data.float()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    x = torch.randn(40, 16).to(dtype)
    index, weights = torch.randint(0, 4, (40, 2)), torch.rand(40, 2).to(dtype)
    calls = [rotated_experts(exact)[0], rotated_experts(model)[0]]
    calls.append(
        next(m for m in reference.modules() if isinstance(getattr(m, "down_proj", 0), nn.Parameter))
    )
    truth, got, plain = (
        call(x.to(w), index, weights.to(w)).double()
        for call, w in zip(calls, (torch.float64, dtype, dtype), strict=True)
    )
    assert (got - truth).norm() <= 2 * (plain - truth).norm()


def test_dropout_draws_for_every_expert():
    layer = rotated_experts(adapted(built("mixtral"), "each", p_component=0.5, p_block=0.5))[0]
    adapter = layer.down_proj.train()
    eye = torch.eye(4, dtype=torch.float64)
    dropped = (adapter.blocks() == eye).flatten(-2).all(-1)
    assert dropped.sum((1, 2)).tolist() == [3] * 4  # one factor, half of its six blocks
    assert len({tuple(mask.flatten().tolist()) for mask in dropped}) > 1
    adapter.eval()
    assert not (adapter.blocks() == eye).flatten(-2).all(-1).any()


def test_pickled_for_another_process(monkeypatch):
    """Its registry has no implementation of this package until a rotated model is called."""
    model = adapted(built("mixtral"), "each")
    want, memory = logits(model), io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    monkeypatch.delitem(type(moe.ALL_EXPERTS_FUNCTIONS)._global_mapping, "boft_ops")
    torch.testing.assert_close(logits(torch.load(memory, weights_only=False)), want)


class Packed(nn.Module):
    """Quantized experts as others make them: packed integers, no class of transformers."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = 3, 8, 8
        for name, shape in (("gate_up_proj", (3, 16, 8)), ("down_proj", (3, 8, 8))):
            numbers = torch.randint(-9, 9, shape, dtype=torch.int8)
            setattr(self, name, nn.Parameter(numbers, requires_grad=False))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = torch.zeros_like(hidden_states)
        for i, (experts, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for e, w in zip(experts.tolist(), weights, strict=True):
                gate, up = (self.gate_up_proj[e].float() @ hidden_states[i]).chunk(2)
                y[i] = y[i] + w * (self.down_proj[e].float() @ (gate.sigmoid() * up))
        return y


def test_quantized_experts_are_called():
    model = nn.ModuleDict({"experts": Packed()})
    options = {"target_parameters": ["gate_up_proj"], "scale": False}
    adapted(model, "each", **options)
    layer, pretrained = model["experts"], copy.deepcopy(model["experts"].base)
    x, index, weights = torch.randn(6, 8), torch.randint(0, 3, (6, 2)), torch.rand(6, 2)
    got = layer(x, index, weights)
    rotated = torch.stack(
        [boft_ops.butterfly_matmul(x, boft_ops.cayley(skew)) for skew in layer.gate_up_proj.skew]
    )
    want = sum(
        pretrained(
            rotated[index[:, k], torch.arange(6)], index[:, k : k + 1], weights[:, k : k + 1]
        )
        for k in range(2)
    )
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="gate_up_proj: expected a dense floating-point weight"):
        boft_ops.merge(model)
    boft_ops.unload(model)
    torch.testing.assert_close(model["experts"](x, index, weights), pretrained(x, index, weights))


def mxfp4_experts(monkeypatch):
    """A layer of MXFP4, and the arguments that its experts get: their kernels need a GPU."""
    mlp = Mxfp4GptOssMLP(GptOssTopKRouter(gpt_oss().config), Mxfp4GptOssExperts(gpt_oss().config))
    for parameter in mlp.parameters():
        if parameter.is_floating_point():
            parameter.data.normal_()
    seen = []

    def forward(self, hidden_states, top_k_index, top_k_weights):
        seen.append((hidden_states, top_k_index, top_k_weights))
        return hidden_states * top_k_weights * (1 + top_k_index)

    monkeypatch.setattr(Mxfp4GptOssExperts, "forward", forward)
    return nn.ModuleDict({"mlp": mlp}), seen


def test_a_class_with_a_fused_kernel_of_transformers(monkeypatch):
    """MXFP4: packed integers, both products in one kernel."""
    model, seen = mxfp4_experts(monkeypatch)
    adapted(model, "each", target_parameters=["gate_up_proj"], scale=False)
    experts = model["mlp"].experts
    adapter = experts.gate_up_proj
    assert (adapter.rotated_features, adapter.out_features) == (16, 48)
    index = torch.tensor([[3, 0], [0, 1]])
    x, weights = torch.randn(2, 16), torch.rand(2, 2)
    got = experts(x, index, weights)
    ((rows, numbers, _),) = seen
    assert numbers.flatten().tolist() == [0, 0, 1, 3]
    turned = [
        boft_ops.butterfly_matmul(x[i], boft_ops.cayley(adapter.skew[e]))
        for i, e in ((0, 0), (1, 0), (1, 1), (0, 3))
    ]
    torch.testing.assert_close(rows, torch.stack(turned))
    want = weights[0, 0] * 4 * turned[3] + weights[0, 1] * turned[0]
    torch.testing.assert_close(got[0], want)


def test_the_parent_of_experts_in_mxfp4_calls_the_rotation(monkeypatch):
    """It hands what its router prepared to the kernels, unless the experts ask for plain rows."""
    model, seen = mxfp4_experts(monkeypatch)
    adapted(model, "each", target_parameters=["gate_up_proj"], scale=False)
    mlp, x = model["mlp"], torch.randn(1, 5, 16)
    got, _ = mlp(x)
    assert len(seen) == 1
    rows = x.flatten(0, 1)
    _, weights, index = mlp.router(rows)
    torch.testing.assert_close(got, mlp.experts(rows, index, weights)[None])


@pytest.mark.parametrize("options", [{"target_parameters": ["down_proj"]}, {"scale": True}])
def test_what_mxfp4_does_not_take_names_what_does(options, monkeypatch):
    model, _ = mxfp4_experts(monkeypatch)
    options = {"target_parameters": ["gate_up_proj"], "scale": False} | options
    match = r"Mxfp4GptOssExperts computes both .* alone, with scale=False; Mxfp4Config\(dequantize="
    with pytest.raises(ValueError, match=match):
        adapted(model, "each", **options)
    assert type(model["mlp"].experts) is Mxfp4GptOssExperts


def test_a_checkpoint_in_mxfp4_that_is_dequantized(tmp_path):
    """The remedy: transformers unpacks the checkpoint, and both projections rotate and merge."""
    torch.manual_seed(0)
    config = COMMON | {"hidden_size": 64, "num_hidden_layers": 1}
    config = transformers.GptOssConfig(
        **config, intermediate_size=32, head_dim=8, num_local_experts=4
    )
    model = transformers.GptOssForCausalLM(config)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    for name in [
        name for name in tensors if name.endswith("_up_proj") or name.endswith("down_proj")
    ]:
        e, d, n = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (e, n, d // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, (e, n, d // 32), dtype=torch.uint8)
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dequantize = transformers.Mxfp4Config(dequantize=True)
    load = transformers.GptOssForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=dequantize, dtype=torch.float32).eval()
    pretrained = logits(model)
    adapted(model, "each")
    got = logits(model)
    assert (got - pretrained).abs().max() > 1e-3
    got.sum().backward()
    (layer,) = rotated_experts(model)
    assert layer.down_proj.skew.grad.norm() > 0
    torch.testing.assert_close(logits(boft_ops.merge(model)), got, rtol=1e-4, atol=1e-4)


@every_mode
def test_experts_in_fp8(experts, monkeypatch):
    """The class of transformers, with products in float32 for its kernels, which a GPU has."""
    functions = finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    monkeypatch.setattr(type(functions), "_global_mapping", {"grouped_mm": dequantized})
    cls = type("Experts", (finegrained_fp8.FP8Experts,), {})
    cls = moe.use_experts_implementation(cls, experts_interface=functions)
    config = mixtral().config
    config._experts_implementation = "grouped_mm"
    base = cls(config, block_size=(8, 8))
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
    dense = type(mixtral().model.layers[0].mlp.experts)(config)
    dense.load_state_dict({name: dense_of(base, name) for name in ("gate_up_proj", "down_proj")})
    models = nn.ModuleDict({"experts": base}), nn.ModuleDict({"experts": dense})
    adapted(models[0], experts)
    adapted(models[1], experts)
    models[1]["experts"].load_state_dict(
        {k: v for k, v in models[0].experts.state_dict().items() if not k.startswith("base.")},
        strict=False,
    )
    call = torch.randn(5, 16), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    got, want = (model["experts"](*call) for model in models)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="gate_up_proj: expected a dense floating-point weight"):
        boft_ops.merge(models[0])


@pytest.mark.parametrize(("parameters", "scale"), [(WEIGHTS[:1], False), (WEIGHTS, True)])
def test_kernels_without_a_gradient_raise(parameters, scale, monkeypatch):
    """Those of MXFP4, and fp8's batched ones: nothing would tell that experts are not trained."""
    options = {"target_parameters": parameters, "scale": scale}
    model = adapted(built("mixtral", torch.float32), "each", **options)
    layer = rotated_experts(model)[0]
    call = torch.randn(5, 16), torch.randint(0, 4, (5, 2)), torch.rand(5, 2, requires_grad=True)
    linear = moe._grouped_linear
    monkeypatch.setattr(moe, "_grouped_linear", lambda *a, **k: linear(*a, **k).detach())
    with torch.no_grad():
        layer(*call)
    with pytest.raises(RuntimeError, match="MixtralExperts: expected outputs with a gradient"):
        layer(*call)


def dense_of(base, name):
    scale = getattr(base, f"{name}_scale_inv").repeat_interleave(8, 1).repeat_interleave(8, 2)
    return getattr(base, name).float() * scale


def dequantized(self, hidden_states, top_k_index, top_k_weights):
    """grouped_mm for dense weights, as a function of the experts in fp8."""
    dense = copy.copy(self)
    names = ("gate_up_proj", "down_proj")
    dense._parameters = self._parameters | {n: nn.Parameter(dense_of(self, n)) for n in names}
    dense.is_transposed = dense.has_post_expert_norm = False
    return moe.grouped_mm_experts_forward(dense, hidden_states, top_k_index, top_k_weights)


def test_files_of_experts_are_not_converted(tmp_path):
    path = tmp_path / "adapter.safetensors"
    boft_ops.save_adapter(adapted(built("mixtral"), "each"), path)
    with pytest.raises(ValueError, match="_proj: expected a rotated layer, got rotated exp"):
        convert(path, tmp_path / "other", to="peft")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"target_parameters": ["up_proj"]}, ValueError, r"\['up_proj'\] without a match.*'down_p"),
        ({"target_modules": ["down_proj"]}, ValueError, "target_parameters, in .'down_proj', 'gat"),
        ({"target_modules": ["experts"]}, TypeError, "target_parameters takes .*experts.down_proj"),
        ({"experts": "all"}, ValueError, "experts: expected one of"),
        ({"block_size": 5, "n_factors": 1}, ValueError, r"layers\.0\.mlp\.experts\.gate_up_proj: "),
        ({"block_size": 16, "n_factors": 1}, ValueError, r"layers\.0\.mlp\.experts\.down_proj: "),
        ({"side": "out"}, ValueError, "side: expected 'in'"),
        ({"target_parameters": []}, ValueError, "expected at least one name"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, match):
    model = built("mixtral")
    before = {name: (id(m), m.training) for name, m in model.named_modules()}
    arguments = {"target_modules": [], "target_parameters": WEIGHTS} | OPTIONS | arguments
    if arguments["target_modules"]:
        arguments["target_parameters"] = []
    with pytest.raises(error, match=match):
        boft_ops.adapt(model, arguments.pop("target_modules"), **arguments)
    assert {name: (id(m), m.training) for name, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert all("_apply_gate" not in vars(m) for m in model.modules())
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "down_proj"))


def test_fused_experts_take_no_rotation_between_their_products():
    model = nn.ModuleDict({"experts": Packed()})
    for options in ({"target_parameters": ["down_proj"]}, {"target_parameters": ["gate_up_proj"]}):
        with pytest.raises(
            ValueError, match="both products in one kernel: expected 'gate_up_proj'"
        ):
            adapted(model, "each", **options)
    adapted(model, "each", target_parameters=["gate_up_proj"], scale=False)
    with pytest.raises(ValueError, match="adapted already"):
        adapted(model, "each", target_parameters=["gate_up_proj"], scale=False)


def test_experts_beside_linear_layers_and_a_head():
    model = built("mixtral")
    boft_ops.adapt(
        model, ["q_proj"], target_parameters=WEIGHTS, modules_to_save=["lm_head"], **OPTIONS
    )
    trained = {k.rpartition(".")[2] for k, p in model.named_parameters() if p.requires_grad}
    assert trained == {"skew", "scale_offset", "weight"}
    model.train()
    logits(model).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["mixtral", "nemotron"])
def test_compiled_experts(name):
    layer = rotated_experts(adapted(built(name, torch.float32), "each"))[0].eval()
    x, index, weights = torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    want = layer(x, index, weights)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, weights), want)


def test_the_contract_with_transformers():
    """Grouped and batched experts call gate or activation once: BOFTExperts relies on it."""
    for function in (moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward):
        source = inspect.getsource(function)
        assert source.count("self._apply_gate(") == source.count("self.act_fn(") == 1


@every_mode
def test_strength(experts):
    """Half the strength: the model whose rotations and scales are square roots."""
    model = built("gpt_oss")
    pretrained = logits(model)
    adapted(model, experts)
    for module in rotated_experts(model):
        for name, parameter in module.named_parameters():
            if name.endswith("scale_offset"):
                nn.init.uniform_(parameter, -0.5, 1)
    finetuned, half = logits(model), copy.deepcopy(model)
    for module in rotated_experts(half):
        for adapter in (module.gate_up_proj, module.down_proj):
            with torch.no_grad():
                adapter.skew.copy_(geodesic(adapter.skew, 0.5))
                adapter.scale_offset.copy_(adapter.scale.sqrt() - 1)
    boft_ops.set_strength(model, 0.5)
    torch.testing.assert_close(logits(model), logits(half))
    merged = boft_ops.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), logits(half))
    torch.testing.assert_close(logits(boft_ops.set_strength(model, 0)), pretrained)
    assert torch.equal(logits(boft_ops.set_strength(model, 1)), finetuned)


@every_mode
@pytest.mark.parametrize("how", ["orthomerge", "karcher"])
def test_merging_adapters(how, experts):
    """Each expert has a mean of its own: that of layers with these skews and scales."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(adapted(built("mixtral", spread=0.1), experts))
        for name, parameter in models[-1].named_parameters():
            if name.endswith("scale_offset"):
                nn.init.uniform_(parameter, -0.5, 1)
    merged = boft_ops.merge_adapters(models, [1, 3], how=how)
    loaded = boft_ops.load_adapter(built("mixtral"), merged)
    got = rotated_experts(loaded)[0].down_proj
    both = [rotated_experts(model)[0].down_proj for model in models]
    for e in range(1 if experts == "shared" else 4):
        layers = []
        for adapter in both:
            layer = boft_ops.BOFTLinear(24, 16, dtype=torch.float64, **OPTIONS)
            own = adapter.skew, adapter.scale_offset
            skew, offset = own if experts == "shared" else (t[e] for t in own)
            layer.load_state_dict({"skew": skew, "scale_offset": offset}, strict=False)
            layers.append(layer)
        want = boft_ops.merge_adapters(layers, [1, 3], how=how).tensors
        own = got.skew, got.scale_offset
        skew, offset = own if experts == "shared" else (t[e] for t in own)
        torch.testing.assert_close(skew, want["skew"])
        torch.testing.assert_close(offset, want["scale_offset"])
    other = adapted(built("mixtral"), "shared" if experts == "each" else "each")
    with pytest.raises(ValueError, match="experts: expected one value for all adapters"):
        boft_ops.merge_adapters([models[0], other])
