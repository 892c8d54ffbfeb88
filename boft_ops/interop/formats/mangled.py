"""Finds the layers of a model by trainers' names, in which underscores stand for the dots.

Trainers name the layers of several networks in one file, each with a prefix: ``lora_unet``,
``lora_te``, ``lora_te1``, ``lora_te2``.
Their names may be those of another form of the same network than the pretrained model at hand.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from .checkpoint import Checkpoint, Shapes

# The start of a name under a trainer's prefix. Those of the second line stand before a dot alone.
_PREFIX = re.compile(
    r"(lora|oft|lycoris)_(unet|te\d*|transformer|prior_unet|prior_te)(?=[_.])"
    r"|(unet|transformer|diffusion_model|prior|clip_[lgh]|t5|text_encoder(_\d)?)(?=\.)"
)


def mangle(name: str, prefix: str) -> str:
    """The name with underscores of the layer ``name``."""
    return f"{prefix}_{name}".replace(".", "_")


def alias_of(checkpoint: Checkpoint, name: str, prefix: str | None, default: str) -> str:
    """The name of a layer in a trainer's file.

    Args:
        checkpoint: the adapter. Names of its source are kept if ``prefix`` is None.
        name: of the layer in the pretrained model.
        prefix: of the new name.
        default: the prefix if there is no other.
    """
    if prefix is None and name in checkpoint.aliases:
        return checkpoint.aliases[name]
    return mangle(name, prefix or default)


def prefix_of(name: str) -> str | None:
    """The trainer's prefix of a name, or None if it has none of the known ones."""
    match = _PREFIX.match(name)
    return match and match[0]


def names_of(mangled: Collection[str], shapes: Shapes, prefix: str) -> dict[str, str]:
    """The name in the pretrained model for each mangled name.

    Tried in this order, and taken if each name is that of exactly one layer:

    - the names of the model;
    - the original names of the blocks of Stable Diffusion's UNet, for a UNet of diffusers;
    - the names of a network in the model, as in a checkpoint that holds several;
    - the names of a model that holds this one, as older versions of CLIP's text model.

    Args:
        mangled: names with the prefix.
        shapes: shapes of the pretrained model's weights, by the names of its modules.
        prefix: of the mangled names.

    Raises:
        ValueError: a name is that of no layer, or of several, in all of these.
    """
    whole = [_view(shapes, prefix), _view(shapes, prefix, dict(_original_names(shapes)))]
    first = next(iter(mangled)).removeprefix(f"{prefix}_")
    parts = []
    for path in _outer_paths(first, shapes):
        inner = {name: name.removeprefix(path) for name in shapes if name.startswith(path)}
        parts.append(_view(inner, prefix, inner))
    for path in _missing_paths(first, shapes):
        parts.append(_view(shapes, prefix, {name: path + name for name in shapes}))
    found = [view for view in whole if _fits(view, mangled)][:1]
    found = found or [view for view in parts if _fits(view, mangled)]
    if len(found) == 1:
        return {name: found[0][name][0] for name in mangled}
    if found:
        wrong, candidates = next(iter(mangled)), [view[next(iter(mangled))][0] for view in found]
    else:
        wrong = next(name for name in mangled if len(whole[0].get(name, ())) != 1)
        candidates = whole[0].get(wrong, [])
    raise ValueError(f"{wrong}: expected one layer of that name in the base, got {candidates}")


def _fits(view: dict[str, list[str]], mangled: Iterable[str]) -> bool:
    return all(len(view.get(name, ())) == 1 for name in mangled)


def _view(
    names: Iterable[str], prefix: str, called: dict[str, str] | None = None
) -> dict[str, list[str]]:
    """The names of the model by their mangled forms, if the layers were called otherwise."""
    view: dict[str, list[str]] = {}
    for name in names:
        other = name if called is None else called.get(name, name)
        view.setdefault(mangle(other, prefix), []).append(name)
    return view


def _outer_paths(first: str, shapes: Shapes) -> list[str]:
    """The paths, with a dot at the end, before a layer of the name ``first`` in the model."""
    paths = set()
    for name in shapes:
        if name.replace(".", "_").endswith(f"_{first}"):
            path = name[: len(name) - len(first)]
            if path.endswith("."):
                paths.add(path)
    return sorted(paths)


def _missing_paths(first: str, shapes: Shapes) -> list[str]:
    """The beginnings of the mangled name ``first`` that the names of the model lack."""
    ends = {name.replace(".", "_") for name in shapes}
    return sorted({first.removesuffix(end) for end in ends if first.endswith(f"_{end}")})


# The layers of a residual block, and of the UNet outside of its blocks: diffusers' names and the
# original ones.
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _original_names(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Yield (name, original name) for the layers of diffusers' UNet of Stable Diffusion.

    The original UNet counts its blocks through, and each of diffusers' levels is several of them:
    a residual block with its attention each, and one that changes the resolution.
    """
    matches = {name: _BLOCK.fullmatch(name) for name in shapes}
    down = [m for m in matches.values() if m and m[1] == "down_blocks" and m[3] == "resnets"]
    if not down:
        return
    n = 1 + max(int(m[4]) for m in down)  # residual blocks of a level
    attentive = {
        m[2] for m in matches.values() if m and (m[1], m[3]) == ("up_blocks", "attentions")
    }
    for name, match in matches.items():
        if match:
            _, level, part, index, rest = match.groups()
            number = int(level) * (n + 1) + int(index)
            if match[1] == "down_blocks":
                number += n + 1 if part == "downsamplers" else 1
                place = f"input_blocks.{number}"
            else:
                number += n if part == "upsamplers" else 0
                place = f"output_blocks.{number}"
            if part == "downsamplers":
                yield name, f"{place}.0.{rest.replace('conv', 'op', 1)}"
            elif part == "upsamplers":
                yield name, f"{place}.{2 if level in attentive else 1}.{rest}"
            elif part == "attentions":
                yield name, f"{place}.1.{rest}"
            else:
                yield name, f"{place}.0.{_RESNET.get(rest, rest)}"
        elif middle := _MIDDLE.fullmatch(name):
            part, index, rest = middle.groups()
            place = 1 if part == "attentions" else 2 * int(index)
            rest = rest if part == "attentions" else _RESNET.get(rest, rest)
            yield name, f"middle_block.{place}.{rest}"
        elif name in _OUTSIDE:
            yield name, _OUTSIDE[name]
