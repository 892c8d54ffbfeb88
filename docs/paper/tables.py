#!/usr/bin/env python3
"""The parameter counts of the paper's tables 1, 2, 4, 5 and 6, counted in adapted models.

Every architecture is built in its real size without memory (the meta device), adapted by boft_ops,
and the numbers that it then trains are counted. printed_counts.csv holds what arXiv 2311.06243v2
prints. LoRA's counts, which tell which layers were adapted, come from the same layers' shapes.

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
# What a printed count may be made of, n being a layer's outputs.
READINGS = ("rotation", "rotation + n", "rotation + 2n")
SD15 = "Stable Diffusion 1.5"


def main() -> None:
    args = _common.parser(__doc__).parse_args()
    out, clock = _common.output_folder(args), _common.Clock()
    printed = _common.read_csv(PRINTED)
    # The same rows for the other Stable Diffusion: which of the two did the paper count?
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
    """The parameters of one row's model and method, and how the paper must have counted them."""
    layers, total = targets(row["model"], row["targets"])
    if row["kind"] == "lora":
        rank = int(row["rank"])
        found = rank * sum(layer.in_features + layer.out_features for layer in layers.values())
        numbers = {"rotation": "", "n": "", "biases": "", "trained": found}
        candidates = {"r (d + n)": found}
    else:
        numbers = adapted(row, layers)
        n = numbers["n"]
        candidates = {name: numbers["rotation"] + k * n for k, name in enumerate(READINGS)}
    fits = [name for name, value in candidates.items() if rounds_to(value, row["printed"], total)]
    share = 100 * numbers["trained"] / total if row["printed"].endswith("%") else ""
    return {**numbers, "trained_percent": share, "counted_as": fits[0] if fits else "no"}


def check(rows: list[dict]) -> dict[str, bool]:
    """What the page says, on the data. Returns, by table, whether one set of layers is possible."""
    kinds = {}
    for row in rows:
        kinds.setdefault((row["table"], row["model"], row["kind"]), set()).add(row["counted_as"])
    expected = {"1": "rotation + 2n", "2": "rotation", "4": "rotation + 2n", "6": "rotation + 2n"}
    for (number, model, kind), found in kinds.items():
        wanted = "no" if model in ("SAM mask decoder", SD15) else expected[number]
        if kind == "boft" and found != {wanted}:
            raise AssertionError(f"table {number}, {model}: expected {wanted}, got {found}")
    groups = {n: [r for r in rows if r["table"] == n and r["b"]] for n in ("1", "4", "5")}
    return {number: one_set_of_layers(group) for number, group in groups.items()}


def adapted(row: dict, layers: dict[str, nn.Linear]) -> dict:
    """Counts of a model that boft_ops.adapt has changed, or of what adapt is made of."""
    model = build(row["model"])
    m = int(row["m"])
    if row["b"]:
        boft_ops.adapt(model, list(layers), n_factors=m, block_size=int(row["b"]))
    else:  # a number of blocks: the block size depends on the layer, and adapt has one for all
        sizes = {name: layer.in_features // int(row["blocks"]) for name, layer in layers.items()}
        options = {name: {"n_factors": m, "block_size": b} for name, b in sizes.items()}
        put_in(model, build_layers(model, options))
    changed = [module for module in model.modules() if isinstance(module, boft_ops.BOFTLinear)]
    if len(changed) != len(layers):
        raise AssertionError(f"expected {len(layers)} adapted layers, got {len(changed)}")
    return {
        "rotation": sum(layer.skew.numel() for layer in changed),
        "n": sum(layer.scale.numel() for layer in changed),
        "biases": sum(layer.bias.numel() for layer in changed if layer.bias is not None),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def interval(printed: str, total: int = 0) -> tuple[float, float]:
    """The counts that are printed so: from the first number up to, but not with, the second."""
    number, unit = printed[:-1], {"M": 1e6, "%": total / 100}[printed[-1]]
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    return (float(number) - half) * unit, (float(number) + half) * unit


def rounds_to(value: int, printed: str, total: int) -> bool:
    low, high = interval(printed, total)
    return low <= value < high


def one_set_of_layers(rows: list[dict]) -> bool:
    """Can the printed counts of BOFT(m, b) rows be of the same layers, whichever they are?

    Each is m (b-1)/2 X + Y with X features, Y >= 0 other numbers, X and Y the same for all. Y is
    eliminated: every row's bounds must leave room for every other's.
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
    return int(row["m"]) * (int(row["b"]) - 1) / 2


# --- The architectures, in their real sizes -------------------------------------------------------


def build(model: str) -> nn.Module:
    with torch.device("meta"):
        return BUILDERS[model]()


@cache
def targets(model: str, wanted: str) -> tuple[dict[str, nn.Linear], int]:
    """The layers that a row adapts, by name, and the parameters of the whole model."""
    built = build(model)
    total = sum(p.numel() for p in built.parameters())
    linears = {n: m for n, m in built.named_modules() if isinstance(m, nn.Linear)}
    if wanted == "q_proj and v_proj":
        chosen = {n: m for n, m in linears.items() if n.endswith(("q_proj", "v_proj"))}
    else:  # of the transformer blocks: no embedding, no head
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
    """to_q, to_k and to_v of Stable Diffusion's UNet: no class of transformers has it.

    Channels 320, 640 and 1280 with attention, two blocks at each going down, one in the middle,
    three at each going up; a block attends to itself and then to the text.
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
    "Stable Diffusion 2.1": unet_attention(1024),  # OpenCLIP-H's text
    SD15: unet_attention(768),  # CLIP-L's
}


def table(rows: list[dict]) -> list[str]:
    """The Markdown table of the page."""
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
