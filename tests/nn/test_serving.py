"""Adapters served, quantized models trained: where other libraries call, repeat and refuse."""

import pytest
import torch
from torch import nn

import boft_ops
from boft_ops import BOFTLinear, MultiAdapterLinear
from boft_ops.interop.serve import adapter_rows, load_adapters


def trained(model):
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "skew"):
            nn.init.normal_(module.skew, std=0.5)
    return model.eval()


def t5():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",  # asks for the dtype of wo.weight
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("beams", "returned"), [(1, 1), (3, 1), (3, 2)])
def test_beams_behind_an_encoder_keep_the_adapter_of_their_request(beams, returned, tmp_path):
    tuned = trained(boft_ops.adapt(t5(), ["q", "v", "wo"], block_size=4))
    boft_ops.save_adapter(tuned, tmp_path / "a.safetensors")
    served = load_adapters(t5(), {"ann": tmp_path / "a.safetensors"})
    ids = torch.randint(2, 64, (3, 5))
    options = {"num_beams": beams, "num_return_sequences": returned, "max_new_tokens": 4}
    want = [m.generate(ids, do_sample=False, **options) for m in (tuned, t5())]
    for _ in range(2):
        with adapter_rows(served, ["ann", None, "ann"]):
            got = served.generate(ids, do_sample=False, **options)
        for i, rows in enumerate(got.split(returned)):
            assert torch.equal(rows, want[i % 2].split(returned)[i])
    assert "_expand_inputs_for_generation" not in vars(served)


def test_rows_that_are_no_requests_are_refused_unless_repeats_says_so():
    model = nn.Sequential(MultiAdapterLinear(nn.Linear(16, 8)))
    for name in ("a", "b"):
        nn.init.normal_(model[0].add_adapter(name, block_size=4).skew)
    x = torch.randn(4, 3, 16)
    with adapter_rows(model, ["a", "b"]):
        model(x[:2])
        with pytest.raises(ValueError, match="expected inputs of 2 or 2 x 1 rows"):
            model(x)  # may be a b a b as well, as in classifier-free guidance
    with adapter_rows(model, ["a", "b"], repeats=2):
        got, single = model(x), model(x[::2])
        with adapter_rows(model, ["a"] * 4):  # the inner block counts, with its own repeats
            inner = model(x)
        torch.testing.assert_close(model(x), got)
    torch.testing.assert_close(got[::2], single)
    torch.testing.assert_close(got[:2], inner[:2])
    with adapter_rows(model, ["a", "a", "b", "b"]):
        torch.testing.assert_close(model(x), got)
    with pytest.raises(ValueError, match="repeats"), adapter_rows(model, ["a"], repeats=0):
        pass


@pytest.mark.parametrize("frozen", [False, True])
def test_what_inference_mode_has_computed_serves_gradients_later(frozen):
    layer, plain = MultiAdapterLinear(nn.Linear(16, 16)), BOFTLinear(16, 16)
    layer.add_adapter("a", block_size=4)
    layer.eval().requires_grad_(not frozen)
    plain.requires_grad_(not frozen)
    index, x = layer.index_of(["a", None, "a"]), torch.randn(3, 16, requires_grad=True)
    weight = plain.weight
    with torch.inference_mode():
        layer.prepare()
        layer(x, index)
        weight.sum()
    layer(x, index).sum().backward()
    nn.functional.linear(x, weight).sum().backward()
    assert x.grad is not None


def test_trainer_takes_an_adapted_quantized_model(tmp_path):
    pytest.importorskip("torchao")
    transformers = pytest.importorskip("transformers")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers.trainer_utils import validate_quantization_for_training

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig())
    )
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    boft_ops.adapt(model, ["q_proj"], block_size=8)
    validate_quantization_for_training(model)
    boft_ops.unload(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
