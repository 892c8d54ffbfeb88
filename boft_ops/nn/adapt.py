"""Whole models: ``adapt`` puts BOFT layers in, ``merge`` and ``unload`` take them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .._runtime import checks
from .base import BOFTLayer
from .base_modules import is_quantized
from .config import Options
from .distributed import check_order, fully_sharded
from .expert_adapter import EACH, MODES
from .experts import BOFTExperts, expert_parameters, put_experts
from .layer_kinds import BOFT_CLASSES, build_layer, check_replaceable
from .multi_adapter import MultiAdapterLinear
from .targets import matching, named_children, options_by_name
from .wrappers import COMPILED, wrapper_of

# These modules read the weight of a child without calling it, which would ignore a rotation.
_BYPASSING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def adapt(
    model: nn.Module,
    target_modules: str | Iterable[str] | Mapping[str, Options],
    *,
    target_parameters: str | Iterable[str] = (),
    experts: str = EACH,
    modules_to_save: str | Iterable[str] = (),
    wrap: bool = False,
    **options: Any,
) -> nn.Module:
    """Replace the matching layers by BOFT layers and freeze the rest.

    These are linear layers, convolutions of one to three dimensions, and embeddings, whose vectors
    are rotated and have no scale.

    A model that is adapted already gets further layers; what is trained in it stays trainable.

    Some linear layers are kept: a ``MultiAdapterLinear`` takes their place and calls them on
    rotated inputs. These are the Conv1D of transformers (GPT-2) and quantized layers: those of
    torchao and bitsandbytes, fine-grained fp8 of transformers, and modules with packed integers and
    attributes for their sizes, as GPTQ, AWQ and HQQ have them.
    A linear layer that ``fully_shard`` has sharded is kept likewise, and the gradients of its
    adapter are averaged over the ranks (docs/distributed.md).

    Args:
        model: changed in place; unchanged if an error is raised.
        target_modules: the layers to replace, named as in PEFT. A string is a regular expression
            that must match the whole dotted name; a list holds whole names or last parts of names
            ("q_proj", "attention.output.dense"). The string "all-linear" takes every linear layer
            except ``model.get_output_embeddings()`` and what lies in ``modules_to_save``. A mapping
            gives options of their own to layers: its keys are such names, or regular expressions
            that match whole dotted names, and its values are keyword arguments that replace those
            of ``options``, as in ``{"q_proj": {"block_size": 16}, "down_proj": {}}``. May be empty
            if there are target_parameters.
        target_parameters: 3-D weights of experts, named as in PEFT, such as
            ``["experts.gate_up_proj", "experts.down_proj"]``; a string is a regular expression.
            The inputs of the experts are rotated, see ``BOFTExperts``.
        experts: "each" trains a rotation for every expert, "shared" one for all experts of a layer.
        modules_to_save: other modules that stay trainable, such as a classification head, named as
            in target_modules; ``save_adapter`` stores them.
        wrap: True also keeps and calls linear layers that cannot be replaced: with hooks, with
            parametrizations, with a forward of their own, or any module with in_features and
            out_features. The caller knows that they are linear in their input, up to a bias.
        **options: keyword arguments of ``BOFTLinear`` and ``BOFTConv2d`` from block_size on, such
            as ``block_size=8, n_factors=2``.

    Returns:
        ``model``.

    Raises:
        TypeError: a matching module is none of these layers, or has a forward of its own, which a
            BOFT layer would lose.
        ValueError: nothing matches; the features of a layer do not fit the options (the message
            names the layer); experts compute in a way that a rotation would miss; a layer has hooks
            or parametrizations, which a BOFT layer would lose; its parent may bypass its forward;
            it lies in DistributedDataParallel or another wrapper that has to come after ``adapt``;
            it is adapted already; it shares its weight with a
            module to save (tied embeddings); or two keys of a mapping match it with other options.
    """
    checks.module("model", model)
    saved = matching(model, modules_to_save, "modules_to_save") if modules_to_save else {}
    checks.choice("experts", experts, MODES)
    layer_options = options_by_name(model, target_modules, options, saved.values())
    modules = {name: module for _, _, name, module in named_children(model)}
    weights = expert_parameters(modules)
    if target_parameters:
        names = matching(model, target_parameters, "target_parameters", weights)
        layer_options |= dict.fromkeys(names, options | {"experts": experts})
    if not layer_options:
        raise ValueError("target_modules: expected at least one name, got none")
    targets = {name: (modules | weights)[name] for name in layer_options}
    replaced = set(targets.values())
    for name, module in saved.items():
        if not replaced.isdisjoint(module.modules()):
            raise ValueError(
                f"modules_to_save: {name!r} is, or holds, a module that is also in target_modules"
            )
    # A shared parameter that is trained in one module would change the frozen weight of the other,
    # without the gradient of the latter.
    owners = {p: name for name, module in targets.items() for p in module.parameters()}
    for name, module in saved.items():
        for parameter in module.parameters():
            if parameter in owners:
                raise ValueError(
                    f"modules_to_save: {name!r} shares a parameter with {owners[parameter]!r} of "
                    "target_modules, which is frozen: expected one of the two"
                )
    with unfrozen_on_error(model):
        put_in(model, build_layers(model, layer_options, wrap=wrap))
    for module in saved.values():
        module.requires_grad_(True)
    return model


def build_layers(
    model: nn.Module, options: dict[str, dict], *, wrap: bool = False
) -> dict[nn.Module, BOFTLayer | MultiAdapterLinear]:
    """Build the BOFT layers for layers of a model, without putting them in.

    Args:
        model: unchanged, except that its quantized target layers are frozen.
        options: the keyword arguments of each BOFT layer, by the dotted name of the layer.
        wrap: as for ``adapt``.

    Returns:
        The BOFT layer for each module to replace.

    Raises:
        TypeError, ValueError: as for ``adapt``.
    """
    children = {name: (parent, module) for parent, _, name, module in named_children(model)}
    experts = expert_parameters({name: module for name, (_, module) in children.items()})
    layers: dict[nn.Module, BOFTLayer | MultiAdapterLinear | BOFTExperts] = {}
    for name in options:
        if name in experts:
            continue
        if name not in children:
            raise ValueError(f"model: expected a module {name!r}, got none of that name")
    targets = {name: experts.get(name) or children[name][1] for name in options}
    check_order(model, targets)
    fully_sharded_modules = fully_sharded(model)
    for name, layer_options in options.items():
        if name in experts:
            put_experts(layers, name, experts[name], layer_options)
            continue
        parent, module = children[name]
        if module not in layers:  # a module may be registered under several names
            check_replaceable(name, module, wrap)
            check_parent(f"target_modules: {name!r}", parent)
            is_managed = module in fully_sharded_modules
            layers[module] = build_layer(name, module, layer_options, wrap, is_managed)
    return layers


def put_in(model: nn.Module, layers: dict[nn.Module, BOFTLayer | MultiAdapterLinear]) -> None:
    """Freeze the model, then replace each module by its BOFT layer under all of its names.

    A model that is adapted already keeps what is trained in it; only the new layers' bases freeze.
    """
    if any(isinstance(module, BOFT_CLASSES) for module in model.modules()):
        for module in layers:
            module.requires_grad_(False)
    else:
        model.requires_grad_(False)
    for parent, attribute, _, module in list(named_children(model)):
        if module in layers:
            setattr(parent, attribute, layers[module])
    for layer in layers.values():
        if isinstance(layer, BOFTExperts):
            layer.connect()
    _mark_quantized(model, False)


def _mark_quantized(model: nn.Module, is_quantized: bool) -> None:
    """Set the attribute by which transformers' Trainer refuses to train a model.

    It refuses models that its quantizers made, unless PEFT has put adapters on them. The mark is
    read nowhere else but by ``half()`` and ``float()``, which refuse to cast such models.
    """
    for module in model.modules():  # a wrapper holds the model
        if getattr(module, "hf_quantizer", None) is not None and hasattr(module, "is_quantized"):
            module.is_quantized = is_quantized


@contextmanager
def unfrozen_on_error(model: nn.Module) -> Iterator[None]:
    """Context manager: restore ``requires_grad`` of every parameter if the block raises."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for parameter, trained in before.items():
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        raise


