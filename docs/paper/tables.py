#!/usr/bin/env python3
"""Parameter counts of the paper's tables 1, 2, 4, 5 and 6, counted in adapted models.

Every architecture is built in its real size on the meta device, which takes no memory. boft_ops
adapts it, and its trained parameters are counted. printed_counts.csv holds the counts that arXiv
2311.06243v2 prints. LoRA's counts show which layers the paper adapted; they are computed from the
shapes of the same layers.

    python docs/paper/tables.py                      # half a minute; also writes tables.md's table
    python docs/paper/tables.py --quick --out X      # the same without tables.md
"""

from collections.abc import Callable
from functools import cache
from itertools import product

import _common
import _page
import torch
from torch import nn

import boft_ops
from boft_ops.nn.adapt import build_layers, put_in

PRINTED = _common.HERE / "printed_counts.csv"
PAGE = _common.HERE / "tables.md"
# Possible meanings of a printed count; n is the number of a layer's outputs.
READINGS = ("rotation", "rotation + n", "rotation + 2n")
SD15 = "Stable Diffusion 1.5"


def main() -> None:
    args = _common.parser(__doc__).parse_args()
    out, clock = _common.output_folder(args), _common.Clock()
    printed = _common.read_csv(PRINTED)
    # The paper's Stable Diffusion may be either version, so its rows are counted for both.
    printed += [r | {"model": SD15} for r in printed if r["model"] == "Stable Diffusion 2.1"]
    rows = [row | count(row) for row in printed]
    _common.write_csv(out / "tables.csv", rows)
    rows = _common.read_csv(out / "tables.csv")
    if args.out is None:  # the page shows the committed outputs
        _page.fill(PAGE, "counts", table(rows))
    possible = check(rows)
    facts = {f"table_{n}_can_be_one_set_of_layers": yes for n, yes in possible.items()}
    _common.write_log(out / "tables.log", clock, facts)


def count(row: dict) -> dict:
    """Count the parameters of one row's model and method, and find the reading that fits."""
    layers, total = targets(row["model"], row["targets"])
    if row["kind"] == "lora":
        rank = int(row["rank"])
        total_lora = rank * sum(layer.in_features + layer.out_features for layer in layers.values())
        numbers = {"rotation": "", "n": "", "biases": "", "trained": total_lora}
        candidates = {"r (d + n)": total_lora}
    else:
        numbers = adapted(row, layers)
        n = numbers["n"]
        candidates = {name: numbers["rotation"] + k * n for k, name in enumerate(READINGS)}
    fits = [name for name, value in candidates.items() if rounds_to(value, row["printed"], total)]
    share = 100 * numbers["trained"] / total if row["printed"].endswith("%") else ""
    return {**numbers, "trained_percent": share, "counted_as": fits[0] if fits else "no"}


def check(rows: list[dict]) -> dict[str, bool]:
    """Check the statements of the page on the data.

    Returns:
        For each table, True if one set of layers can have all its printed counts.

    Raises:
        AssertionError: the data contradicts the page.
    """
    readings = {}
    for row in rows:
        readings.setdefault((row["table"], row["model"], row["kind"]), set()).add(row["counted_as"])
    expected = {"1": "rotation + 2n", "2": "rotation", "4": "rotation + 2n", "6": "rotation + 2n"}
    for (number, model, method), got in readings.items():
        wanted = "no" if model in ("SAM mask decoder", SD15) else expected[number]
        if method == "boft" and got != {wanted}:
            raise AssertionError(f"table {number}, {model}: expected {wanted}, got {got}")
    groups = {n: [r for r in rows if r["table"] == n and r["b"]] for n in ("1", "4", "5")}
    return {number: one_set_of_layers(group) for number, group in groups.items()}


