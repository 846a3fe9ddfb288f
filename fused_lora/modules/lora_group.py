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
        obstacle = self.obstacle(layers)
        if obstacle:
            raise ValueError(obstacle)
        self.layers = list(layers)
        self._waiting: dict[int, Tensor] = {}  # by place, and what each depends on
        self._of: dict[int, tuple] = {}
        for layer in layers:
            layer.group = self

    @staticmethod
    def obstacle(layers: list[LoRALinear], but: str = "") -> str | None:
        """Why they cannot be a group, or None. They may differ in `but`."""
        for name in ("in_features", "lora_dropout"):
            found = {getattr(layer, name) for layer in layers}
            if len(found) != 1 and name != but:
                return f"layers of a group must have one {name}, got {sorted(found)}"
        for name in ("dtype", "device"):
            found = {str(getattr(layer.weight, name)) for layer in layers}
            if len(found) != 1:
                return f"layers of a group must have weights of one {name}, got {sorted(found)}"
        return None

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """The layer's output for x."""
        place = next(i for i, each in enumerate(self.layers) if each is layer)
        of = self._key(layer, x)
        if not (place in self._waiting and _same(self._of.get(place), of)):
            self._compute(x, layer.training)
        y = self._waiting.pop(place)
        del self._of[place]
        return y

    def _compute(self, x: Tensor, training: bool) -> None:
        places = [i for i, layer in enumerate(self.layers) if not layer.merged]
        parts = [self.layers[i].part() for i in places]
        ys = ops.lora_group(x, parts, p=self.layers[0].lora_dropout if training else 0.0)
        self._waiting = dict(zip(places, ys, strict=True))
        self._of = {i: self._key(self.layers[i], x) for i in places}
        if not torch.compiler.is_compiling():
            for y in ys:
                if y.requires_grad:
                    y.register_hook(self._forget)  # their backward is one: after it, none of them has a graph

    def _key(self, layer: LoRALinear, x: Tensor) -> tuple:
        """All that an output depends on, x first. Under torch.compile tensors have no versions."""
        modes = (layer.training, torch.is_grad_enabled(), autocast_dtype(x))
        if torch.compiler.is_compiling():
            return (x, *modes)
        read = (x, layer.weight, layer.lora_A, layer.lora_B, layer.scale)
        versions = [(id(tensor), None if tensor.is_inference() else tensor._version) for tensor in read]
        return (x, *modes, torch.is_inference_mode_enabled(), *versions)

    def _forget(self, _: Tensor) -> None:
        self._waiting, self._of = {}, {}


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _same(first: tuple | None, second: tuple) -> bool:
    return first is not None and first[0] is second[0] and first[1:] == second[1:]