def merge(
    model: nn.Module, requantize: Callable[[nn.Linear], nn.Module] | None = None
) -> nn.Module:
    """Replace every BOFT layer by a layer of torch with the merged weight.

    Args:
        model: changed in place, or itself a BOFT layer; unchanged if an error is raised.
        requantize: required if a base layer is quantized: a function from the merged ``nn.Linear``
            to the layer to use, see ``MultiAdapterLinear.merged_layer``.

    Returns:
        ``model``, or the plain layer if ``model`` is a BOFT layer. Merged weights are frozen; other
        parameters keep their ``requires_grad``.

    Raises:
        TypeError: ``model`` is not an nn.Module, or a base layer computes more than a linear layer.
        ValueError: the model has no BOFT layer, a base layer has hooks, or it is quantized and
            ``requantize`` is None.
    """
    checks.module("model", model)

    def merged(layer: BOFTLayer | MultiAdapterLinear | BOFTExperts) -> nn.Module:
        if not isinstance(layer, MultiAdapterLinear):
            return layer.merged_layer()
        return layer.merged_layer(requantize if is_quantized(layer.base) else None)

    return _replace_layers(model, merged)


def unload(model: nn.Module) -> nn.Module:
    """Replace every BOFT layer by a plain layer with the pretrained weight: undo ``adapt``.

    Rotations and scales are lost, so save the adapter first if it is needed. Trained biases and
    ``modules_to_save`` keep what was trained.

    Args:
        model: changed in place, or itself a BOFT layer; unchanged if an error is raised.

    Returns:
        ``model``, or the plain layer if ``model`` is a BOFT layer. Parameters keep their
        ``requires_grad``: those that ``adapt`` froze stay frozen.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: the model has no BOFT layer, a layer is merged and its weight cannot be
            restored, or the model is offloaded.
    """
    checks.module("model", model)

    def pretrained(layer: BOFTLayer | MultiAdapterLinear | BOFTExperts) -> nn.Module:
        return layer.pretrained_layer() if isinstance(layer, BOFTLayer) else layer.base

    experts = [module for module in model.modules() if isinstance(module, BOFTExperts)]
    model = _replace_layers(model, pretrained)
    for layer in experts:
        layer.disconnect()
    return model


