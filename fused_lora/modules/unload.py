"""merge_and_unload: a plain model again, with the updates in its weights."""

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

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

    Weights lie in dense rows and train, as a new nn.Linear's do; groups and MLPs are undone, and so are hooks of the
    layers. Layers that are merged already keep their weights. What is left is what it was before replace_linear:
    save_pretrained of a Hugging Face model writes it, and from_pretrained reads it.

    Raises ValueError or TypeError naming the layer, before any change, for factors that are not finite and for tensors
    that are offloaded, sharded or made at each use; NotImplementedError for a weight in a format, and ValueError for a
    model without LoRALinear layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if any(map(is_bank, model.modules())):
        raise ValueError("model has LoRABank layers, whose rows may have several adapters: nothing says which to merge")
    if not layers:
        theirs = any(map(is_lora, model.modules()))
        raise ValueError("model has no LoRALinear layers to merge" + (": PEFT's are merged by PEFT" if theirs else ""))
    unmerged = {name: layer for name, layer in layers.items() if not layer.merged}
    for name, layer in unmerged.items():
        naming(name, layer.check_mergeable)
    for layer in unmerged.values():
        layer.merge_()
    forget(model)
    return unloaded(model, layers.values())


def unloaded(model: Model, layers: Iterable[LoRALayer]) -> Model:
    """A model whose layers, which are merged, are each an nn.Linear again, on its weight and bias, which train.

    In place; returns the model, or what takes its place if it is a layer."""
    linears = {id(layer): _linear_of(layer) for layer in layers}
    exchange(model, linears)
    for parent in list(model.modules()):
        unmix(parent)
    return linears.get(id(model), model)


def _linear_of(layer: LoRALayer) -> nn.Linear:
    """On the layer's own tensors, in dense rows."""
    weight, bias = layer.lora_part().weight, layer.lora_part().bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear.train(layer.training)
