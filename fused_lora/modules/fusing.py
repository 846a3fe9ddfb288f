"""Which of a model's layers are computed together: read off the forwards of the modules that call them."""

from collections.abc import Iterable

from torch import nn

from .lora_mlp import LoRAMLP, Structure, recognise
from .mixins import Mixin
from .protocol import LoRALayer
from .reading import Reading, read
from .siblings import LoRASiblings


def fuse(model: nn.Module, of: Iterable[LoRALayer]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Makes LoRAMLPs of the gated MLPs of some layers, and LoRASiblings of modules that call some with one x.

    Returns the groups of layers and the MLPs, by name.
    """
    layers = {id(layer) for layer in of}
    groups, mlps = [], []
    parents = {name: module for name, module in model.named_modules() if len(_own(module, layers)) > 1}
    structures = {name: recognise(module) for name, module in parents.items() if _may_be_mlp(module, layers)}
    readings: dict[tuple, Reading | None] = {}
    for name, module in parents.items():
        joined = _join(module, layers, readings)
        if _fuse_mlp(module, structures.get(name)):
            mlps.append(name)  # it calls them as a group where it cannot be one itself
        else:
            groups += [tuple(f"{name}.{child}".lstrip(".") for child in group) for group in joined]
    return groups, mlps


def _own(module: nn.Module, layers: set[int]) -> dict[str, nn.Module]:
    """The children of a module that are among the layers, if its forward is its class's."""
    if "forward" in vars(module):
        return {}
    return {name: child for name, child in module.named_children() if id(child) in layers}


def _join(module: nn.Module, layers: set[int], readings: dict[tuple, Reading | None]) -> list[tuple[str, ...]]:
    """Lets the module's layers be computed together; the groups that there are, the larger ones first."""
    if isinstance(module, LoRASiblings):
        return []
    kind = (type(module), tuple((name, type(child)) for name, child in module.named_children()))
    kind += tuple((name, type(value)) for name, value in vars(module).items())
    if kind not in readings:
        readings[kind] = read(module)
    if readings[kind] is None:
        return []
    alike = _alike(_own(module, layers))
    reading = readings[kind].among(alike)
    if not reading.every:
        return []
    LoRASiblings.join(module, reading)
    return reading.every


def _alike(children: dict[str, nn.Module]) -> set[str]:
    """Those of the first one's dtype and device."""
    kinds = {name: (child.compute_dtype, child.frozen_weight.device) for name, child in children.items()}
    first = next(iter(kinds.values()))
    return {name for name, kind in kinds.items() if kind == first}


def _fuse_mlp(module: nn.Module, structure: Structure | None) -> bool:
    if structure is None or LoRAMLP.obstacle(structure.layers(module)) is not None:
        return False
    LoRAMLP.fuse(module, structure)
    return True


def _may_be_mlp(module: nn.Module, layers: set[int]) -> bool:
    """Three of the layers, two of which lead into the third."""
    children = _own(module, layers).values()
    if len(children) != 3 or isinstance(module, Mixin):
        return False
    sizes = sorted(tuple(child.frozen_weight.shape[::-1]) for child in children)
    return any(sizes.count((size, wide)) >= 2 and any(wide == K for K, _ in sizes) for size, wide in sizes)