def _replace_layers(model: nn.Module, plain: Callable[..., nn.Module]) -> nn.Module:
    """Replace every BOFT layer by ``plain`` of it, once all of these are made."""
    if isinstance(model, BOFT_CLASSES):
        return plain(model)
    layers = [(p, a, m) for p, a, _, m in named_children(model) if isinstance(m, BOFT_CLASSES)]
    if not layers:
        raise ValueError("model: expected at least one BOFT layer, got none")
    plain_layers = {layer: plain(layer) for layer in dict.fromkeys(m for _, _, m in layers)}
    for parent, attribute, layer in layers:
        setattr(parent, attribute, plain_layers[layer])
    _mark_quantized(model, True)
    return model


def check_parent(layer: str, parent: nn.Module) -> None:
    """Raise ValueError if ``parent`` may read the weight of its child without calling it.

    ``layer`` describes the child in the message.
    """
    if wrapper_of(parent) == COMPILED:
        raise ValueError(
            f"{layer} is wrapped by torch.compile, whose graph would go on calling the former "
            "layer; expected compiling after adapting"
        )
    if isinstance(parent, _BYPASSING_PARENTS):
        raise ValueError(
            f"{layer} lies in {type(parent).__name__}, which may read its weight "
            "without calling it, so that the rotation would be ignored; expected a layer whose "
            "forward() is called"
        )
