"""merge_and_unload: a plain model again, with the updates in its weights."""

from typing import TypeVar

from torch import Tensor, nn

from .config import forget
from .exchanging import exchange
from .frozen import naming
from .lora_linear import LoRALinear
from .mixins import unmix
from .protocol import LoRALayer, is_bank, is_lora

Model = TypeVar("Model", bound=nn.Module)


def merge_and_unload(model: Model) -> Model:
    """W + scale B A in the place of every LoRALinear: nn.Linear modules on the merged weights, in place, without a
    second copy of them. Returns the model, or what takes its place if it is a LoRALinear itself.

    Of a weight in a format W is what the codes stand for. Nothing is quantised again: the sum is rounded once to
    compute_dtype, and all of these stand beside the codes until the model has them. A layer that was merged by merge_
    has what arrived of its update: unmerge_ it first, and it has all of it.

    Weights lie in dense rows and train, as a new nn.Linear's do; groups and MLPs are undone, and so are hooks of the
    layers. Layers that are merged already keep their weights. What is left is what it was before replace_linear:
    save_pretrained of a Hugging Face model writes it, and from_pretrained reads it.

    Raises ValueError or TypeError naming the layer, before any change, for factors that are not finite and for tensors
    that are offloaded, sharded or made at each use; and ValueError for a model without LoRALinear layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if any(map(is_bank, model.modules())):
        raise ValueError("model has LoRABank layers, whose rows may have several adapters: nothing says which to merge")
    if not layers:
        theirs = any(map(is_lora, model.modules()))
        raise ValueError("model has no LoRALinear layers to merge" + (": PEFT's are merged by PEFT" if theirs else ""))
    plain = {name: layer for name, layer in layers.items() if layer.base is None and not layer.merged}
    for name, layer in plain.items():
        naming(name, layer.check_mergeable)
    linears = {layer: naming(name, layer.to_linear) for name, layer in layers.items() if layer.base is not None}
    for layer in plain.values():
        layer.merge_()
    forget(model)
    return unloaded(model, {layer: linears.get(layer) or linear_of(layer) for layer in layers.values()})


def unloaded(model: Model, linears: dict[LoRALayer, nn.Linear]) -> Model:
    """A model with linears in the place of layers. In place; returns the model, or what takes its place if it is a
    layer."""
    by_id = {id(layer): linear for layer, linear in linears.items()}
    exchange(model, by_id)
    for parent in list(model.modules()):
        unmix(parent)
    return by_id.get(id(model), model)


def linear_of(layer: LoRALayer, weight: Tensor | None = None) -> nn.Linear:
    """Of a layer that is merged: on its own weight and bias, in dense rows, which train; or on another weight."""
    part = layer.lora_part()
    weight = part.weight if weight is None else weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], part.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous())
    if part.bias is not None:
        linear.bias = nn.Parameter(part.bias.detach())
    return linear.train(layer.training)