def adapted(row: dict, layers: dict[str, nn.Linear]) -> dict:
    """Adapt a model and count its parameters."""
    model = build(row["model"])
    m = int(row["m"])
    if row["b"]:
        boft_ops.adapt(model, list(layers), n_factors=m, block_size=int(row["b"]))
    else:  # for a fixed number of blocks the block size depends on the layer; adapt takes only one
        sizes = {name: layer.in_features // int(row["blocks"]) for name, layer in layers.items()}
        options = {name: {"n_factors": m, "block_size": b} for name, b in sizes.items()}
        put_in(model, build_layers(model, options))
    changed = [module for module in model.modules() if isinstance(module, boft_ops.BOFTLinear)]
    if len(changed) != len(layers):
        raise AssertionError(f"expected {len(layers)} adapted layers, got {len(changed)}")
    return {
        "rotation": sum(layer.skew.numel() for layer in changed),
        "n": sum(layer.scale_offset.numel() for layer in changed),
        "biases": sum(layer.bias.numel() for layer in changed if layer.bias is not None),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def interval(printed: str, total: int = 0) -> tuple[float, float]:
    """Return the half-open interval of the counts that round to a printed one."""
    number, unit = printed[:-1], {"M": 1e6, "%": total / 100}[printed[-1]]
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    return (float(number) - half) * unit, (float(number) + half) * unit


def rounds_to(value: int, printed: str, total: int) -> bool:
    """Return True if a count rounds to a printed one."""
    low, high = interval(printed, total)
    return low <= value < high


def one_set_of_layers(rows: list[dict]) -> bool:
    """Return True if some set of layers can have all the printed counts of BOFT(m, b) rows.

    Each count is m (b-1)/2 X + Y, with X features and Y >= 0 other numbers, which are the same for
    all rows. Y is eliminated: for each pair of rows the bounds of one limit X given the other.
    """
    low, high = 0.0, float("inf")
    for one, other in product(rows, rows):
        slope = half_angles(one) - half_angles(other)
        room = interval(one["printed"])[1] - interval(other["printed"])[0]
        if slope > 0:  # slope X < room
            high = min(high, room / slope)
        elif slope < 0:
            low = max(low, room / slope)
        high = min(high, interval(one["printed"])[1] / half_angles(one))
    return low < high


def half_angles(row: dict) -> float:
    """Number of rotation parameters for each feature, m (b-1)/2."""
    return int(row["m"]) * (int(row["b"]) - 1) / 2


# --- The architectures, in their real sizes -------------------------------------------------------


def build(model: str) -> nn.Module:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return BUILDERS[model]()


@cache
def targets(model: str, wanted: str) -> tuple[dict[str, nn.Linear], int]:
    """Return the layers that a row adapts, by name, and the parameter count of the whole model."""
    built = build(model)
    total = sum(p.numel() for p in built.parameters())
    linears = {n: m for n, m in built.named_modules() if isinstance(m, nn.Linear)}
    if wanted == "q_proj and v_proj":
        chosen = {n: m for n, m in linears.items() if n.endswith(("q_proj", "v_proj"))}
    else:  # all linear layers of the transformer blocks, without embedding and head
        chosen = {n: m for n, m in linears.items() if not n.startswith("lm_head")}
    return chosen, total


def deberta() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2Model

    return DebertaV2Model(
        DebertaV2Config(
            vocab_size=128100,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            relative_attention=True,
            position_buckets=256,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type="p2c|c2p",
            position_biased_input=False,
            type_vocab_size=0,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            tie_word_embeddings=False,
        )
    )


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    return Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14))


def sam_decoder() -> nn.Module:
    from transformers import SamMaskDecoderConfig
    from transformers.models.sam.modeling_sam import SamMaskDecoder

    return SamMaskDecoder(SamMaskDecoderConfig())


def unet_attention(text_width: int) -> Callable[[], nn.Module]:
    """Build to_q, to_k and to_v of Stable Diffusion's UNet, for which transformers has no class.

    The UNet has attention at 320, 640 and 1280 channels: two blocks at each on the way down, one in
    the middle, and three at each on the way up. A block attends to itself and then to the text.
    """
    widths = [w for w in (320, 640, 1280) for _ in range(2)]
    widths += [1280, *(w for w in (1280, 640, 320) for _ in range(3))]

    def attention(width: int, source: int) -> nn.ModuleDict:
        inputs = {"to_q": width, "to_k": source, "to_v": source}
        return nn.ModuleDict({k: nn.Linear(d, width, bias=False) for k, d in inputs.items()})

    def make() -> nn.Module:
        return nn.ModuleList(
            nn.ModuleDict({"attn1": attention(w, w), "attn2": attention(w, text_width)})
            for w in widths
        )

    return make


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "DeBERTaV3-base": deberta,
    "Llama-2-7B": llama,
    "DINOv2-large": dinov2,
    "SAM mask decoder": sam_decoder,
    "Stable Diffusion 2.1": unet_attention(1024),  # width of OpenCLIP-H's text features
    SD15: unet_attention(768),  # width of CLIP-L's text features
}


def table(rows: list[dict]) -> list[str]:
    """Make the page's table of counts."""
    numbers = ("rotation", "n", "biases", "trained")
    lines = []
    for row in rows:
        cells = [row[key] for key in ("table", "model", "method", "counted_as", "printed")]
        cells += [f"{int(row[key]):,}" if row[key] else "" for key in numbers]
        if row["trained_percent"]:
            cells[-1] += f" ({float(row['trained_percent']):.3f}%)"
        lines.append(cells)
    head = ["table", "model", "method", "counted as", "printed", *numbers[:3], "trained here"]
    return _page.table(head, lines, n_words=4)


if __name__ == "__main__":
    main()
