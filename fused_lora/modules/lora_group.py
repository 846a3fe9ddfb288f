"""LoRAGroup: LoRALinear layers that a model calls one after another with one x, computed together."""

import torch
from torch import Tensor

from .. import ops
from .lora_linear import LoRALinear


class LoRAGroup:
    """q, k and v, or gate and up: they stay modules of their own where they are, with their own parameters.

    The first that is called with an x computes all of them, in one launch where the kernels can (ops.lora_group), and
    the others take their results when they are called with the same x. With any other x, a layer computes anew.

    Raises ValueError naming what the layers do not have in common.
    """

    def __init__(self, layers: list[LoRALinear]):
        obstacle = _obstacle(layers)
        if obstacle:
            raise ValueError(obstacle)
        self.layers = list(layers)
        self._of: tuple | None = None  # what the results that wait are of
        self._waiting: dict[int, Tensor] = {}
        for layer in layers:
            layer.group = self

    @staticmethod
    def fits(layers: list[LoRALinear]) -> bool:
        """Whether they can be a group."""
        return _obstacle(layers) is None

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """The layer's output for x."""
        of = (x, torch.is_grad_enabled(), layer.training, *(() if torch.compiler.is_compiling() else (x._version,)))
        place = next(i for i, each in enumerate(self.layers) if each is layer)
        if not (place in self._waiting and _same(self._of, of)):
            self._compute(x, layer.training)
            self._of = of
        y = self._waiting.pop(place)
        if not self._waiting:
            self._of = None  # nothing of this x is held beyond its last use
        return y

    def _compute(self, x: Tensor, training: bool) -> None:
        places = [i for i, layer in enumerate(self.layers) if not layer.merged]
        layers = [self.layers[i] for i in places]
        columns = (
            [getattr(layer, name) for layer in layers] for name in ("weight", "lora_A", "lora_B", "bias", "scale")
        )
        ys = ops.lora_group(x, *columns, p=layers[0].lora_dropout if training else 0.0)
        self._waiting = dict(zip(places, ys, strict=True))


def _obstacle(layers: list[LoRALinear]) -> str | None:
    for name in ("in_features", "lora_dropout"):
        found = {getattr(layer, name) for layer in layers}
        if len(found) != 1:
            return f"layers of a group must have one {name}, got {sorted(found)}"
    for name in ("dtype", "device"):
        found = {str(getattr(layer.weight, name)) for layer in layers}
        if len(found) != 1:
            return f"layers of a group must have weights of one {name}, got {sorted(found)}"
    return None


def _same(first: tuple | None, second: tuple) -> bool:
    return first is not None and first[0] is second[0] and first[1:] == second[1:]
